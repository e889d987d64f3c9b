"""Arithmetic units: float32, conversions, the aligned dot product, the unary functions.

Every unit is a pipeline of fixed latency that takes new inputs in every cycle. There is no handshake and no reset:
an output belongs to the inputs of `latency` cycles before, whatever those were, so validity travels beside the unit.
Results equal `typebar.isa.numerics` bit for bit, for every latency.

| unit | latency from | LUTs and DSPs | golden model |
|---|---|---|---|
| `add.Adder` | 1 | see `docs/hardware.md` | `numerics.add`, `numerics.sub` |
"""
