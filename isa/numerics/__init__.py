"""Golden numerics: the machine's arithmetic to the bit, in NumPy written to be read.

`formats` has the memory and operand formats, `dot` the matrix unit's dot product, `vector` the vector unit's
float32 arithmetic, `unary` the table-driven functions. Fast versions elsewhere are tested against these.
"""

from typebar.isa.instructions import Format, Function
from typebar.isa.numerics.dot import chunk_sum, dot
from typebar.isa.numerics.formats import (
    NumericFlag,
    bits_of,
    canonical,
    decode,
    encode,
    from_bits,
    is_nan,
    raw_dtype,
    to_operand,
)
from typebar.isa.numerics.unary import unary
from typebar.isa.numerics.vector import (
    add,
    argmax,
    maximum,
    mul,
    reduce_max,
    running_max,
    sub,
    sum_squares,
    tree_sum,
)

NUMERICS_VERSION = 3
"""Version of the arithmetic (`docs/numerics.md`); an image computes the same bits only under the same one."""

__all__ = [
    "NUMERICS_VERSION",
    "Format",
    "Function",
    "NumericFlag",
    "add",
    "argmax",
    "bits_of",
    "canonical",
    "chunk_sum",
    "decode",
    "dot",
    "encode",
    "from_bits",
    "is_nan",
    "maximum",
    "mul",
    "raw_dtype",
    "reduce_max",
    "running_max",
    "sub",
    "sum_squares",
    "to_operand",
    "tree_sum",
    "unary",
]
