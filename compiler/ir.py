"""The `tb` dialect: a decoder's graph, and an encoder's if there is one, first as imported, then token by token.

A module holds one of two forms, and the passes of the front half lead from the first to the second. Of an
encoder-decoder pair the encoder stands first: `tb.graph` then `tb.graph`, later `tb.encoder` then `tb.step`.

`tb.graph` is the stateless graph over T tokens, as an exporter wrote it: `tb.aten` for operations not yet
recognised, `tb.parameter` for weights as values, and the recognised operations below on tensors that carry
batch and sequence axes, such as `tensor<1x?xDxf32>`; `?` is the number of tokens.

`tb.step` computes one token. Every value is the flat, row-major float32 vector of that token,
`tensor<Dxf32>`; weights are named by symbols; each `tb.attention` owns a K/V cache of the positions before
this one. Equal layers stand once, in `tb.repeat`, where `{}` in a symbol is the layer's number. `tb.encoder` computes
one position of the source text, whose attentions see all its positions; the step's third argument is the encoder's
result, and what depends on that alone is computed once a request for every position of the source text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from xdsl.context import Context
from xdsl.dialects.builtin import (
    DYNAMIC_INDEX,
    ArrayAttr,
    Builtin,
    DictionaryAttr,
    IndexType,
    IntegerAttr,
    StringAttr,
    SymbolRefAttr,
    TensorType,
    i64,
)
from xdsl.ir import Attribute, Block, Dialect, Region, SSAValue
from xdsl.irdl import (
    irdl_op_definition,
    opt_prop_def,
    prop_def,
    region_def,
    result_def,
    traits_def,
    var_operand_def,
    var_result_def,
)
from xdsl.traits import IsTerminator, Pure
from xdsl.utils.exceptions import VerifyException

from typebar.compiler.ir_attention import BIASES, MASKS, PAIRINGS, AttentionOp, CrossAttentionOp, RotaryOp
from typebar.compiler.ir_values import (
    ACTIVATIONS,
    FORMAT,
    LAYOUTS,
    ActivationOp,
    AddOp,
    EmbeddingOp,
    LayerNormOp,
    LinearOp,
    MulOp,
    RmsNormOp,
    ScaleOp,
    SliceOp,
    TbOp,
    number,
    operand_reference,
    real,
    require,
    symbol,
    text,
    vector,
    width,
)

__all__ = [
    "ACTIVATIONS",
    "BIASES",
    "LAYER",
    "LAYOUTS",
    "MASKS",
    "PAIRINGS",
    "TB",
    "ActivationOp",
    "AddOp",
    "AtenOp",
    "AttentionOp",
    "CrossAttentionOp",
    "EmbeddingOp",
    "EncoderOp",
    "GraphOp",
    "LayerNormOp",
    "LinearOp",
    "MulOp",
    "ParameterOp",
    "PositionsOp",
    "RepeatOp",
    "ReturnOp",
    "RmsNormOp",
    "RotaryOp",
    "ScaleOp",
    "SliceOp",
    "StepOp",
    "YieldOp",
    "context",
    "layer_name",
    "number",
    "operand_reference",
    "real",
    "symbol",
    "text",
    "vector",
    "width",
]

_REGION_FORMAT = "`(` operands `)` attr-dict-with-keyword $body `:` functional-type(operands, results)"

LAYER = "{}"
"""Stands for the layer's number, `start` + l, in a symbol inside `tb.repeat`."""
_STEPPED = re.compile(r"\{(\d+):(\d+)\}")
"""`{step:offset}` stands for step * l + offset: loops over several source layers at a time."""


def layer_name(template: str, start: int, layer: int) -> str:
    """The symbol that a template inside `tb.repeat` means in layer `layer` of 0, 1, ..., count - 1."""
    stepped = _STEPPED.sub(lambda m: str(int(m[1]) * layer + int(m[2])), template)
    return stepped.replace(LAYER, str(start + layer))


@irdl_op_definition
class GraphOp(TbOp):
    """A stateless graph: one block; its first argument is the token ids, tensor<1x?xi64>.

    A decoder returns logits; one with an encoder has a second argument, the memory, tensor<1x?xDxf32>, where `?` is the
    number of source positions. An encoder, `role` = encoder, returns the memory. `context` is the largest number
    of tokens the model declares.
    """

    name = "tb.graph"
    context = prop_def(IntegerAttr)
    role = opt_prop_def(StringAttr)
    body = region_def("single_block")
    assembly_format = "attr-dict-with-keyword $body"

    def __init__(self, context: int, body: Region, encoder: bool = False) -> None:
        """Make the operation from plain values."""
        role = StringAttr("encoder") if encoder else None
        super().__init__(properties={"context": number(context), "role": role}, regions=[body])

    @property
    def encoder(self) -> bool:
        """Whether it is an encoder's graph."""
        return self.role is not None

    def verify_(self) -> None:
        """Token ids and perhaps a memory as arguments, a positive context and a `tb.return` at the end."""
        require(self.context.value.data > 0, "tb.graph: context must be positive")
        require(self.role is None or self.role.data == "encoder", "tb.graph: role must be encoder or absent")
        most = 1 if self.encoder else 2
        require(
            1 <= len(self.body.block.args) <= most,
            "tb.graph takes the token ids and, as a decoder with an encoder, the memory",
        )
        _require_return(self.body.block)


