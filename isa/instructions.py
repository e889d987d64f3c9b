"""Every instruction, declared once as data: opcode, unit, fields, meaning and traps.

Assembler, disassembler, encoder, both simulators, the RTL decoder and `docs/isa.md` derive from `INSTRUCTIONS`.

An instruction is one line of memory, 64 bytes, little endian. Bits 0-7 hold the opcode, bits 8-61 the modifiers
(small fields packed in declared order), and from bit 62 on come operand slots of 25 bits. An **operand** is a
scalar register (5 bits, low) plus a signed immediate (20 bits): its value is `(R[register] + immediate) mod 2^32`,
read as signed, when the instruction issues. R0 is always zero. Bits that an instruction does not use are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum

WORD_BITS = 512
WORD_BYTES = WORD_BITS // 8
OPCODE_BITS = 8
MODIFIER_BASE = 8
OPERAND_BASE = 62
REGISTER_BITS = 5
IMMEDIATE_BITS = 20
OPERAND_BITS = REGISTER_BITS + IMMEDIATE_BITS
SCALAR_REGISTERS = 1 << REGISTER_BITS
MAX_OPERANDS = (WORD_BITS - OPERAND_BASE) // OPERAND_BITS
ISA_VERSION = 1
DEVICE_REGISTER = 1
"""R1 holds the device's rank at start, R2 the number of devices; all other registers start at zero."""
COUNT_REGISTER = 2


class Unit(IntEnum):
    """The units with an in-order queue, and the scalar core, which executes at issue."""

    SCALAR = 0
    MATRIX = 1
    VECTOR = 2
    MEMORY = 3
    RING = 4


class Format(IntEnum):
    """How an element lies in memory."""

    FP16 = 0
    BF16 = 1
    INT8 = 2
    FP32 = 3


FORMAT_BYTES = {Format.FP16: 2, Format.BF16: 2, Format.INT8: 1, Format.FP32: 4}


class Region(IntEnum):
    """Memory regions that the loader binds; the number is the index in the device's region table.

    WEIGHTS (HBM, read-only): packed matrices. KV (HBM): K and V caches. PARAMS (DDR, read-only): embeddings and
    norms, the same on every device. LOCAL (DDR, read-only): this device's biases. IO (DDR): shared with the host.
    """

    WEIGHTS = 0
    KV = 1
    PARAMS = 2
    LOCAL = 3
    IO = 4


HBM_REGIONS = frozenset({Region.WEIGHTS, Region.KV})
WRITABLE_REGIONS = frozenset({Region.KV, Region.IO})


class Source(IntEnum):
    """Where a vector instruction's second operand, or an epilogue's scale, comes from."""

    VECTOR = 0
    WORD = 1
    IMMEDIATE = 2


class Scale(IntEnum):
    """The epilogue's scale step."""

    NONE = 0
    WORD = 1
    COLUMN = 2


class Patch(IntEnum):
    """Which element of the streamed matrix comes from a register instead of memory."""

    NONE = 0
    COLUMN = 1
    LANE = 2


class Function(IntEnum):
    """Unary functions; the numbers are those of the function tables."""

    EXP = 0
    RECIP = 1
    RSQRT = 2
    TANH = 3
    SIGMOID = 4
    GELU_ERF = 5
    GELU_TANH = 6
    SILU = 7
    RELU = 8


class Activation(IntEnum):
    """The epilogue's activation step: none, or a function of the vector unit (its number plus one)."""

    NONE = 0
    EXP = 1
    RECIP = 2
    RSQRT = 3
    TANH = 4
    SIGMOID = 5
    GELU_ERF = 6
    GELU_TANH = 7
    SILU = 8
    RELU = 9


class Factor(IntEnum):
    """Where the factor of a chain's first step comes from: none, a word of the register file, or an operand's value."""

    NONE = 0
    WORD = 1
    VALUE = 2


class Operation(IntEnum):
    """A chain's step with a second operand."""

    NONE = 0
    ADD = 1
    SUB = 2
    MUL = 3
    MAX = 4


class Reduction(IntEnum):
    """What a chain's results are reduced to: nothing, or what vsum, vsumsq and vrmax make of them."""

    NONE = 0
    SUM = 1
    SUMSQ = 2
    MAX = 3


class Trap(IntEnum):
    """Error codes a device stops with; the control block holds the code and the instruction's address."""

    NONE = 0
    ILLEGAL = 1
    REGISTER_BOUNDS = 2
    MISALIGNED = 3
    REGION_BOUNDS = 4
    REGION_ACCESS = 5
    COUNT = 6
    PROGRAM_END = 7
    RING_MISMATCH = 8
    SOFTWARE = 9
    DEVICE_LOST = 10
    OVERLAP = 11
    TIMEOUT = 12
    BUS = 13


