"""Arithmetic units: float32, conversions, the aligned dot product, the unary functions.

Every unit is a pipeline of fixed latency that takes new inputs in every cycle. There is no handshake and no reset:
an output belongs to the inputs of `latency` cycles before, whatever those were, so validity travels beside the unit.
Results equal `typebar.isa.numerics` bit for bit, for every latency. Where registers lie follows from the latency
(`pipeline.depths`); a unit with `places` of them has a register at each.

| unit | least latency | places | golden model |
|---|---|---|---|
| `add.Adder` | 1 | 6 | `add`, `sub` |
| `multiply.Multiplier` | 1 | 5 | `mul` |
| `compare.Comparator` | 1 | 2 | `maximum`; a > b |
| `convert.OperandFromFloat32`, `OperandFromMemory`, `OperandFromShort` | 1 | 2 | `to_operand`, of `decode` |
| `convert.Float32FromMemory`, `MemoryFromFloat32` | 1 | 2 | `decode`, `encode` |
| `dot.DotProduct` | 1 | 15 for 64 lanes, 13 for 8 | `chunk_sum` |
| `unary.UnaryEvaluator` | 2 | 11 | `unary` |
"""
