"""A loop over equal layers: the registers with each region's layer offset, and what layers hand on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from xdsl.ir import Operation, SSAValue

from typebar.compiler import ir
from typebar.compiler.emit.builder import R, reg
from typebar.compiler.emit.vectors import REGION_REGISTER, Emission
from typebar.compiler.memory import strides
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import Region


def layer_strides(e: Emission, loop: ir.RepeatOp) -> dict[Region, int]:
    """Lines from one layer to the next in the regions that a loop's body reads.

    Raises:
        TypebarError: tensors whose layers no one loop can follow.
    """
    steps = strides(loop.body.block, e.memory.places)
    for op in loop.walk():
        cache = e.memory.caches.get(op)
        if cache is not None and cache.layer_stride:
            steps[Region.KV] = cache.layer_stride
    return steps


def emit_loop(
    e: Emission,
    loop: ir.RepeatOp,
    steps: Mapping[Region, int],
    emit: Callable[[list[Operation]], None],
    copy: Callable[[SSAValue, SSAValue], None],
    ahead: Callable[[], None] = lambda: None,
) -> None:
    """The loop; `emit` emits the operations of its body, and `copy` a copy of a value to another's place.

    `steps` are the loop's `layer_strides`. `ahead` emits what depends only on the values handed on, when these are
    there: before the loop and at its end.

    Raises:
        TypebarError: a loop inside the loop.
    """
    build, body = e.build, loop.body.block
    for value, home in zip(loop.inits, loop.outs, strict=True):
        copy(value, home)
    ahead()
    for region in steps:
        build.constant(REGION_REGISTER[region], 0)
    build.constant(R.LAYER, 0)
    label = build.fresh("layer")
    build.label(label)
    e.in_loop = True
    inside, last = list(body.ops)[:-1], body.last_op
    assert isinstance(last, ir.YieldOp)
    if any(isinstance(op, ir.RepeatOp) for op in inside):
        raise TypebarError("a loop inside a loop has no form here: run reroll once only")
    emit(inside)
    for value, home in zip(last.values, loop.outs, strict=True):
        copy(value, home)
    ahead()
    e.in_loop = False
    for region, stride in steps.items():
        build.increase(REGION_REGISTER[region], stride)
    build.increase(R.LAYER, 1)
    build.branch("blt", label, reg(R.LAYER), loop.count.value.data)
