"""The vector unit: its lanes, the tree of a reduction, and the unit that feeds them."""