TRAP_TEXT = {
    Trap.ILLEGAL: "the word is no instruction: unknown opcode, an undefined value, or a bit set that must be zero",
    Trap.REGISTER_BOUNDS: "a vector operand leaves the register file",
    Trap.MISALIGNED: "a vector base, a memory address or a stride breaks its alignment",
    Trap.REGION_BOUNDS: "an access leaves its region, or the region is not bound",
    Trap.REGION_ACCESS: "a write to a read-only region, or a region in the wrong memory for the instruction",
    Trap.COUNT: "a count or position operand is negative or above its limit",
    Trap.PROGRAM_END: "execution ran past the last instruction, or a branch went outside the program",
    Trap.RING_MISMATCH: "the devices' ring instructions differ in kind, length or number",
    Trap.SOFTWARE: "the program executed a trap instruction",
    Trap.DEVICE_LOST: "the device stopped answering",
    Trap.OVERLAP: "a result overlaps an operand that is read after parts of it are written; in place or apart",
    Trap.TIMEOUT: "the watchdog saw no progress (hardware only)",
    Trap.BUS: "a memory answered with an error (hardware only)",
}


class Kind(Enum):
    """What a field holds, and so how wide it is and how text writes it."""

    REGISTER = "register"
    OPERAND = "operand"
    ENUM = "enum"
    FLAG = "flag"
    INT32 = "int32"
    FLOAT32 = "float32"
    TARGET = "target"


TARGET_BITS = 20


@dataclass(frozen=True)
class Field:
    """One field of an instruction; `values` names the enumeration of an ENUM field, `bits` its width."""

    name: str
    kind: Kind
    note: str
    values: type[IntEnum] | None = None
    bits: int = 0

    @property
    def width(self) -> int:
        """Width in bits."""
        fixed = {
            Kind.REGISTER: REGISTER_BITS,
            Kind.OPERAND: OPERAND_BITS,
            Kind.FLAG: 1,
            Kind.INT32: 32,
            Kind.FLOAT32: 32,
            Kind.TARGET: TARGET_BITS,
        }
        return self.bits if self.kind is Kind.ENUM else fixed[self.kind]


@dataclass(frozen=True)
class Placed:
    """A field with its place in the word; `index` counts operand slots or modifiers."""

    field: Field
    offset: int
    index: int


@dataclass(frozen=True)
class Instruction:
    """One instruction: `semantics` is pseudocode over the golden numerics, `traps` beyond ILLEGAL."""

    name: str
    opcode: int
    unit: Unit
    fields: tuple[Field, ...]
    summary: str
    semantics: str
    traps: tuple[Trap, ...] = ()

    @property
    def operands(self) -> tuple[Field, ...]:
        """Operand fields in slot order."""
        return tuple(item for item in self.fields if item.kind is Kind.OPERAND)

    @property
    def modifiers(self) -> tuple[Field, ...]:
        """All other fields, in packing order."""
        return tuple(item for item in self.fields if item.kind is not Kind.OPERAND)

    def layout(self) -> tuple[Placed, ...]:
        """Every field with its bit offset."""
        placed, offset = [], MODIFIER_BASE
        for index, item in enumerate(self.modifiers):
            placed.append(Placed(item, offset, index))
            offset += item.width
        if offset > OPERAND_BASE:
            raise AssertionError(f"{self.name}: modifiers need {offset - MODIFIER_BASE} bits")
        for index, item in enumerate(self.operands):
            placed.append(Placed(item, OPERAND_BASE + index * OPERAND_BITS, index))
        if len(self.operands) > MAX_OPERANDS:
            raise AssertionError(f"{self.name}: {len(self.operands)} operands")
        return tuple(placed)


def _op(name: str, note: str) -> Field:
    return Field(name, Kind.OPERAND, note)


def _enum(name: str, values: type[IntEnum], bits: int, note: str) -> Field:
    return Field(name, Kind.ENUM, note, values, bits)


