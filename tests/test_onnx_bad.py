"""Malformed and unsupported ONNX models: each ends in one clear line, and nothing outside its folder is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from typebar.compiler.frontend import load_model
from typebar.compiler.frontend.onnx.module import OnnxModule
from typebar.compiler.problems import LoweringError
from typebar.isa.errors import TypebarError

WIDTH, VOCAB = 8, 13


def node(kind: str, inputs: str, outputs: str, domain: str = "", **attributes: Any) -> NodeProto:
    return helper.make_node(
        kind, inputs.split(), outputs.split(), name=f"the_{outputs.split()[0]}", domain=domain, **attributes
    )


def tensor(name: str, *shape: int) -> TensorProto:
    values = np.random.default_rng(len(name)).normal(size=shape).astype(np.float32)
    return numpy_helper.from_array(values, name)


def good() -> ModelProto:
    """An embedding, a projection, an activation, a head."""
    nodes = [
        node("Gather", "table input_ids", "x"),
        node("MatMul", "x w", "h"),
        node("Relu", "h", "a"),
        node("MatMul", "a head", "logits"),
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    tensors = [tensor("table", VOCAB, WIDTH), tensor("w", WIDTH, WIDTH), tensor("head", WIDTH, VOCAB)]
    graph = helper.make_graph(nodes, "test", [ids], [out], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def load(model: ModelProto | bytes, folder: Path) -> None:
    path = folder / "m.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    load_model(path, {"context": 16})


def stored(model: ModelProto, name: str) -> TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def changed(model: ModelProto, name: str, made: NodeProto | list[NodeProto], *more: TensorProto) -> ModelProto:
    """The model with the node that makes `name` replaced."""
    nodes = list(model.graph.node)
    place = next(i for i, n in enumerate(nodes) if name in n.output)
    nodes[place : place + 1] = made if isinstance(made, list) else [made]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(more)
    return model


def external(model: ModelProto, **entries: object) -> ModelProto:
    """The weight `w` outside the file."""
    weight = stored(model, "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        entry = weight.external_data.add()
        entry.key, entry.value = key, str(value)
    return model


def without(model: ModelProto, name: str) -> ModelProto:
    model.graph.initializer.remove(stored(model, name))
    return model


def retyped(model: ModelProto, kind: int) -> ModelProto:
    model.graph.input[0].type.tensor_type.elem_type = kind
    return model


def more_inputs(model: ModelProto, name: str, kind: int, shape: list[Any]) -> ModelProto:
    model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
    return changed(model, "a", [node("Relu", "h", "a0"), node("Cast", f"{name}", "c", to=1), node("Add", "a0 c", "a")])


def loop(kind: str) -> NodeProto:
    body = helper.make_graph([node("Identity", "h", "zz")], "body", [], [helper.make_tensor_value_info("zz", 1, None)])
    return node(kind, "h", "a", body=body)


def by_data() -> list[NodeProto]:
    inner = [
        helper.make_graph([node(k, "h", k)], k, [], [helper.make_tensor_value_info(k, 1, None)])
        for k in ("Relu", "Tanh")
    ]
    return [
        node("ReduceSum", "h", "s", keepdims=0),
        node("Cast", "s", "c", to=TensorProto.BOOL),
        node("If", "c", "a", then_branch=inner[0], else_branch=inner[1]),
    ]


def typed(model: ModelProto, name: str, kind: int) -> ModelProto:
    stored(model, name).data_type = kind
    return model


def dims(model: ModelProto, name: str, *shape: int) -> ModelProto:
    weight = stored(model, name)
    del weight.dims[:]
    weight.dims.extend(shape)
    return model


def opset(model: ModelProto, version: int) -> ModelProto:
    model.opset_import[0].version = version
    return model


def doubled(model: ModelProto, name: str) -> ModelProto:
    model.graph.initializer.append(stored(model, name))
    return model


def renamed_output(model: ModelProto, name: str) -> ModelProto:
    model.graph.output[0].name = name
    return model


def sparse(model: ModelProto) -> ModelProto:
    weight = model.graph.sparse_initializer.add()
    weight.values.CopyFrom(tensor("sparse", 1))
    return model


def recursive(model: ModelProto) -> ModelProto:
    made = helper.make_function(
        "own", "Again", ["p"], ["r"], [node("Again", "p", "r", "own")], [helper.make_opsetid("own", 1)]
    )
    model.functions.append(made)
    model.opset_import.append(helper.make_opsetid("own", 1))
    return changed(model, "a", node("Again", "h", "a", "own"))


def five(*values: float) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), "five")


BAD: dict[str, tuple[Callable[[], ModelProto | bytes], str]] = {
    "empty file": (lambda: b"", "holds no ONNX graph; export"),
    "no protobuf": (lambda: b"\x0a\xff\xff\xff\xff", "cannot read .*m.onnx as ONNX: .*; export"),
    "text": (lambda: b"hello, this is no model", "cannot read .*m.onnx as ONNX|holds no ONNX graph"),
    "truncated": (lambda: good().SerializeToString()[:-200], "cannot read .*m.onnx as ONNX"),
    "no nodes": (lambda: renamed_output(good(), "nothing"), "nothing: it is a result that no operation makes"),
    "missing initialiser": (lambda: without(good(), "w"), "the_h: it reads 'w', which no input, initialiser or"),
    "initialiser twice": (lambda: doubled(good(), "w"), "w: two initialisers have this name"),
    "result twice": (
        lambda: changed(good(), "a", [node("Relu", "h", "a"), node("Tanh", "h", "a")]),
        "'a' is made twice",
    ),
    "result over an initialiser": (lambda: changed(good(), "h", node("MatMul", "x w", "w")), "'w' is made twice"),
    "cycle": (lambda: changed(good(), "h", node("Add", "a w", "h")), "it is part of a cycle through"),
    "reads itself": (lambda: changed(good(), "h", node("Add", "h w", "h")), "it is part of a cycle through 'h'"),
    "unknown operator": (lambda: changed(good(), "a", node("Frobnicate", "h", "a")), "operator Frobnicate is not supp"),
    "unknown domain": (
        lambda: changed(good(), "a", node("Relu", "h", "a", "acme.ai")),
        r"operator acme\.ai\.Relu is not",
    ),
    "loop": (lambda: changed(good(), "a", loop("Loop")), "the_a: Loop is control flow; export the model without loops"),
    "scan": (lambda: changed(good(), "a", loop("Scan")), "the_a: Scan is control flow"),
    "branch by data": (lambda: changed(good(), "a", by_data()), "control flow that depends on the tokens; export the"),
    "data-dependent shape": (
        lambda: changed(good(), "a", [node("NonZero", "h", "n"), node("Cast", "n", "a", to=1)]),
        "the shape of NonZero depends on the tokens' values",
    ),
    "shape by data": (
        lambda: changed(good(), "a", [node("Cast", "h", "s", to=7), node("Reshape", "h s", "a")]),
        "input 1 of Reshape, a size or an index, depends on the tokens' values",
    ),
    "float token ids": (lambda: retyped(good(), TensorProto.FLOAT), "'input_ids' must be int64 or int32; name them"),
    "string token ids": (lambda: retyped(good(), TensorProto.STRING), "'input_ids' must be int64 or int32"),
    "embeddings as input": (
        lambda: more_inputs(good(), "inputs_embeds", TensorProto.FLOAT, [1, "n", WIDTH]),
        r"inputs_embeds: it is an input \[1xnx8\] of unknown meaning",
    ),
    "cache of fixed length": (
        lambda: more_inputs(good(), "past_key_values.0.key", TensorProto.FLOAT, [1, 2, 5, 4]),
        r"its cache has the fixed shape \[1, 2, 5, 4\]; export it without past",
    ),
    "complex weights": (lambda: typed(good(), "w", TensorProto.COMPLEX64), "'w' has elements of type complex64; use"),
    "float8 weights": (
        lambda: typed(good(), "w", TensorProto.FLOAT8E4M3FN),
        "elements of type float8e4m3fn; use float",
    ),
    "unknown type": (lambda: typed(good(), "w", 99), "'w' has elements of type number 99"),
    "wrong dtype": (lambda: typed(good(), "w", TensorProto.DOUBLE), r"'w' has 256 bytes for \[8, 8\], not 512"),
    "too little data": (lambda: dims(good(), "w", 8, 9), r"'w' has 256 bytes for \[8, 9\], not 288"),
    "negative size": (lambda: dims(good(), "w", -8, 8), r"'w' declares the shape \[-8, 8\]"),
    "huge size": (lambda: dims(good(), "w", 2**40, 2**40), "'w' declares the shape"),
    "shapes that do not match": (lambda: dims(good(), "w", 4, 16), "the_h: MatMul fails: "),
    "too many axes": (
        lambda: changed(good(), "a", node("Unsqueeze", "h five", "a"), five(9)),
        r"axes \[9\] do not fit 3 axes",
    ),
    "reshape to another size": (
        lambda: changed(good(), "a", node("Reshape", "h five", "a"), five(1, 5)),
        "the_a: Reshape fails",
    ),
    "huge expansion": (
        lambda: changed(good(), "a", node("Expand", "h five", "a"), five(2**40, 1, 1, 1)),
        "it makes a tensor of .*; no model needs that",
    ),
    "huge constant": (
        lambda: changed(
            good(), "a", [node("ConstantOfShape", "five", "c"), node("Add", "h c", "a")], five(2**20, 2**20)
        ),
        "it makes a tensor of",
    ),
    "huge range": (
        lambda: changed(
            good(),
            "a",
            [node("Range", "o five o", "r"), node("Cast", "r", "c", to=1), node("Add", "h c", "a")],
            numpy_helper.from_array(np.int64(1), "o"),
            numpy_helper.from_array(np.int64(2**60), "five"),
        ),
        "the_a|the_r",
    ),
    "wrong attribute type": (
        lambda: changed(good(), "a", node("Softmax", "h", "a", axis=1.5)),
        "attribute 'axis' has the wrong type",
    ),
    "missing input": (lambda: changed(good(), "a", node("Add", "h", "a")), "Add lacks its input 1"),
    "fractional index": (
        lambda: changed(good(), "a", node("Gather", "w h", "a")),
        "its indices are floating point; index with whole numbers",
    ),
    "training": (
        lambda: changed(
            good(),
            "a",
            node("Dropout", "h r t", "a"),
            numpy_helper.from_array(np.float32(0.5), "r"),
            numpy_helper.from_array(np.array(True), "t"),
        ),
        "it drops values out as in training",
    ),
    "backwards": (
        lambda: changed(good(), "a", node("CumSum", "h five", "a", reverse=1), five(1)),
        "it sums exclusively or backwards",
    ),
    "sparse weights": (lambda: sparse(good()), "sparse initialisers: they are not supported; store"),
    "old operator set": (lambda: opset(good(), 3), "has operator set 3; sets 7 to"),
    "future operator set": (lambda: opset(good(), 9999), "has operator set 9999; sets 7 to"),
    "recursive function": (lambda: recursive(good()), "functions cannot be written out|is not supported"),
    "logits of four axes": (
        lambda: changed(
            good(), "logits", [node("MatMul", "a head", "l"), node("Unsqueeze", "l five", "logits")], five(0)
        ),
        r"output 'logits' is .*, not logits \[1, T, V\]",
    ),
    "logits that are indices": (
        lambda: changed(good(), "logits", [node("MatMul", "a head", "l"), node("Cast", "l", "logits", to=7)]),
        r"output 'logits' is .*, not logits",
    ),
    "unquantised product": (
        lambda: changed(good(), "a", [node("MatMulInteger", "h w", "i"), node("Cast", "i", "a", to=1)]),
        "it is no product of a quantised activation and a quantised weight",
    ),
    "absolute path": (
        lambda: external(good(), location="/etc/passwd"),
        "'/etc/passwd', outside the model's folder; put",
    ),
    "path traversal": (lambda: external(good(), location="../outside.bin"), "outside the model's folder"),
    "hidden traversal": (lambda: external(good(), location="a/../../outside.bin"), "outside the model's folder"),
    "backslashes": (lambda: external(good(), location="..\\outside.bin"), "outside the model's folder"),
    "drive": (lambda: external(good(), location="C:\\outside.bin"), "outside the model's folder"),
    "link outside": (lambda: external(good(), location="link.bin"), "outside the model's folder"),
    "folder as data": (lambda: external(good(), location="."), "which is not there; copy it too"),
    "no such data": (lambda: external(good(), location="absent.bin"), "'absent.bin', which is not there; copy it too"),
    "no location": (lambda: external(good()), "'w' names no file for its data"),
    "huge offset": (
        lambda: external(good(), location="data.bin", offset=2**62 // 100),
        "of data.bin, which has 300; copy",
    ),
    "offset past the end": (
        lambda: external(good(), location="data.bin", offset=100),
        "needs bytes 100 to 356 of data.bin",
    ),
    "negative offset": (
        lambda: external(good(), location="data.bin", offset=-4),
        "the offset '-4' in its data; it must",
    ),
    "endless offset": (lambda: external(good(), location="data.bin", offset="9" * 40), "the offset '9+' in its data"),
    "wrong length": (lambda: external(good(), location="data.bin", length=8), r"has 8 bytes of data for \[8, 8\]"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "model"
    inside.mkdir()
    (tmp_path / "outside.bin").write_bytes(bytes(4096))
    (inside / "link.bin").symlink_to(tmp_path / "outside.bin")
    (inside / "data.bin").write_bytes(bytes(300))
    return inside


def test_the_good_model_is_good(folder: Path) -> None:
    load(good(), folder)
    load(external(good(), location="data.bin", offset=44, length=256), folder)


@pytest.mark.parametrize("what", BAD)
def test_one_clear_line(what: str, folder: Path) -> None:
    make, message = BAD[what]
    with pytest.raises(TypebarError, match=message) as caught:
        load(make(), folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_there_are_thirty() -> None:
    assert len(BAD) >= 30


def test_everything_unsupported_is_reported_at_once(folder: Path) -> None:
    made = changed(good(), "h", node("Frobnicate", "x w", "h"))
    made = changed(made, "a", [node("Glorp", "h", "g"), node("Blurt", "x", "b"), node("Add", "g b", "a")])
    with pytest.raises(LoweringError) as caught:
        load(made, folder)
    assert [p.node for p in caught.value.items] == ["the_h", "the_g", "the_b"]
    assert all("is not supported" in p.reason and p.remedy for p in caught.value.items)


def opened_outside(folder: Path, log: list[str]) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook's body that notes every file opened under the folder's parent but not in the folder."""
    parent, inside = str(folder.parent.resolve()), str(folder.resolve())

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if path.startswith(parent) and not path.startswith(inside):
                log.append(path)

    return note


def test_damaged_files_are_read_or_refused(folder: Path) -> None:
    """Bytes flipped, files cut: success or one line, and no file outside the folder is opened."""
    import sys

    log: list[str] = []
    active = [True]
    note = opened_outside(folder, log)
    sys.addaudithook(lambda event, arguments: note(event, arguments) if active[0] else None)
    whole = external(good(), location="data.bin", offset=44).SerializeToString()
    (folder / "m.onnx").write_bytes(whole)
    generator = np.random.default_rng(5)
    refused = 0
    for trial in range(400):
        data = bytearray(whole)
        if trial % 8 == 0:
            del data[int(generator.integers(1, len(data))) :]
        for _ in range(int(generator.integers(1, 4))):
            data[int(generator.integers(len(data)))] = int(generator.integers(256))
        (folder / "m.onnx").write_bytes(bytes(data))
        try:
            OnnxModule(folder / "m.onnx")._rehearse()
        except TypebarError as error:
            refused += 1
            assert "\n" not in str(error)
    active[0] = False
    assert 50 < refused < 400
    assert not log
