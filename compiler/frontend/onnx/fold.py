"""Constant folding: operations whose inputs are all constants, run by ONNX's own reference implementation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from onnx import NodeProto, helper
from onnx.reference import ReferenceEvaluator

from typebar.compiler.aten import words
from typebar.compiler.frontend.onnx.values import RefusalError, Value

_LIMIT = 1 << 22
"""No more elements than this come of one folded operation, and no more go in."""

_FOLDED = words(
    """Abs Add And Cast Ceil Clip Concat ConstantOfShape Cos CumSum Div Equal Erf Exp Expand Flatten Floor Gather
    GatherElements GatherND Greater GreaterOrEqual Identity IsNaN Less LessOrEqual Log MatMul Max Min Mod Mul Neg Not
    OneHot Or Pow Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Reshape Round ScatterND Shape
    Sigmoid Sign Sin Size Slice Softmax Split Sqrt Squeeze Sub Sum Tanh Tile Transpose Trilu Unsqueeze Where Xor
    NonZero TopK"""
)


def fold(node: NodeProto, inputs: Sequence[Value], opset: int) -> list[Value] | None:
    """The results, if every input is a constant; raises RefusalError if it fails or makes too much."""
    if node.op_type not in _FOLDED or not inputs or any(not isinstance(v, np.ndarray | None) for v in inputs):
        return None
    arrays = [v for v in inputs if isinstance(v, np.ndarray)]
    if not arrays or any(a.size > _LIMIT for a in arrays) or not _small(node, inputs):
        return None
    feeds = {name: v for name, v in zip(node.input, inputs, strict=True) if name and isinstance(v, np.ndarray)}
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    declared = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
    results = [name for name in node.output if name]
    outputs = [helper.make_tensor_value_info(name, 0, None) for name in results]
    graph = helper.make_graph([node], "fold", declared, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            made = ReferenceEvaluator(model).run(None, feeds)
    except Exception as error:  # the reference raises whatever numpy does
        line = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise RefusalError(f"{node.op_type} of constants fails: {line}", "mend the graph or export it again") from error
    by_name = dict(zip(results, made, strict=True))
    return [np.asarray(by_name[name]) if name else None for name in node.output]


def _small(node: NodeProto, inputs: Sequence[Value]) -> bool:
    """Whether an operation that enlarges its inputs stays within the limit."""
    arrays = [v if isinstance(v, np.ndarray) else np.zeros(0) for v in inputs]
    sizes = [a.reshape(-1) for a in arrays]
    count: float
    match node.op_type:
        case "ConstantOfShape":
            count = math.prod(int(v) for v in sizes[0])
        case "Expand" | "Tile":
            count = arrays[0].size * math.prod(max(int(v), 1) for v in sizes[1]) if len(sizes) > 1 else 0
        case "Range":
            start, limit, step = (float(s[0]) if s.size else 0.0 for s in sizes[:3])
            count = abs(limit - start) / abs(step) if step else math.inf
        case "OneHot":
            count = arrays[0].size * (int(sizes[1][0]) if sizes[1].size else 0)
        case _:
            shapes = [a.shape for a in arrays]
            rank = max(len(s) for s in shapes)
            count = math.prod(max((*[s[i - rank] for s in shapes if len(s) >= rank - i], 1)) for i in range(rank))
    return count <= _LIMIT
