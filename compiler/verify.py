"""The rules of the two forms of a module, beyond each operation's own; they are checked after every pass."""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.dialects.builtin import IndexType, ModuleOp, SymbolRefAttr, TensorType, f32
from xdsl.ir import Block, Operation
from xdsl.utils.exceptions import VerifyException

from typebar.compiler import ir
from typebar.compiler.problems import node_name
from typebar.isa.errors import TypebarError

_GRAPH_ONLY = (ir.AtenOp, ir.PositionsOp)
_WHOLE = (ir.GraphOp, ir.StepOp, ir.EncoderOp)
_FORMS: dict[type[Operation], str] = {ir.GraphOp: "graph", ir.StepOp: "step", ir.EncoderOp: "encoder"}


def verify(module: ModuleOp) -> None:
    """Check a module; raises TypebarError with the rule, and the operation that breaks it."""
    try:
        module.verify()
    except VerifyException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TypebarError(f"invalid module: {lines[-1] if lines else 'verification failed'}") from error
    ops = list(module.body.block.ops)
    forms = [_FORMS.get(type(op)) for op in ops]
    if forms not in (["graph"], ["graph", "graph"], ["step"], ["encoder", "step"]):
        raise TypebarError(
            "invalid module: it must hold one tb.graph or one tb.step, and before it the encoder's if there is one, "
            f"not {len(ops)} operations"
        )
    _verify_pair(ops)
    for op in ops:
        if isinstance(op, ir.GraphOp):
            for inner in op.body.block.ops:
                _reject_loops(inner)
        else:
            _verify_step(op.regions[0].block, op.name, inside=False)


def _verify_pair(ops: Sequence[Operation]) -> None:
    """An encoder stands before a decoder that takes a memory, and nowhere else."""
    last = ops[-1]
    takes = len(last.regions[0].block.args) > (1 if isinstance(last, ir.GraphOp) else 2)
    first = len(ops) == 2 and (isinstance(ops[0], ir.EncoderOp) or (isinstance(ops[0], ir.GraphOp) and ops[0].encoder))
    if takes != first or (isinstance(last, ir.GraphOp) and last.encoder):
        raise TypebarError("invalid module: an encoder stands before a decoder that takes a memory, and only there")


def _reject_loops(op: Operation) -> None:
    if isinstance(op, (ir.RepeatOp, ir.YieldOp, *_WHOLE)):
        raise TypebarError(f"invalid module: {op.name} may not stand in tb.graph")


def _verify_step(block: Block, whole: str, inside: bool) -> None:
    for op in block.ops:
        _verify_step_op(op, whole, inside)
        if isinstance(op, ir.RepeatOp):
            _verify_step(op.body.block, whole, inside=True)


def _verify_step_op(op: Operation, whole: str, inside: bool) -> None:
    name = node_name(op)
    where = "tb.repeat" if inside else whole
    if op.dialect_name() != "tb" or isinstance(op, (*_GRAPH_ONLY, *_WHOLE)):
        raise TypebarError(f"invalid module: {name}: {op.name} may not stand in {where}")
    if inside and isinstance(op, ir.RepeatOp):
        raise TypebarError(f"invalid module: {name}: tb.repeat may not stand in tb.repeat")
    for value in (*op.operands, *op.results):
        type = value.type
        flat = isinstance(type, TensorType) and type.element_type == f32 and type.get_num_dims() == 1
        if not flat and not (isinstance(op, ir.EmbeddingOp | ir.RotaryOp) and isinstance(type, IndexType)):
            raise TypebarError(f"invalid module: {name}: a step's values are flat float32 vectors, not {type}")
    decoder = whole == ir.StepOp.name
    if isinstance(op, ir.AttentionOp) and (op.mask is None or (decoder and op.mask.data == "none")):
        kinds = "a causal or window mask" if decoder else "a classified mask"
        raise TypebarError(f"invalid module: {name}: attention in {whole} needs {kinds}")
    if isinstance(op, ir.CrossAttentionOp) and not decoder:
        raise TypebarError(f"invalid module: {name}: cross-attention stands in a step only")
    for attribute in op.properties.values():
        if isinstance(attribute, SymbolRefAttr) and "{" in ir.text(attribute) and not inside:
            raise TypebarError(f"invalid module: {name}: {attribute} numbers layers outside tb.repeat")
