"""The machine in Amaranth: every unit of a device, parameterised by a machine description."""