class _Positional(TbOp):
    """What is computed for one position: an encoder or a step."""

    vocab = prop_def(IntegerAttr)
    context = prop_def(IntegerAttr)
    body = region_def("single_block")
    assembly_format = "attr-dict-with-keyword $body"

    def __init__(self, vocab: int, context: int, body: Region) -> None:
        """Make the operation from plain values."""
        super().__init__(properties={"vocab": number(vocab), "context": number(context)}, regions=[body])


@irdl_op_definition
class EncoderOp(_Positional):
    """One source position's computation: block arguments (token: index, position: index), returns the memory's vector.

    `context` is the largest number of source positions.
    """

    name = "tb.encoder"

    def verify_(self) -> None:
        """Two index arguments and one result."""
        _require_token_arguments(self.body.block, "tb.encoder", False)
        require(self.context.value.data > 0, "tb.encoder: context must be positive")
        require(len(_require_return(self.body.block).values) == 1, "tb.encoder returns one vector, the memory")


@irdl_op_definition
class StepOp(_Positional):
    """One token's computation: block arguments (token: index, position: index), returns the logits.

    With an encoder there is a third argument, the memory at one source position, tensor<Dxf32>. `context` is the number
    of positions the caches must hold; `vocab` the number of tokens.
    """

    name = "tb.step"

    def verify_(self) -> None:
        """Two index arguments, perhaps a memory, and one result of `vocab` logits."""
        block = self.body.block
        _require_token_arguments(block, "tb.step", True)
        require(self.context.value.data > 0, "tb.step: context must be positive")
        values = _require_return(block).values
        require(
            len(values) == 1 and values[0].type == vector(self.vocab.value.data),
            f"tb.step returns one vector of vocab = {self.vocab.value.data} logits",
        )


def _require_token_arguments(block: Block, what: str, memory: bool) -> None:
    types = [a.type for a in block.args]
    require(
        len(types) >= 2 and all(isinstance(t, IndexType) for t in types[:2]),
        f"{what} takes two index arguments, token and position",
    )
    given = len(types) == 3 and memory and isinstance(types[2], TensorType) and types[2].get_num_dims() == 1
    require(len(types) == 2 or given, f"{what}: only a memory, one vector, may follow token and position in a step")


@irdl_op_definition
class ReturnOp(TbOp):
    """Ends a graph or a step with its logits."""

    name = "tb.return"
    values = var_operand_def(TensorType)
    traits = traits_def(IsTerminator())
    assembly_format = "`(` $values `)` attr-dict `:` type($values)"

    def __init__(self, *values: SSAValue) -> None:
        """Make the operation from plain values."""
        super().__init__(operands=[values])


@irdl_op_definition
class YieldOp(TbOp):
    """Ends the body of `tb.repeat`: the values that the next layer, or the code after the loop, receives."""

    name = "tb.yield"
    values = var_operand_def(TensorType)
    traits = traits_def(IsTerminator())
    assembly_format = "`(` $values `)` attr-dict `:` type($values)"

    def __init__(self, *values: SSAValue) -> None:
        """Make the operation from plain values."""
        super().__init__(operands=[values])


def _require_return(block: Block) -> ReturnOp:
    last = block.last_op
    if not isinstance(last, ReturnOp):
        raise VerifyException("the last operation must be tb.return")
    return last


@irdl_op_definition
class RepeatOp(TbOp):
    """`count` equal layers in a row; layer l of 0..count-1 reads the symbols that `layer_name` makes of its templates.

    Operands are the first layer's block arguments; each layer's yielded values are the next one's arguments,
    and the last layer's are the results. Every layer has its own K/V caches.
    """

    name = "tb.repeat"
    inits = var_operand_def(TensorType)
    outs = var_result_def(TensorType)
    count = prop_def(IntegerAttr)
    start = prop_def(IntegerAttr)
    body = region_def("single_block")
    assembly_format = _REGION_FORMAT

    def __init__(self, inits: Sequence[SSAValue], count: int, start: int, body: Region) -> None:
        """Make the operation from plain values."""
        super().__init__(
            operands=[inits],
            result_types=[[value.type for value in inits]],
            properties={"count": number(count), "start": number(start)},
            regions=[body],
        )

    def verify_(self) -> None:
        """Operands, block arguments, yielded values and results agree in number and type."""
        require(self.count.value.data > 0, "tb.repeat: count must be positive")
        require(self.start.value.data >= 0, "tb.repeat: start must not be negative")
        last = self.body.block.last_op
        if not isinstance(last, YieldOp):
            raise VerifyException("tb.repeat: the last operation must be tb.yield")
        types = [value.type for value in self.inits]
        for what, values in (
            ("block arguments", self.body.block.args),
            ("yielded values", last.values),
            ("results", self.outs),
        ):
            require(
                [value.type for value in values] == types,
                f"tb.repeat: {what} must have the operands' types",
            )


