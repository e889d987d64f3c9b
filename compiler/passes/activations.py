"""Activations are known by what they compute: a chain of element-wise operations is run on a grid and compared."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional
from xdsl.dialects.builtin import TensorType
from xdsl.ir import Block, SSAValue
from xdsl.rewriter import Rewriter

from typebar.compiler import ir
from typebar.compiler.aten import Evaluator, NotEvaluable, base_name, words
from typebar.compiler.problems import keep_name

_ELEMENTWISE = words(
    """abs add clamp clamp_max clamp_min div erf exp gelu hardtanh maximum minimum mul neg pow reciprocal relu rsub
    sigmoid silu sqrt sub tanh"""
)
FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_erf": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
"""What each kind of `tb.activation` computes."""

# The grid covers both tails and the bend, in float64. Writings of one function differ by the rounding of their
# constants (1e-10 or so for sqrt(2/pi)); the two kinds of GELU differ by up to 5e-4: the tolerance tells them apart.
_GRID = torch.linspace(-12, 12, 385, dtype=torch.float64)
_TOLERANCE = 1e-7
_EXPECTED = {kind: function(_GRID) for kind, function in FUNCTIONS.items()}


def recognise_activations(block: Block, computed: set[SSAValue]) -> None:
    """Replace the longest chains that compute a known activation of one value by `tb.activation`.

    `computed` are the model's float values; new results join it. Repeats, because what follows an activation is a
    function of that only once it stands for itself.
    """
    while _recognise_once(block, computed):
        pass


def _recognise_once(block: Block, computed: set[SSAValue]) -> bool:
    found = False
    roots = _roots(block, computed)
    for op in reversed(list(block.ops)):
        if not isinstance(op, ir.AtenOp) or len(op.outs) != 1:
            continue
        out = op.outs[0]
        if not out.uses:
            if out in roots and roots[out] is not out:
                Rewriter.erase_op(op)
            continue
        root = roots.get(out, out)
        if root is out or root.type != out.type:
            continue
        kind = _kind(out, root)
        if kind is None:
            continue
        new = ir.ActivationOp(root, kind)
        keep_name(new, op)
        block.insert_op_before(new, op)
        out.replace_all_uses_with(new.out)
        computed.add(new.out)
        Rewriter.erase_op(op)
        found = True
    return found


def _roots(block: Block, computed: set[SSAValue]) -> dict[SSAValue, SSAValue]:
    """For every computed value the one value it is an element-wise function of: the farthest such, else itself."""
    roots: dict[SSAValue, SSAValue] = {}
    for op in block.ops:
        for out in op.results:
            if out not in computed:
                continue
            roots[out] = out
            if isinstance(op, ir.AtenOp) and base_name(op) in _ELEMENTWISE:
                inputs = {roots.get(v, v) for v in op.inputs if not _is_constant(v, computed)}
                if len(inputs) == 1:
                    roots[out] = inputs.pop()
    return roots


def _is_constant(value: SSAValue, computed: set[SSAValue]) -> bool:
    return value not in computed and isinstance(value.type, TensorType) and all(s == 1 for s in value.type.get_shape())


def _kind(value: SSAValue, root: SSAValue) -> str | None:
    try:
        result = Evaluator(1, given={root: _GRID})(value)
    except NotEvaluable:
        return None
    if not isinstance(result, torch.Tensor) or result.shape != _GRID.shape:
        return None
    for kind, expected in _EXPECTED.items():
        if torch.all((result.double() - expected).abs() <= _TOLERANCE * expected.abs().clamp(min=1)):
            return kind
    return None
