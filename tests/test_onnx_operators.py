"""Each ONNX operator in a graph of its own, against onnxruntime: values at a length that no graph was traced for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from typebar.compiler.frontend.onnx.module import OnnxModule

WIDTH, ROWS = 16, 11
Arrays = dict[str, np.ndarray]


def table(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def graph(nodes: Sequence[onnx.NodeProto], arrays: Arrays, path: Path, opset: int = 20, out: str = "out") -> Path:
    """A model of token ids, whose rows of `table` are the value `x` [1, T, WIDTH]."""
    arrays = {"table": table(ROWS, WIDTH), **arrays}
    first = helper.make_node("Gather", ["table", "input_ids"], ["x"])
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "T"])
    result = helper.make_tensor_value_info(out, TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    made = helper.make_graph([first, *nodes], "test", [ids], [result], tensors)
    sets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(made, opset_imports=sets, ir_version=10), path)
    return path


def node(kind: str, inputs: str, outputs: str = "out", domain: str = "", **attributes: Any) -> onnx.NodeProto:
    names = ["" if name == "_" else name for name in inputs.split()]
    return helper.make_node(kind, names, outputs.split(), domain=domain, **attributes)


def same_as_onnxruntime(path: Path, tolerance: float = 2e-6) -> None:
    """Traced for any length and run at 6 and 9 tokens, the graph gives what onnxruntime gives."""
    module = OnnxModule(path)
    exported = module.exported()
    assert exported.program is not None
    options = onnxruntime.SessionOptions()  # its optimiser quantises activations beside dequantised weights
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options)
    for ids in (np.array([[3, 1, 4, 1, 5, 9]]), np.array([[2, 7, 1, 8, 2, 8, 1, 8, 2]])):
        expected = session.run(None, {"input_ids": ids})[0]
        real = module.real_parameters()
        found = torch.func.functional_call(module, real, (torch.from_numpy(ids),)).numpy()
        assert found.shape[1:] == expected.shape[-2:]
        scale = max(1.0, float(np.abs(expected).max()))
        assert np.abs(found.reshape(expected.shape) - expected).max() <= tolerance * scale


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


W = {"w": table(WIDTH, WIDTH, seed=1), "v": table(WIDTH, seed=2), "b": table(WIDTH, seed=3)}
MS = "com.microsoft"


def squares() -> list[onnx.NodeProto]:
    """Heads [1, 4, T, 4] of x, as q."""
    return [node("Reshape", "x split4", "h"), node("Transpose", "h", "q", perm=[0, 2, 1, 3])]


def back(source: str = "y") -> list[onnx.NodeProto]:
    return [node("Transpose", source, "t", perm=[0, 2, 1, 3]), node("Reshape", "t joined")]


SPLIT = {"split4": ints(1, -1, 4, 4), "joined": ints(1, -1, 16)}

SIMPLE: dict[str, tuple[list[onnx.NodeProto], Arrays]] = {
    **{kind: ([node(kind, "x v")], W) for kind in ("Add", "Sub", "Mul", "Div", "Min", "Max")},
    **{
        kind: ([node(kind, "x")], {})
        for kind in [
            "Neg",
            "Abs",
            "Exp",
            "Sin",
            "Cos",
            "Tanh",
            "Erf",
            "Relu",
            "Sigmoid",
            "Softplus",
            "Gelu",
            "Floor",
            "Ceil",
            "Sign",
            "Elu",
            "LeakyRelu",
            "HardSwish",
            "Mish",
            "Selu",
            "Softmax",
            "LogSoftmax",
        ]
    },
    "Identity": ([node("Identity", "x")], {}),
    "Dropout": ([node("Dropout", "x")], {}),
    "Pow": ([node("Pow", "x three")], {"three": np.float32(3.0)}),
    "Sqrt": ([node("Exp", "x", "e"), node("Sqrt", "e")], {}),
    "Log": ([node("Exp", "x", "e"), node("Log", "e")], {}),
    "Reciprocal": ([node("Exp", "x", "e"), node("Reciprocal", "e")], {}),
    "reciprocal root": ([node("Exp", "x", "e"), node("Sqrt", "e", "s"), node("Reciprocal", "s")], {}),
    "Mod": ([node("Mod", "x two", fmod=1)], {"two": np.float32(2.0)}),
    "Clip": ([node("Clip", "x low high")], {"low": np.float32(-0.5), "high": np.float32(0.75)}),
    "Gelu tanh": ([node("Gelu", "x", approximate="tanh")], {}),
    "Sum": ([node("Sum", "x v x")], W),
    "Where": ([node("Greater", "x v", "c"), node("Where", "c x zero")], {**W, "zero": np.float32(0.0)}),
    "logic": (
        [
            node("Greater", "x v", "a"),
            node("LessOrEqual", "x b", "d"),
            node("Or", "a d", "o"),
            node("Not", "d", "n"),
            node("And", "o n", "r"),
            node("Xor", "r a", "z"),
            node("Cast", "z", to=TensorProto.FLOAT),
        ],
        W,
    ),
    "ReduceMean": ([node("ReduceMean", "x last", "m"), node("Sub", "x m")], {"last": ints(-1)}),
    "ReduceSum": ([node("ReduceSum", "x last", "m"), node("Sub", "x m")], {"last": ints(-1)}),
    "ReduceMax": ([node("ReduceMax", "x last", "m"), node("Sub", "x m")], {"last": ints(2)}),
    "ReduceMin": ([node("ReduceMin", "x last", "m"), node("Sub", "x m")], {"last": ints(2)}),
    "ReduceL2": ([node("ReduceL2", "x last", "m"), node("Div", "x m")], {"last": ints(2)}),
    "MatMul": ([node("MatMul", "x w")], W),
    "Gemm": (
        [node("Reshape", "x rows", "r"), node("Gemm", "r w b", "g", transB=1), node("Reshape", "g joined")],
        {**W, "rows": ints(-1, 16), "joined": ints(1, -1, 16)},
    ),
    "Gemm with factors": (
        [node("Reshape", "x rows", "r"), node("Gemm", "r w b", "g", alpha=0.5, beta=2.0), node("Reshape", "g joined")],
        {**W, "rows": ints(-1, 16), "joined": ints(1, -1, 16)},
    ),
    "Einsum": ([node("Einsum", "x w", equation="btd,de->bte")], W),
    "Einsum transposed": ([node("Einsum", "x w", equation="btd,ed->bte")], W),
    "LayerNormalization": ([node("LayerNormalization", "x v b", epsilon=1e-3)], W),
    "LayerNormalization alone": ([node("LayerNormalization", "x v")], W),
    "layer norm written out": (
        [
            node("ReduceMean", "x last", "m"),
            node("Sub", "x m", "d"),
            node("Mul", "d d", "s"),
            node("ReduceMean", "s last", "var"),
            node("Add", "var eps", "e"),
            node("Sqrt", "e", "r"),
            node("Div", "d r", "n"),
            node("Mul", "n v", "y"),
            node("Add", "y b"),
        ],
        {**W, "last": ints(-1), "eps": np.float32(1e-5)},
    ),
    "rms norm written out": (
        [
            node("Mul", "x x", "s"),
            node("ReduceMean", "s last", "var"),
            node("Add", "var eps", "e"),
            node("Sqrt", "e", "r"),
            node("Div", "x r", "n"),
            node("Mul", "v n"),
        ],
        {**W, "last": ints(-1), "eps": np.float32(1e-5)},
    ),
    "Slice": (
        [node("Slice", "x a e last", "s"), node("Concat", "s s", axis=-1)],
        {"a": ints(8), "e": ints(2**62), "last": ints(2)},
    ),
    "Slice in steps": (
        [node("Slice", "x a e last two", "s"), node("Concat", "s s", axis=-1)],
        {"a": ints(1), "e": ints(16), "last": ints(2), "two": ints(2)},
    ),
    "Split": ([node("Split", "x", "p q", axis=2, num_outputs=2), node("Concat", "q p", axis=2)], {}),
    "Split by sizes": ([node("Split", "x n", "p q", axis=-1), node("Concat", "q p", axis=2)], {"n": ints(5, 11)}),
    "Unsqueeze": ([node("Unsqueeze", "x one", "u"), node("Squeeze", "u one")], {"one": ints(1)}),
    "Flatten": ([node("Flatten", "x", "f", axis=2), node("Reshape", "f joined")], {"joined": ints(1, -1, 16)}),
    "heads": ([*squares(), node("Transpose", "q", "t", perm=[0, 2, 1, 3]), node("Reshape", "t joined")], SPLIT),
    "keys turned by reshaping": (
        [
            *squares(),
            node("Shape", "q", "whole"),
            node("Slice", "whole m2 m1", "length"),
            node("Concat", "minus length four", "flat", axis=0),
            node("Reshape", "q flat", "j"),
            node("Transpose", "j", "turned", perm=[0, 2, 1]),
            node("Concat", "one four four length", "target", axis=0),
            node("Reshape", "turned target", "k"),
            node("MatMul", "q k", "s"),
            node("Softmax", "s", "p"),
            node("MatMul", "p q", "y"),
            *back(),
        ],
        {**SPLIT, "m2": ints(-2), "m1": ints(-1), "minus": ints(-1), "four": ints(4), "one": ints(1)},
    ),
    "factors on both operands": (
        [
            *squares(),
            node("Transpose", "h", "k", perm=[0, 2, 3, 1]),
            node("Mul", "q root", "qs"),
            node("Mul", "k root", "ks"),
            node("MatMul", "qs ks", "s"),
            node("Softmax", "s", "p", axis=-1),
            node("IsNaN", "p", "nan"),
            node("Where", "nan zero p", "safe"),
            node("MatMul", "safe q", "y"),
            *back(),
        ],
        {**SPLIT, "root": np.float32(0.5**0.5), "zero": np.float32(0.0)},
    ),
    "repeated heads": (
        [
            *squares(),
            node("Unsqueeze", "q two", "u"),
            node("Shape", "x", "s"),
            node("Gather", "s one", "n"),
            node("Unsqueeze", "n nought", "n1"),
            node("Concat", "ones n1 four", "target", axis=0),
            node("Expand", "u target", "e"),
            node("ReduceMean", "e two", "y", keepdims=0),
            *back(),
        ],
        {**SPLIT, "two": ints(2), "one": np.int64(1), "nought": ints(0), "ones": ints(1, 4, 3), "four": ints(4)},
    ),
    "positions": (
        [
            node("Shape", "x", "s"),
            node("Gather", "s one", "n"),
            node("Range", "zero n one", "r"),
            node("Gather", "places r", "p"),
            node("Add", "x p"),
        ],
        {"one": np.int64(1), "zero": np.int64(0), "places": table(32, WIDTH, seed=5)},
    ),
    "causal mask": (
        [
            *squares(),
            node("Transpose", "h", "k", perm=[0, 2, 3, 1]),
            node("MatMul", "q k", "s"),
            node("Shape", "s", "shape", start=2),
            node("ConstantOfShape", "shape", "ones", value=helper.make_tensor("v", TensorProto.FLOAT, [1], [-1e9])),
            node("Trilu", "ones step", "mask", upper=1),
            node("Add", "s mask", "m"),
            node("Softmax", "m", "p"),
            node("MatMul", "p q", "y"),
            *back(),
        ],
        {**SPLIT, "step": np.int64(1)},
    ),
    "CumSum, GatherND, ScatterND": (
        [
            node("Shape", "x", "s", start=1, end=2),
            node("ConstantOfShape", "s", "ones", value=helper.make_tensor("v", TensorProto.INT64, [1], [1])),
            node("CumSum", "ones nought", "places"),
            node("Unsqueeze", "places last", "index"),
            node("GatherND", "places32 index", "p"),
            node("Mul", "p p", "pp"),
            node("ScatterND", "places32 index pp", "changed"),
            node("GatherND", "changed index", "again"),
            node("Add", "x again"),
        ],
        {"nought": np.int64(0), "last": ints(-1), "places32": table(32, WIDTH, seed=5)},
    ),
    "GatherElements": (
        [node("Shape", "x", "s"), node("Expand", "pick s", "e"), node("GatherElements", "x e", axis=2)],
        {"pick": ints(*range(15, -1, -1)).reshape(1, 1, 16)},
    ),
    "Tile": ([node("Tile", "x n")], {"n": ints(1, 1, 2)}),
    "Pad": ([node("Pad", "x n")], {"n": ints(0, 0, 1, 0, 0, 2)}),
    **{kind: ([node(kind, "x b", domain=MS)], W) for kind in ("FastGelu", "BiasGelu")},
    "QuickGelu": ([node("QuickGelu", "x", domain=MS, alpha=1.5)], {}),
    "Gelu of onnxruntime": ([node("Gelu", "x", domain=MS)], {}),
    "FusedMatMul": ([node("FusedMatMul", "x w", domain=MS, transB=1, alpha=0.25)], W),
    "SkipLayerNormalization": (
        [node("SkipLayerNormalization", "x x v b b", "n _ _ sum", domain=MS), node("Add", "n sum")],
        W,
    ),
    "SkipSimplifiedLayerNormalization": (
        [node("SkipSimplifiedLayerNormalization", "x x v b", domain=MS, epsilon=1e-6)],
        W,
    ),
    "SimplifiedLayerNormalization": ([node("SimplifiedLayerNormalization", "x v", epsilon=1e-6)], W),
}


@pytest.mark.parametrize("name", SIMPLE)
def test_operator(name: str, tmp_path: Path) -> None:
    nodes, arrays = SIMPLE[name]
    for made in nodes:
        for i, output in enumerate(made.output):
            made.output[i] = "" if output == "_" else output
    same_as_onnxruntime(graph(nodes, arrays, tmp_path / "m.onnx"))


QKV = {"wq": table(16, 16, seed=6), "wk": table(16, 8, seed=7), "wv": table(16, 8, seed=8)}
PROJECTED = [node("MatMul", "x wq", "q"), node("MatMul", "x wk", "k"), node("MatMul", "x wv", "v")]
ANGLES = np.outer(np.arange(32), 1.0 / 100.0 ** (np.arange(2) / 2)).astype(np.float32)
TABLES = {"cos": np.cos(ANGLES), "sin": np.sin(ANGLES)}


@pytest.mark.parametrize("causal", [0, 1])
def test_standard_attention(tmp_path: Path, causal: int) -> None:
    attention = node("Attention", "q k v", q_num_heads=4, kv_num_heads=2, is_causal=causal)
    same_as_onnxruntime(graph([*PROJECTED, attention], QKV, tmp_path / "m.onnx", opset=23), 1e-5)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_standard_rotary(tmp_path: Path, interleaved: int) -> None:
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s one", "n"),
        node("Range", "zero n one", "r"),
        node("Unsqueeze", "r nought", "positions"),
        node("RotaryEmbedding", "x cos sin positions", num_heads=4, interleaved=interleaved),
    ]
    arrays = {**TABLES, "one": np.int64(1), "zero": np.int64(0), "nought": ints(0)}
    same_as_onnxruntime(graph(nodes, arrays, tmp_path / "m.onnx", opset=23), 1e-5)


def test_rms_normalization(tmp_path: Path) -> None:
    same_as_onnxruntime(graph([node("RMSNormalization", "x v")], W, tmp_path / "m.onnx", opset=23))


@pytest.mark.parametrize("window", [-1, 3])
@pytest.mark.parametrize("rotated", [0, 1])
def test_group_query_attention(tmp_path: Path, window: int, rotated: int) -> None:
    nodes = [
        *PROJECTED,
        node("Shape", "x", "s"),
        node("Gather", "s one", "n"),
        node("Cast", "n", "total", to=TensorProto.INT32),
        node("Sub", "n one", "last"),
        node("Reshape", "last flat", "last1"),
        node("Cast", "last1", "lengths", to=TensorProto.INT32),
        node(
            "GroupQueryAttention",
            "q k v past past lengths total cos sin" if rotated else "q k v past past lengths total",
            "out pk pv",
            domain=MS,
            num_heads=2,
            kv_num_heads=1,
            do_rotary=rotated,
            local_window_size=window,
        ),
    ]
    angles = np.outer(np.arange(32), 1.0 / 100.0 ** (np.arange(8) / 8)).astype(np.float32)
    weights = {"wq": table(16, 32, seed=6), "wk": table(16, 16, seed=7), "wv": table(16, 16, seed=8)}
    arrays = {**weights, "cos": np.cos(angles), "sin": np.sin(angles), "one": np.int64(1), "flat": ints(1)}
    arrays["past"] = np.zeros((1, 1, 0, 16), np.float32)
    same_as_onnxruntime(graph(nodes, arrays, tmp_path / "m.onnx"), 1e-5)


def test_multi_head_attention(tmp_path: Path) -> None:
    nodes = [
        *[node("MatMul", f"x w{i}", f"p{i}") for i in range(3)],
        node("MultiHeadAttention", "p0 p1 p2 bias", domain=MS, num_heads=4),
    ]
    arrays = {f"w{i}": table(16, 16, seed=i) for i in range(3)} | {"bias": table(48, seed=9)}
    same_as_onnxruntime(graph(nodes, arrays, tmp_path / "m.onnx"), 1e-5)


@pytest.mark.parametrize("causal", [0, 1])
def test_packed_attention(tmp_path: Path, causal: int) -> None:
    made = node("Attention", "x w b", domain=MS, num_heads=4, unidirectional=causal)
    arrays = {"w": table(16, 48, seed=1), "b": table(48, seed=2)}
    same_as_onnxruntime(graph([made], arrays, tmp_path / "m.onnx"), 1e-5)


def test_rotary_of_onnxruntime(tmp_path: Path) -> None:
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s one", "n"),
        node("Range", "zero n one", "r"),
        node("Unsqueeze", "r nought", "positions"),
        node("RotaryEmbedding", "x positions cos sin", domain=MS, num_heads=4),
    ]
    arrays = {**TABLES, "one": np.int64(1), "zero": np.int64(0), "nought": ints(0)}
    same_as_onnxruntime(graph(nodes, arrays, tmp_path / "m.onnx"), 1e-5)


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("transposed", [0, 1])
def test_dequantised_weights(tmp_path: Path, kind: type, axis: int | None, transposed: int) -> None:
    """One scale or several, along either axis of a square matrix, used as it is or transposed, with zero points."""
    generator = np.random.default_rng(4)
    info = np.iinfo(kind)
    stored = generator.integers(info.min + 20, info.max - 20, (16, 16)).astype(kind)
    count = () if axis is None else (16,)
    arrays = {
        "stored": stored,
        "scale": generator.uniform(0.01, 0.1, count).astype(np.float32),
        "zero": (generator.integers(-9, 9, count) + (128 if kind is np.uint8 else 0)).astype(kind),
        "rows": ints(-1, 16),
        "joined": ints(1, -1, 16),
    }
    nodes = [
        node("DequantizeLinear", "stored scale zero", "w", **({} if axis is None else {"axis": axis})),
        node("Reshape", "x rows", "r"),
        node("Gemm", "r w", "g", transB=transposed),
        node("Reshape", "g joined"),
    ]
    path = graph(nodes, arrays, tmp_path / "m.onnx")
    same_as_onnxruntime(path, 1e-5)
    module = OnnxModule(path)
    module.exported()
    kept = [w for w in module.named_weights().values() if w.name.endswith(".int8")]
    assert bool(kept) == (axis is None or axis != transposed)


def test_a_condition_known_beforehand_takes_one_branch(tmp_path: Path) -> None:
    then, other = (
        helper.make_graph([node(kind, "x v", kind)], kind, [], [helper.make_tensor_value_info(kind, 1, None)])
        for kind in ("Add", "Mul")
    )
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s nought", "batch"),
        node("Equal", "batch two", "c"),
        helper.make_node("If", ["c"], ["out"], then_branch=then, else_branch=other),
    ]
    same_as_onnxruntime(graph(nodes, {**W, "nought": np.int64(0), "two": np.int64(2)}, tmp_path / "m.onnx"))


def test_a_function_of_the_models_own_is_written_out(tmp_path: Path) -> None:
    path = graph([node("Twice", "x", domain="own")], {}, tmp_path / "m.onnx")
    model = onnx.load(path)
    twice = helper.make_function("own", "Twice", ["a"], ["c"], [node("Add", "a a", "c")], [helper.make_opsetid("", 20)])
    model.functions.append(twice)
    model.opset_import.append(helper.make_opsetid("own", 1))
    onnx.save(model, path)
    same_as_onnxruntime(path)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_other_precisions_are_computed_in_float32(tmp_path: Path, kind: int) -> None:
    path = graph([node("Cast", "w", "wide", to=TensorProto.FLOAT), node("MatMul", "x wide")], W, tmp_path / "m.onnx")
    model = onnx.load(path)
    weight = next(t for t in model.graph.initializer if t.name == "w")
    weight.CopyFrom(helper.make_tensor("w", kind, [16, 16], W["w"].reshape(-1)))
    onnx.save(model, path)
    same_as_onnxruntime(path)
