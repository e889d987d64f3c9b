"""The rules of the two forms of a module, beyond each operation's own; they are checked after every pass."""

from __future__ import annotations

from xdsl.dialects.builtin import IndexType, ModuleOp, SymbolRefAttr, TensorType, f32
from xdsl.ir import Block, Operation
from xdsl.utils.exceptions import VerifyException

from typebar.compiler import ir
from typebar.compiler.problems import node_name
from typebar.isa.errors import TypebarError

_GRAPH_ONLY = (ir.AtenOp, ir.ParameterOp, ir.PositionsOp)


def verify(module: ModuleOp) -> None:
    """Check a module; raises TypebarError with the rule, and the operation that breaks it."""
    try:
        module.verify()
    except VerifyException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TypebarError(f"invalid module: {lines[-1] if lines else 'verification failed'}") from error
    ops = list(module.body.block.ops)
    if len(ops) != 1 or not isinstance(ops[0], ir.GraphOp | ir.StepOp):
        raise TypebarError(f"invalid module: it must hold one tb.graph or one tb.step, not {len(ops)} operations")
    if isinstance(ops[0], ir.StepOp):
        _verify_step(ops[0].body.block, inside=False)
    else:
        for op in ops[0].body.block.ops:
            _reject_loops(op)


def _reject_loops(op: Operation) -> None:
    if isinstance(op, ir.RepeatOp | ir.StepOp | ir.GraphOp | ir.YieldOp):
        raise TypebarError(f"invalid module: {op.name} may not stand in tb.graph")


def _verify_step(block: Block, inside: bool) -> None:
    for op in block.ops:
        _verify_step_op(op, inside)
        if isinstance(op, ir.RepeatOp):
            _verify_step(op.body.block, inside=True)


def _verify_step_op(op: Operation, inside: bool) -> None:
    name = node_name(op)
    where = "tb.repeat" if inside else "tb.step"
    if op.dialect_name() != "tb" or isinstance(op, (*_GRAPH_ONLY, ir.GraphOp, ir.StepOp)):
        raise TypebarError(f"invalid module: {name}: {op.name} may not stand in {where}")
    if inside and isinstance(op, ir.RepeatOp):
        raise TypebarError(f"invalid module: {name}: tb.repeat may not stand in tb.repeat")
    for value in (*op.operands, *op.results):
        type = value.type
        flat = isinstance(type, TensorType) and type.element_type == f32 and type.get_num_dims() == 1
        if not flat and not (isinstance(op, ir.EmbeddingOp) and isinstance(type, IndexType)):
            raise TypebarError(f"invalid module: {name}: a step's values are flat float32 vectors, not {type}")
    if isinstance(op, ir.AttentionOp) and (op.mask is None or op.mask.data == "none"):
        raise TypebarError(f"invalid module: {name}: attention in a step needs a causal or window mask")
    for attribute in op.properties.values():
        if isinstance(attribute, SymbolRefAttr) and ir.LAYER in ir.text(attribute) and not inside:
            raise TypebarError(f"invalid module: {name}: {attribute} numbers layers outside tb.repeat")
