"""Vector instructions that follow one another become one `vchain`: one pass instead of several, with the same bits.

An instruction joins the one before it if it reads all that this one writes, and either replaces it in place or
reduces it to a word. Then nothing else can see the values in between, whatever is read later. The order of a chain's
steps limits what can join: factor, operation, function, reduction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from typebar.isa.instructions import BY_NAME, Activation, Factor, Function, Operation, Reduction, Source, Unit
from typebar.isa.program import Operand, Value

_OPERATIONS = {"vadd": Operation.ADD, "vsub": Operation.SUB, "vmul": Operation.MUL, "vmax": Operation.MAX}
_REDUCTIONS = {"vsum": Reduction.SUM, "vsumsq": Reduction.SUMSQ, "vrmax": Reduction.MAX}
_ZERO = Operand()


@dataclass(frozen=True)
class Chain:
    """The steps of a vector instruction. `constant` is an immediate factor, the bits of a float32."""

    a: Operand
    n: Operand
    dst: Operand | None = None
    """Where elements are written, if they are."""
    factor: Operand | None = None
    """The word that is the factor."""
    constant: int | None = None
    operation: Operation = Operation.NONE
    b_from: Source = Source.VECTOR
    b: Operand = _ZERO
    imm: int = 0
    function: Activation = Activation.NONE
    reduction: Reduction = Reduction.NONE
    result: Operand = _ZERO

    @property
    def scaled(self) -> bool:
        """Whether there is a factor."""
        return self.factor is not None or self.constant is not None

    def values(self, register: int) -> dict[str, Value]:
        """The fields of the instruction; `register` holds the bits of an immediate factor."""
        found: dict[str, Value] = {"a": self.a, "n": self.n}
        if self.dst is not None:
            found |= {"write": 1, "dst": self.dst}
        if self.factor is not None:
            found |= {"scale_from": int(Factor.WORD), "scale": self.factor}
        elif self.constant is not None:
            found |= {"scale_from": int(Factor.VALUE), "scale": Operand(register)}
        if self.operation is not Operation.NONE:
            second: dict[str, Value] = {"imm": self.imm} if self.b_from is Source.IMMEDIATE else {"b": self.b}
            found |= {"operation": int(self.operation), "b_from": int(self.b_from)} | second
        if self.reduction is not Reduction.NONE:
            found |= {"reduce": int(self.reduction), "result": self.result}
        return found | ({"function": int(self.function)} if self.function is not Activation.NONE else {})


def chain_of(name: str, values: dict[str, Value]) -> Chain | None:
    """What an instruction does, if a chain can do it."""

    def operand(field: str) -> Operand:
        value = values.get(field, _ZERO)
        return value if isinstance(value, Operand) else Operand(0, value)

    def number(field: str) -> int:
        value = values.get(field, 0)
        assert isinstance(value, int)
        return value

    if name not in BY_NAME or BY_NAME[name].unit is not Unit.VECTOR or name in ("vmov", "vwrite", "vargmax", "vchain"):
        return None
    a, n, dst = operand("a"), operand("n"), operand("dst")
    if name in _REDUCTIONS:
        return Chain(a, n, reduction=_REDUCTIONS[name], result=dst)
    if name == "vunary":
        return Chain(a, n, dst, function=Activation[Function(number("function")).name])
    source = Source(number("b_from"))
    return Chain(a, n, dst, operation=_OPERATIONS[name], b_from=source, b=operand("b"), imm=number("imm"))


def joined(first: Chain, second: Chain) -> Chain | None:
    """One chain for two instructions that follow one another, if there is one."""
    if first.dst is None or first.n != second.n or first.reduction is not Reduction.NONE:
        return None
    if second.a != first.dst:
        second = _exchanged(second)
    if second.a != first.dst or second.scaled:
        return None
    if second.dst is None:
        return replace(first, reduction=second.reduction, result=second.result)
    if second.dst != first.dst or second.reduction is not Reduction.NONE or first.function is not Activation.NONE:
        return None
    if second.operation is Operation.NONE:
        return replace(first, function=second.function)
    if first.operation is not Operation.NONE:
        shifted = _factor(first)
        if shifted is None:
            return None
        first = shifted
    if not _apart(second, second.dst):
        return None
    return replace(first, operation=second.operation, b_from=second.b_from, b=second.b, imm=second.imm)


def _exchanged(chain: Chain) -> Chain:
    """The same with its two vectors the other way round, where that does not matter."""
    if chain.operation in (Operation.NONE, Operation.SUB) or chain.b_from is not Source.VECTOR:
        return chain
    return replace(chain, a=chain.b, b=chain.a)


def _factor(chain: Chain) -> Chain | None:
    """The same with its operation, a product with one number, as its factor."""
    if chain.operation is not Operation.MUL or chain.b_from is Source.VECTOR or chain.scaled:
        return None
    word = chain.b_from is Source.WORD
    return Chain(chain.a, chain.n, chain.dst, chain.b if word else None, None if word else chain.imm)


def _apart(chain: Chain, dst: Operand) -> bool:
    """Whether a chain's second operand surely has no word in common with what it writes at `dst`."""
    if chain.b_from is Source.IMMEDIATE:
        return True
    if chain.b.register != dst.register or chain.n.register:
        return False
    n = chain.n.immediate
    words = n if chain.b_from is Source.VECTOR else 1
    return chain.b.immediate >= dst.immediate + n or dst.immediate >= chain.b.immediate + words