_RD = Field("rd", Kind.REGISTER, "scalar register written; R0 stays zero")
_A, _B = _op("a", "first operand"), _op("b", "second operand")
_TO = Field("to", Kind.TARGET, "instruction index")
_VDST = _op("dst", "word address of the result")
_VA = _op("a", "word address of the first vector")
_VB = _op("b", "word address of the second vector, or of its one word (b_from = word)")
_N = _op("n", "elements")
_B_FROM = _enum("b_from", Source, 2, "second operand: a vector, one word for all elements, or `imm`")
_IMM = Field("imm", Kind.FLOAT32, "immediate second operand")
_REGION = _enum("region", Region, 4, "memory region")
_FORMAT = _enum("format", Format, 3, "element format in memory")
_LINE = _op("line", "address in the region, in lines of 64 bytes")
_BYTE = _op("byte", "byte offset added to the line's address")
_VECTOR_TRAPS = (Trap.REGISTER_BOUNDS, Trap.MISALIGNED, Trap.COUNT)
_OVERLAP_TRAPS = (*_VECTOR_TRAPS, Trap.OVERLAP)
_MEMORY_TRAPS = (Trap.REGION_BOUNDS, Trap.REGION_ACCESS, Trap.MISALIGNED)


def _scalar(name: str, opcode: int, expression: str, summary: str) -> Instruction:
    return Instruction(name, opcode, Unit.SCALAR, (_RD, _A, _B), summary, f"R[rd] = {expression}")


def _branch(name: str, opcode: int, condition: str, summary: str) -> Instruction:
    meaning = f"if {condition}: pc = to"
    return Instruction(name, opcode, Unit.SCALAR, (_TO, _A, _B), summary, meaning, (Trap.PROGRAM_END,))


def _binary(name: str, opcode: int, function: str, summary: str) -> Instruction:
    meaning = f"""for i in 0 .. n-1:
    y = V[b + i] (b_from = vector), V[b] (word), imm (immediate)
    V[dst + i] = {function}(V[a + i], y)"""
    fields = (_B_FROM, _IMM, _VDST, _VA, _VB, _N)
    return Instruction(name, opcode, Unit.VECTOR, fields, summary, meaning, _OVERLAP_TRAPS)


def _reduce(name: str, opcode: int, function: str, summary: str) -> Instruction:
    return Instruction(
        name,
        opcode,
        Unit.VECTOR,
        (_VDST, _VA, _N),
        summary,
        f"V[dst] = {function}(V[a .. a+n-1])",
        _VECTOR_TRAPS,
    )


_CHAIN_FIELDS = (
    _B_FROM,
    _IMM,
    _enum("scale_from", Factor, 2, "factor: none, the word V[scale], or the operand's value as a float32"),
    _enum("operation", Operation, 3, "operation with the second operand"),
    _enum("function", Activation, 4, "unary function"),
    Field("write", Kind.FLAG, "write the elements"),
    _enum("reduce", Reduction, 2, "reduce the elements to a word"),
    _VDST,
    _VA,
    _VB,
    _N,
    _op("scale", "word address of the factor (scale_from = word), or its bits (scale_from = value)"),
    _op("result", "word address of what the elements are reduced to"),
)

_CHAIN_SEMANTICS = """for i in 0 .. n-1:
    y = V[b + i] (b_from = vector), V[b] (word), imm (immediate)
    x = V[a + i]
    x = mul(x, V[scale]) (scale_from = word), mul(x, float32 with bits scale) (value)
    x = operation(x, y);  x = function(x)              (each step optional, each rounded to float32)
    if write: V[dst + i] = x
if reduce: V[result] = tree_sum, tree_sum of x*x, or maximum of all x, as vsum, vsumsq, vrmax
(no step: bit for bit)"""

_MATMUL_FIELDS = (
    _FORMAT,
    _REGION,
    Field("full", Kind.FLAG, "the last column block is stored at full width (a cache that grows by columns)"),
    Field("accumulate", Kind.FLAG, "accumulators start from V[dst], not from +0"),
    _enum("patch", Patch, 2, "replace one column (K index) or one lane of every column by registers"),
    _enum("scaling", Scale, 2, "multiply by nothing, by the word V[scale], or by V[scale + column]"),
    Field("add_bias", Kind.FLAG, "add V[bias + column]"),
    Field("masked", Kind.FLAG, "columns outside [lo, hi) become the most negative finite float32"),
    _enum("activation", Activation, 4, "unary function applied last"),
    Field("row_max", Kind.FLAG, "V[maximum + row] = maximum of the row's results"),
    Field("mask_outer", Kind.FLAG, "hi (and lo) grow by one with each outer count"),
    Field("mask_inner", Kind.FLAG, "hi (and lo) grow by one with each inner count"),
    _op("dst", "word address of the results of row 0"),
    _op("src", "word address of vector 0, k words"),
    _op("k", "length of each dot product"),
    _op("n", "columns"),
    _op("line", "address of the packed matrix in the region, in lines, a multiple of a row"),
    _op("outer", "outer count of vectors"),
    _op("inner", "inner count of vectors"),
    _op("src_outer", "words from one outer vector to the next"),
    _op("src_inner", "words from one inner vector to the next"),
    _op("dst_outer", "words from one outer result row to the next"),
    _op("dst_inner", "words from one inner result row to the next"),
    _op("scale", "word address of the scale"),
    _op("bias", "word address of the bias, n words"),
    _op("lo", "first column kept by the mask in row 0"),
    _op("hi", "first column after those kept by the mask in row 0"),
    _op("maximum", "word address of the row maxima"),
    _op("patch_src", "word address of the patch: k words (column) or n words (lane)"),
    _op("patch_at", "column or lane replaced; n (or k) and above: none"),
)