@irdl_op_definition
class AtenOp(TbOp):
    """An imported torch operation: `target` is its name, such as aten.view.default.

    `args` and `kwargs` are the call's arguments in order: "%n" is operand n, other strings are dtypes
    ("torch.bool"), unit is None, arrays are lists. Results are the call's tensors; a symbolic size is an
    `index`. Operators on sizes have targets such as sym.add. `symbolic` says which result axis has a size
    that is an expression other than the number of tokens.
    """

    name = "tb.aten"
    inputs = var_operand_def()
    outs = var_result_def()
    target = prop_def(StringAttr)
    args = prop_def(ArrayAttr)
    kwargs = opt_prop_def(DictionaryAttr)
    symbolic = opt_prop_def(StringAttr)
    traits = traits_def(Pure())
    assembly_format = FORMAT

    def __init__(
        self,
        target: str,
        inputs: Sequence[SSAValue],
        args: Sequence[Attribute],
        kwargs: dict[str, Attribute],
        types: Sequence[Attribute],
        symbolic: str | None = None,
    ) -> None:
        """Make the operation from plain values."""
        super().__init__(
            operands=[inputs],
            result_types=[types],
            properties={
                "target": StringAttr(target),
                "args": ArrayAttr(args),
                "kwargs": DictionaryAttr(kwargs) if kwargs else None,
                "symbolic": StringAttr(symbolic) if symbolic else None,
            },
        )

    def verify_(self) -> None:
        """Every operand is used by an argument, and every argument's operand exists."""
        used = set[int]()
        _operand_numbers(self.args, used)
        if self.kwargs is not None:
            _operand_numbers(self.kwargs, used)
        require(
            used == set(range(len(self.inputs))),
            f"tb.aten {self.target.data}: arguments name operands {sorted(used)} of {len(self.inputs)}",
        )


def _operand_numbers(attribute: Attribute, found: set[int]) -> None:
    match attribute:
        case StringAttr(data=text) if text.startswith("%"):
            require(text[1:].isdecimal(), f"tb.aten: {text!r} names no operand")
            found.add(int(text[1:]))
        case ArrayAttr():
            for item in attribute:
                _operand_numbers(item, found)
        case DictionaryAttr():
            for item in attribute.data.values():
                _operand_numbers(item, found)
        case _:
            pass


@irdl_op_definition
class ParameterOp(TbOp):
    """A source parameter or buffer as a value; in a step or an encoder one vector, tensor<Dxf32>."""

    name = "tb.parameter"
    out = result_def(TensorType)
    source = prop_def(SymbolRefAttr)
    traits = traits_def(Pure())
    assembly_format = "attr-dict `:` type($out)"

    def __init__(self, source: str, type: TensorType[Attribute]) -> None:
        """Make the operation from plain values."""
        super().__init__(result_types=[type], properties={"source": symbol(source)})


@irdl_op_definition
class PositionsOp(TbOp):
    """The positions 0, 1, ..., T-1 of the tokens, tensor<?xi64>; only in `tb.graph`."""

    name = "tb.positions"
    out = result_def(TensorType)
    traits = traits_def(Pure())
    assembly_format = "attr-dict `:` type($out)"

    def __init__(self) -> None:
        """Make the operation from plain values."""
        super().__init__(result_types=[TensorType(i64, [DYNAMIC_INDEX])])


TB = Dialect(
    "tb",
    [
        ActivationOp,
        AddOp,
        AtenOp,
        AttentionOp,
        CrossAttentionOp,
        EmbeddingOp,
        EncoderOp,
        GraphOp,
        LayerNormOp,
        LinearOp,
        MulOp,
        ParameterOp,
        PositionsOp,
        RepeatOp,
        ReturnOp,
        RmsNormOp,
        RotaryOp,
        ScaleOp,
        SliceOp,
        StepOp,
        YieldOp,
    ],
    [],
)


def context() -> Context:
    """A parsing context that knows the builtin and `tb` dialects, and nothing else."""
    made = Context()
    made.load_dialect(Builtin)
    made.load_dialect(TB)
    return made