_MATMUL_SEMANTICS = """M(i, j) = element (i, j) of the packed k x n matrix at (region, line), see "Packed matrices";
          patch = column: M(i, patch_at) = round_to(format, V[patch_src + i])
          patch = lane:   M(patch_at, j) = round_to(format, V[patch_src + j])
for o in 0 .. outer-1, i in 0 .. inner-1:          (row r = o * inner + i)
    x = V[src + o*src_outer + i*src_inner ..][k],  y = dst + o*dst_outer + i*dst_inner
    for j in 0 .. n-1:
        acc = accumulate ? V[y + j] : +0
        for each chunk c of `lanes` positions, ascending, absent beyond k:
            acc = acc + dot(operand(x[c]), operand(M(c, j)))
        v = acc;  v = v * scale;  v = v + V[bias + j]      (each step optional, each rounded to float32)
        if masked and not lo + s <= j < hi + s: v = most negative finite float32   (s = steps of o and i)
        v = activation(v);  V[y + j] = v
    if row_max: V[maximum + r] = max over j of V[y + j]    (n = 0: nothing is written)"""

INSTRUCTIONS: tuple[Instruction, ...] = (
    # System ---------------------------------------------------------------------------------------------
    Instruction(
        "halt", 0x01, Unit.SCALAR, (), "stop; every older instruction has finished", "wait for all units; status = done"
    ),
    Instruction(
        "trap",
        0x02,
        Unit.SCALAR,
        (_op("code", "number reported to the host"),),
        "stop with an error",
        "trap SOFTWARE with code",
        (Trap.SOFTWARE,),
    ),
    Instruction(
        "fence", 0x03, Unit.SCALAR, (), "wait until every older instruction has finished", "wait for all units"
    ),
    # Scalar ---------------------------------------------------------------------------------------------
    Instruction(
        "sli", 0x10, Unit.SCALAR, (_RD, Field("value", Kind.INT32, "constant")), "load a constant", "R[rd] = value"
    ),
    _scalar("sadd", 0x11, "a + b (mod 2^32)", "add"),
    _scalar("ssub", 0x12, "a - b (mod 2^32)", "subtract"),
    _scalar("smul", 0x13, "a * b (mod 2^32)", "multiply, low half"),
    _scalar("smin", 0x14, "min(a, b), signed", "minimum"),
    _scalar("smax", 0x15, "max(a, b), signed", "maximum"),
    _scalar("sand", 0x16, "a & b", "bitwise and"),
    _scalar("sshl", 0x17, "a << (b mod 32)", "shift left"),
    _scalar("sshr", 0x18, "a >> (b mod 32), arithmetic", "shift right"),
    Instruction(
        "sfgt",
        0x19,
        Unit.SCALAR,
        (_RD, _A, _B),
        "compare the bit patterns of two float32",
        "R[rd] = float32(a) > float32(b) ? 1 : 0\n(false with NaN; subnormals are zeros)",
    ),
    _branch("beq", 0x20, "a == b", "branch if equal"),
    _branch("bne", 0x21, "a != b", "branch if not equal"),
    _branch("blt", 0x22, "a < b (signed)", "branch if less"),
    _branch("bge", 0x23, "a >= b (signed)", "branch if greater or equal"),
    Instruction(
        "vread",
        0x28,
        Unit.SCALAR,
        (_RD, _VA),
        "read a vector word's bits; waits for its writer and for every gather",
        "R[rd] = bits(V[a])",
        (Trap.REGISTER_BOUNDS,),
    ),
    # Vector ---------------------------------------------------------------------------------------------
    _binary("vadd", 0x30, "add", "add"),
    _binary("vsub", 0x31, "sub", "subtract"),
    _binary("vmul", 0x32, "mul", "multiply"),
    _binary("vmax", 0x33, "max", "maximum: NaN wins, +0 > -0"),
    Instruction(
        "vmov",
        0x34,
        Unit.VECTOR,
        (_B_FROM, _IMM, _VDST, _VB, _N),
        "copy or fill, bit for bit",
        "for i in 0 .. n-1:\n    V[dst + i] = V[b + i] (b_from = vector), V[b] (word), imm (immediate)",
        _OVERLAP_TRAPS,
    ),
    Instruction(
        "vwrite",
        0x35,
        Unit.VECTOR,
        (_VDST, _B),
        "write a scalar's bits to one word (any address)",
        "V[dst] = b",
        (Trap.REGISTER_BOUNDS,),
    ),
    Instruction(
        "vunary",
        0x38,
        Unit.VECTOR,
        (_enum("function", Function, 4, "unary function"), _VDST, _VA, _N),
        "unary function",
        "for i in 0 .. n-1: V[dst + i] = function(V[a + i])",
        _OVERLAP_TRAPS,
    ),
    Instruction(
        "vchain",
        0x39,
        Unit.VECTOR,
        _CHAIN_FIELDS,
        "factor, operation, unary function and reduction in one pass",
        _CHAIN_SEMANTICS,
        _OVERLAP_TRAPS,
    ),
    _reduce("vsum", 0x40, "tree_sum", "sum by the balanced tree; +0 if n = 0"),
    _reduce("vsumsq", 0x41, "tree_sum of x*x", "sum of squares, each square rounded; +0 if n = 0"),
    _reduce("vrmax", 0x42, "maximum", "largest element; -inf if n = 0"),
    Instruction(
        "vargmax",
        0x43,
        Unit.VECTOR,
        (_VDST, _VA, _N, _op("base", "added to the index")),
        "largest element and its index",
        """i = lowest index of the largest V[a + i], NaN as -inf with a flag (0 if n = 0)
V[dst] = V[a + i] as compared (-inf if n = 0);  bits(V[dst + 1]) = base + i;  dst even""",
        _VECTOR_TRAPS,
    ),
    # Memory ---------------------------------------------------------------------------------------------
    Instruction(
        "load",
        0x50,
        Unit.MEMORY,
        (_FORMAT, _REGION, _VDST, _LINE, _BYTE, _N),
        "contiguous elements from DDR to registers",
        "for i in 0 .. n-1: V[dst + i] = float32(memory[region][64*line + byte + i*size])",
        _VECTOR_TRAPS + _MEMORY_TRAPS,
    ),
    Instruction(
        "store",
        0x51,
        Unit.MEMORY,
        (
            _FORMAT,
            _REGION,
            _VA,
            _LINE,
            _BYTE,
            _op("outer", "outer count"),
            _op("inner", "inner count"),
            _op("outer_bytes", "bytes from one outer element to the next"),
            _op("inner_bytes", "bytes from one inner element to the next"),
        ),
        "registers to memory, strided, byte-enabled, rounded to the format (nearest even, saturating)",
        """for o in 0 .. outer-1, i in 0 .. inner-1:
    address = 64*line + byte + o*outer_bytes + i*inner_bytes
    memory[region][address] = round_to(format, V[a + o*inner + i])""",
        _VECTOR_TRAPS + _MEMORY_TRAPS,
    ),
    Instruction(
        "sload",
        0x52,
        Unit.MEMORY,
        (_REGION, _RD, _LINE, _BYTE),
        "32-bit word from DDR to a scalar register; issue waits",
        "R[rd] = memory[region][64*line + byte]",
        _MEMORY_TRAPS,
    ),
    Instruction(
        "sstore",
        0x53,
        Unit.MEMORY,
        (_REGION, _LINE, _BYTE, _op("value", "word stored")),
        "32-bit word to DDR",
        "memory[region][64*line + byte] = value",
        _MEMORY_TRAPS,
    ),
    # Matrix ---------------------------------------------------------------------------------------------
    Instruction(
        "matmul",
        0x60,
        Unit.MATRIX,
        _MATMUL_FIELDS,
        "vectors times a packed matrix streamed from HBM, with epilogue",
        _MATMUL_SEMANTICS,
        _OVERLAP_TRAPS + _MEMORY_TRAPS,
    ),
    # Ring -----------------------------------------------------------------------------------------------
    Instruction(
        "gather",
        0x70,
        Unit.RING,
        (_VDST, _VA, _N),
        "all-gather: every device's n words, in rank order, bit for bit",
        "for d in 0 .. devices-1, i in 0 .. n-1: V[dst + d*n + i] = device d's V[a + i]",
        (*_OVERLAP_TRAPS, Trap.RING_MISMATCH),
    ),
)

BY_NAME = {item.name: item for item in INSTRUCTIONS}
BY_OPCODE = {item.opcode: item for item in INSTRUCTIONS}
