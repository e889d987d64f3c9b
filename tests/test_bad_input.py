"""Bad input of every kind: one clear line, a non-zero exit status, and no file left behind."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from typebar.host.api import compile
from typebar.host.cli import main
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image
from typebar.models import find

FRONT = Path(__file__).parent / "compiler" / "front"
STEP, GRAPH = FRONT / "gpt2_step.mlir", FRONT / "mask_causal.mlir"
TOKENIZER = find("folio-draft").path / "tokenizer.json"
CONFIG = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 32,
    "n_head": 2,
    "n_layer": 1,
    "n_positions": 64,
    "vocab_size": 4096,
}


@dataclass
class Work:
    """Good input to spoil: an empty folder of this case's own, a small checkpoint, and an image of it."""

    folder: Path
    image: Path
    checkpoint: Path

    def copy(self) -> Path:
        """A copy of the image."""
        return Path(shutil.copy(self.image, self.folder / "copy.safetensors"))

    def model(self) -> Path:
        """A copy of the checkpoint."""
        return Path(shutil.copytree(self.checkpoint, self.folder / "model"))

    def file(self, name: str, text: str) -> str:
        """A text file."""
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return str(path)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("good")
    image, checkpoint = folder / "good.safetensors", folder / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(CONFIG))
    shutil.copy(TOKENIZER, checkpoint)
    save_file(weights(), checkpoint / "model.safetensors")
    assert main(["compile", str(checkpoint), "-o", str(image), "--machine", "tiny", "--devices", "2", "--json"]) == 0
    return Work(folder, image, checkpoint)


@pytest.fixture
def work(good: Work, tmp_path: Path) -> Work:
    return Work(tmp_path, good.image, good.checkpoint)


def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"wte.weight": (4096, 32), "wpe.weight": (64, 32), "ln_f.weight": (32,), "ln_f.bias": (32,)}
    layer = {
        "ln_1.weight": (32,), "ln_1.bias": (32,), "ln_2.weight": (32,), "ln_2.bias": (32,),
        "attn.c_attn.weight": (32, 96), "attn.c_attn.bias": (96,), "attn.c_proj.weight": (32, 32),
        "attn.c_proj.bias": (32,), "mlp.c_fc.weight": (32, 128), "mlp.c_fc.bias": (128,),
        "mlp.c_proj.weight": (128, 32), "mlp.c_proj.bias": (32,),
    }  # fmt: skip
    shapes |= {f"h.0.{name}": shape for name, shape in layer.items()}
    return {f"transformer.{n}": random.normal(0, 0.1, s).astype(np.float32) for n, s in shapes.items()}


# Ways to spoil ------------------------------------------------------------------------------------------
def flip(path: Path, tensor: str) -> str:
    """Invert one byte in the middle of a tensor of an image."""
    raw = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    first, last = json.loads(raw[8:start])[tensor]["data_offsets"]
    raw[start + (first + last) // 2] ^= 0xFF
    path.write_bytes(raw)
    return str(path)


def edit_manifest(path: Path, old: str, new: str) -> str:
    """Replace text in an image's manifest, and its checksum in the header; lengths stay."""
    assert len(old) == len(new)
    raw = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = raw[8:start]
    entries = json.loads(header)
    first, last = (start + offset for offset in entries["manifest"]["data_offsets"])
    manifest = bytes(raw[first:last])
    changed = manifest.replace(old.encode(), new.encode(), 1)
    assert changed != manifest
    raw[first:last] = changed
    digest = entries["__metadata__"]["manifest_sha256"].encode()
    raw[8:start] = header.replace(digest, hashlib.sha256(changed).hexdigest().encode())
    path.write_bytes(raw)
    return str(path)


def spoil_weights(work: Work, change: Callable[[dict[str, np.ndarray]], Any]) -> list[str]:
    """`compile` of the checkpoint with changed weights."""
    model = work.model()
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")
    return compiling(work, model)


def put(tensors: dict[str, np.ndarray], value: float) -> None:
    tensors["transformer.h.0.mlp.c_fc.weight"][3, 5] = value


def compiling(work: Work, model: Path | str, *extra: str) -> list[str]:
    return ["compile", str(model), "-o", str(work.folder / "out.safetensors"), *extra]


def running(work: Work, *extra: str, prompt: str = "Now is") -> list[str]:
    return ["run", str(work.image), "--prompt", prompt, "--device", "torch", *extra]


def simulating(work: Work, *extra: str) -> list[str]:
    return ["simulate", str(work.image), "--prompt-tokens", "2", "--new-tokens", "2", *extra]


def machine_file(work: Work, old: str, new: str, shape: str = "gpt2") -> list[str]:
    """`simulate` on a changed machine file."""
    text = (Path(__file__).parent.parent / "isa" / "machines" / "tiny.toml").read_text()
    assert old in text
    return ["simulate", "--shape", shape, "--machine", work.file("own.toml", text.replace(old, new, 1))]


def truncated(path: Path, keep: int) -> str:
    os.truncate(path, keep)
    return str(path)


def overwritten(path: Path, offset: int, data: bytes) -> str:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
    return str(path)


def configured(work: Work, text: str) -> list[str]:
    """`compile` of the checkpoint with another config.json."""
    model = work.model()
    (model / "config.json").write_text(text)
    return compiling(work, model)


def without(work: Work, name: str) -> list[str]:
    """`compile` of the checkpoint without one of its files."""
    model = work.model()
    (model / name).unlink()
    return compiling(work, model)


def tokenized(work: Work, text: str) -> list[str]:
    """`compile` of the checkpoint with another tokenizer.json."""
    model = work.model()
    (model / "tokenizer.json").write_text(text)
    return compiling(work, model)


def compiling_over(work: Work, name: str, link: str | None = None) -> list[str]:
    """`compile` of the checkpoint onto one of its own files, perhaps by a link to it."""
    model = work.model()
    out = model / name
    if link is not None:
        (work.folder / link).symlink_to(out)
        out = work.folder / link
    return ["compile", str(model), "-o", str(out)]


Case = tuple[Callable[[Work], list[str]], str]
IMAGES: dict[str, Case] = {
    "missing image": (lambda w: ["run", str(w.folder / "none"), "--prompt", "a"], "No such file"),
    "directory as image": (lambda w: ["disasm", str(w.folder)], "no regular file"),
    "empty image": (lambda w: ["disasm", w.file("empty", "")], "0 bytes"),
    "text as image": (lambda w: ["disasm", w.file("text", "Now is the winter of our discontent")], "header"),
    "truncated image": (lambda w: ["disasm", truncated(w.copy(), 100_000)], "has 100000 bytes"),
    "header length": (lambda w: ["disasm", overwritten(w.copy(), 0, b"\xff" * 8)], "header"),
    "header not JSON": (lambda w: ["disasm", overwritten(w.copy(), 8, b"!")], "not valid JSON"),
    "another safetensors file": (lambda w: ["disasm", str(w.checkpoint / "model.safetensors")], "no Typebar image"),
    "flipped bit in program": (lambda w: ["disasm", flip(w.copy(), "program")], "checksum of 'program'"),
    "flipped bit in manifest": (lambda w: ["disasm", flip(w.copy(), "manifest")], "checksum of 'manifest'"),
    "flipped bit in graph": (lambda w: ["disasm", flip(w.copy(), "graph")], "checksum of 'graph'"),
    "flipped bit in tokenizer": (lambda w: ["disasm", flip(w.copy(), "tokenizer")], "checksum of 'tokenizer'"),
    "flipped bit in weights": (
        lambda w: ["run", flip(w.copy(), "params.transformer.wte.weight"), "--prompt", "a"],
        "checksum of 'params.transformer.wte.weight'",
    ),
    "other format version": (
        lambda w: ["disasm", edit_manifest(w.copy(), '"format_version":1', '"format_version":9')],
        "format version 9",
    ),
    "other ISA version": (
        lambda w: ["disasm", edit_manifest(w.copy(), '"isa_version":1', '"isa_version":7')],
        "isa version 7",
    ),
    "other numerics version": (
        lambda w: ["disasm", edit_manifest(w.copy(), '"numerics_version":3', '"numerics_version":2')],
        "numerics version 2",
    ),
    "impossible device count": (
        lambda w: ["disasm", edit_manifest(w.copy(), '"devices":2', '"devices":0')],
        "devices must be",
    ),
    "wrong machine": (lambda w: simulating(w, "--machine", "u280"), "compiled for machine 'tiny', not 'u280'"),
    "wrong number of devices": (lambda w: simulating(w, "--devices", "3"), "2 devices, not 3"),
    "contract parameter changed": (lambda w: simulating(w, "--set", "matrix.lanes=16"), "matrix.lanes 8 (not 16)"),
}
MACHINES: dict[str, Case] = {
    "unknown machine": (lambda w: compiling(w, w.checkpoint, "--machine", "u9000"), "unknown machine 'u9000'"),
    "missing machine file": (lambda w: compiling(w, w.checkpoint, "--machine", "no.toml"), "does not exist"),
    "machine file not TOML": (lambda w: machine_file(w, "[matrix]", "[matrix"), "is not TOML"),
    "machine parameter missing": (lambda w: machine_file(w, "clock_mhz", "#"), "clock_mhz is missing"),
    "machine parameter of wrong type": (lambda w: machine_file(w, "lanes = 8", 'lanes = "8"'), "must be an integer"),
    "machine parameter unknown": (lambda w: machine_file(w, "lanes = 8", "lanes = 8\nwings = 2"), "matrix.wings"),
    "machine rule broken": (lambda w: machine_file(w, "attention_block = 64", "attention_block = 65"), "must be"),
    "unknown setting": (lambda w: simulating(w, "--set", "hbm.colour=1"), "unknown machine parameter 'hbm.colour'"),
    "setting out of range": (lambda w: simulating(w, "--set", "hbm.latency=0"), "outside 1 to 4096"),
    "setting not a number": (lambda w: simulating(w, "--set", "hbm.latency=fast"), "must be an integer"),
    "setting without value": (lambda w: simulating(w, "--set", "hbm.latency"), "KEY=VALUE"),
    "setting given twice": (lambda w: simulating(w, "--set", "clock_mhz=1", "--set", "clock_mhz=2"), "twice"),
    "no devices": (lambda w: compiling(w, w.checkpoint, "--devices", "0"), "1 to 64 devices, not 0"),
    "too many devices": (lambda w: compiling(w, w.checkpoint, "--devices", "65"), "1 to 64 devices, not 65"),
    "model too large for the machine": (
        lambda w: machine_file(w, "capacity_bytes = 67108864", "capacity_bytes = 65536", str(w.checkpoint)),
        "hbm.capacity_bytes",
    ),
}
CHECKPOINTS: dict[str, Case] = {
    "unknown model": (lambda w: compiling(w, "fabula"), "no model 'fabula'"),
    "missing checkpoint": (lambda w: compiling(w, w.folder / "gone"), "no model"),
    "encoder without its decoder": (
        lambda w: compiling(w, Path(w.file("encoder.onnx", "")).parent),
        "has encoder.onnx but no decoder.onnx; an encoder-decoder needs both",
    ),
    "end outside the vocabulary": (
        lambda w: compiling(w, w.checkpoint, "--eos", "7", "--eos", "4096"),
        "--eos = 4096 is outside the vocabulary of 4096 tokens: give 0 to 4095, or -1",
    ),
    "source text of a decoder": (
        lambda w: compiling(w, w.checkpoint, "--source-context", "8"),
        "--source-context = 8 is for models with an encoder, and this one has none",
    ),
    "decoder's start without an encoder": (
        lambda w: ["check", str(w.checkpoint), "--decoder-start", "0"],
        "--decoder-start = 0 is for models with an encoder, and this one has none",
    ),
    "context of no tokens": (lambda w: compiling(w, w.checkpoint, "--context", "0"), "'--context': must be greater"),
    "file as checkpoint": (lambda w: compiling(w, w.file("model.txt", "")), "no model"),
    "shape as model": (lambda w: compiling(w, "gpt2"), "without weights"),
    "no config.json": (lambda w: without(w, "config.json"), "no config.json"),
    "no weights": (lambda w: without(w, "model.safetensors"), "no model.safetensors"),
    "broken config.json": (lambda w: configured(w, "{"), "cannot read"),
    "config.json with a value of the wrong type": (
        lambda w: configured(w, json.dumps(CONFIG | {"n_embd": "x"})),
        "config.json: Field 'n_embd' expected int, got str (value: 'x')",
    ),
    "config.json of no decoder": (lambda w: configured(w, '{"model_type": "nothing"}'), "cannot read"),
    "config.json of another size": (lambda w: configured(w, json.dumps(CONFIG | {"n_embd": 64})), "must agree"),
    "config.json of more layers": (lambda w: configured(w, json.dumps(CONFIG | {"n_layer": 2})), "lacks 12 parameters"),
    "config.json of no layers": (lambda w: configured(w, json.dumps(CONFIG | {"n_layer": 0})), "gives 0 layers"),
    "weights that config.json leaves unused": (
        lambda w: spoil_weights(w, lambda t: t.update({"transformer.h.1.ln_1.bias": np.zeros(32, np.float32)})),
        "'transformer.h.1.ln_1.bias'",
    ),
    "tokenizer.json of no tokenizer": (lambda w: tokenized(w, "{}"), "valid tokenizer.json"),
    "empty tokenizer.json": (lambda w: tokenized(w, ""), "valid tokenizer.json"),
    "weights truncated": (
        lambda w: compiling(w, Path(truncated((m := w.model()) / "model.safetensors", 5000)) and m),
        "cannot read weights",
    ),
    "weight missing": (
        lambda w: spoil_weights(w, lambda t: t.pop("transformer.wpe.weight")),
        "'transformer.wpe.weight'",
    ),
    "weight of another shape": (
        lambda w: spoil_weights(w, lambda t: t.update({"transformer.ln_f.bias": np.zeros(31, np.float32)})),
        "[31]",
    ),
    "NaN in a weight": (lambda w: spoil_weights(w, lambda t: put(t, np.nan)), "NaN"),
    "infinity in a weight": (lambda w: spoil_weights(w, lambda t: put(t, np.inf)), "infinit"),
    "weight too large for fp16": (lambda w: spoil_weights(w, lambda t: put(t, 70000.0)), "fp16"),
    "weights format": (lambda w: compiling(w, w.checkpoint, "--weights", "fp4"), "fp4"),
}
TEXTS: dict[str, Case] = {
    "unknown pass": (lambda w: ["opt", w.file("a.mlir", "builtin.module {}"), "-p", "polish"], "no pass 'polish'"),
    "passes with an empty name": (lambda w: ["opt", w.file("a.mlir", ""), "-p", "reroll,,reroll"], "empty name"),
    "passes with an open brace": (lambda w: ["opt", w.file("a.mlir", ""), "-p", "reroll{a=1"], "braces"),
    "unknown option of a pass": (lambda w: ["opt", w.file("a.mlir", ""), "-p", "partition{gizmo=3}"], "gizmo"),
    "option of a pass out of range": (
        lambda w: ["opt", w.file("a.mlir", ""), "-p", "partition{devices=0}"],
        "devices must be at least 1",
    ),
    "pass option that is no number": (lambda w: ["opt", w.file("a.mlir", ""), "-p", "partition{devices=x}"], "int"),
    "pass that does not parse": (lambda w: ["opt", w.file("a.mlir", ""), "-p", "par?tition"], "par?tition"),
    "IR that does not parse": (lambda w: ["opt", w.file("a.mlir", "builtin.module {")], "syntax error"),
    "IR with an unknown op": (
        lambda w: ["opt", w.file("a.mlir", 'builtin.module { "tb.sing"() : () -> () }')],
        "tb.sing",
    ),
    "IR without a graph": (lambda w: ["opt", w.file("a.mlir", "builtin.module {}")], "invalid module"),
    "partition without a step": (
        lambda w: ["opt", w.file("a.mlir", GRAPH.read_text().partition("// -----")[0]), "-p", "partition"],
        "pass 'partition' needs a tb.step, and the module has none: run 'make-incremental' first",
    ),
    "fuse without a program": (
        lambda w: ["opt", w.file("a.mlir", STEP.read_text()), "-p", "fuse"],
        "pass 'fuse' needs a tbd.program, and the module has none: run 'partition' first",
    ),
    "allocate without a program": (
        lambda w: ["opt", w.file("a.mlir", STEP.read_text()), "-p", "allocate"],
        "pass 'allocate' needs a tbd.program",
    ),
    "partition twice": (
        lambda w: ["opt", w.file("a.mlir", STEP.read_text()), "-p", "partition,partition"],
        "needs a tb.step",
    ),
    "assembly without instructions": (lambda w: ["asm", w.file("a.s", "; none\n")], "has no instructions"),
    "weights that are not the image's": (lambda w: simulating(w, "--weights", "bf16"), "has fp16 weights, not bf16"),
    "IR file missing": (lambda w: ["opt", str(w.folder / "none.mlir")], "cannot be read"),
    "IR file not text": (lambda w: ["opt", overwritten(Path(w.file("a", "xxxx")), 0, b"\xff\xfe")], "not UTF-8"),
    "unknown instruction": (lambda w: ["asm", w.file("a.s", "halt\nfly\n")], "line 2: unknown instruction 'fly'"),
    "unknown field": (lambda w: ["asm", w.file("a.s", "sli rd=r3 colour=4\n")], "no field 'colour=4'"),
    "field out of range": (lambda w: ["asm", w.file("a.s", "vsum dst=1048576 a=0 n=1\n")], "outside"),
    "register out of range": (lambda w: ["asm", w.file("a.s", "sli rd=r77 value=4\n")], "rd"),
    "undefined label": (lambda w: ["asm", w.file("a.s", "bne to=there a=r3\n")], "'there' is not defined"),
    "label defined twice": (lambda w: ["asm", w.file("a.s", "a:\na:\nhalt\n")], "defined twice"),
    "assembly into a directory": (
        lambda w: ["asm", w.file("a.s", "halt\n"), "-o", str(w.folder)],
        "is a directory",
    ),
}
REQUESTS: dict[str, Case] = {
    "empty prompt": (lambda w: running(w, prompt=""), "prompt is empty"),
    "no prompt": (lambda w: ["run", str(w.image)], "run takes one of --prompt"),
    "too long a prompt": (lambda w: running(w, prompt="word " * 400), "context of 64"),
    "too many new tokens": (lambda w: running(w, "--max-new-tokens", "64"), "--max-new-tokens = 64 exceed"),
    "no new tokens": (lambda w: running(w, "--max-new-tokens", "0"), "at least 1, not 0"),
    "new tokens not a number": (
        lambda w: running(w, "--max-new-tokens", "many"),
        "'--max-new-tokens': must be a valid integer, not 'many'",
    ),
    "unknown token": (lambda w: ["run", str(w.image), "--prompt-ids", "5,4096"], "token 4096 is outside"),
    "negative token": (lambda w: ["run", str(w.image), "--prompt-ids=-1"], "token -1 is outside"),
    "token not a number": (lambda w: ["run", str(w.image), "--prompt-ids", "5,x"], "no token ids"),
    "prompt not Unicode": (lambda w: running(w, prompt="a\udcff"), "Unicode"),
    "temperature": (lambda w: running(w, "--do-sample", "--temperature", "0"), "--temperature must be"),
    "temperature not finite": (lambda w: running(w, "--do-sample", "--temperature", "nan"), "--temperature must be"),
    "top_p": (lambda w: running(w, "--do-sample", "--top-p", "1.5"), "--top-p must be"),
    "top_k": (lambda w: running(w, "--do-sample", "--top-k", "0"), "--top-k must be"),
    "seed": (lambda w: running(w, "--do-sample", "--seed", "-1"), "--seed must be"),
    "top_k without sampling": (
        lambda w: running(w, "--top-k", "5"),
        "--top-k and --top-p act only when sampling: give --do-sample,",
    ),
    "unknown device": (
        lambda w: ["run", str(w.image), "--prompt", "a", "--device", "abacus"],
        "'--device': 'abacus' is not one of",
    ),
    "unknown shape": (lambda w: ["simulate", "--shape", "gpt9"], "gpt9"),
    "image and shape": (lambda w: simulating(w, "--shape", "gpt2"), "exactly one"),
    "neither image nor shape": (lambda w: ["simulate"], "exactly one"),
    "report of nothing": (lambda w: ["report"], "exactly one"),
    "report of two": (lambda w: ["report", str(w.image), "--shape", "gpt2"], "exactly one"),
    "report of no shape": (lambda w: ["report", "--shape", "gpt9", "-o", str(w.folder / "x.html")], "gpt9"),
    "report of no file": (lambda w: ["report", "none.safetensors", "-o", str(w.folder / "x.html")], "none.safetensors"),
    "report of one token": (
        lambda w: ["report", str(w.image), "--new-tokens", "1", "-o", str(w.folder / "x.html")],
        "ask for at least 2",
    ),
    "report beyond the context": (
        lambda w: ["report", str(w.image), "--prompt-tokens", "9999", "-o", str(w.folder / "x.html")],
        "exceed the context",
    ),
    "report over its image": (lambda w: ["report", str(w.image), "-o", str(w.image)], "is the image itself"),
    "report into a missing folder": (
        lambda w: ["report", str(w.image), "-o", str(w.folder / "none" / "x.html")],
        "No such folder",
    ),
    "simulation beyond the context": (lambda w: simulating(w, "--new-tokens", "63"), "context of 64"),
    "simulation of no tokens": (
        lambda w: simulating(w, "--prompt-tokens", "0"),
        "--prompt-tokens must be an integer, at least 1, not 0",
    ),
    "unknown command": (lambda w: ["sing"], "'sing'"),
    "unknown option": (lambda w: ["machines", "--colour"], "--colour"),
    "missing argument": (lambda w: ["compile"], "MODEL"),
    "missing output": (lambda w: ["compile", str(w.checkpoint)], "output"),
}
OUTPUTS: dict[str, Case] = {
    "output folder missing": (
        lambda w: ["compile", str(w.checkpoint), "-o", str(w.folder / "none" / "out.safetensors")],
        "No such file",
    ),
    "output is a directory": (lambda w: ["compile", str(w.checkpoint), "-o", str(w.folder)], "no regular file"),
    "output over the weights": (lambda w: compiling_over(w, "model.safetensors"), "a file of the model itself"),
    "output over config.json": (lambda w: compiling_over(w, "config.json"), "a file of the model itself"),
    "output over the weights by a link": (
        lambda w: compiling_over(w, "model.safetensors", "link.safetensors"),
        "a file of the model itself",
    ),
    "output folder is a file": (
        lambda w: ["compile", str(w.checkpoint), "-o", w.file("file", "") + "/out.safetensors"],
        "Not a directory",
    ),
    "trace into a missing folder": (
        lambda w: simulating(w, "--trace", str(w.folder / "none" / "trace.json")),
        "No such folder",
    ),
    "assembly into a missing folder": (
        lambda w: ["asm", w.file("a.s", "halt\n"), "-o", str(w.folder / "none" / "a.bin")],
        "No such file",
    ),
}
CASES = IMAGES | MACHINES | CHECKPOINTS | TEXTS | REQUESTS | OUTPUTS


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_one_line(status: int, output: str, errors: str, phrase: str) -> None:
    assert status in (1, 2)
    assert output == ""
    assert errors.startswith("typebar: error: ") and errors.endswith("\n") and errors.count("\n") == 1, errors
    assert phrase in errors


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, work: Work, capfd: pytest.CaptureFixture[str]) -> None:
    arrange, phrase = CASES[name]
    arguments = arrange(work)
    before = contents(work.folder)
    capfd.readouterr()
    status = main(arguments)
    output, errors = capfd.readouterr()
    assert_one_line(status, output, errors, phrase)
    assert contents(work.folder) == before


def test_an_image_beside_the_weights_may_be_replaced(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    model = work.model()
    image = shutil.copy(work.image, model / "image.safetensors")
    before = contents(model)
    assert main(["compile", str(model), "-o", str(image), "--machine", "tiny", "--devices", "1", "--json"]) == 0
    after = contents(model)
    assert {path.name for path in before if before[path] != after[path]} == {"image.safetensors"}
    assert before.keys() == after.keys()


@pytest.mark.parametrize(("text", "valid"), [(TOKENIZER.read_text("utf-8"), True), ("[", False), ("\ud800", False)])
def test_a_tokenizer_given_as_text(text: str, valid: bool, work: Work) -> None:
    out = work.folder / "out.safetensors"
    if not valid:
        with pytest.raises(TypebarError, match=r"valid tokenizer\.json") as caught:
            compile(work.checkpoint, out, "tiny", 1, tokenizer_json=text)
        assert "\n" not in str(caught.value)
        assert not list(work.folder.iterdir())
        return
    made = compile(work.checkpoint, out, "tiny", 1, tokenizer_json=text)
    with Image.open(made) as image:
        assert image.tokenizer == text.encode()


@pytest.mark.parametrize("command", ["compile", "asm"])
def test_read_only_output(command: str, work: Work, capfd: pytest.CaptureFixture[str]) -> None:
    folder = Path("/sys") if os.geteuid() == 0 else work.folder / "locked"  # the superuser may write anywhere else
    if os.geteuid() != 0:
        folder.mkdir(0o500)
    source = str(work.checkpoint) if command == "compile" else work.file("a.s", "halt\n")
    status = main([command, source, "-o", str(folder / "typebar-test-output")])
    output, errors = capfd.readouterr()
    assert_one_line(status, output, errors, "cannot be written: ")
    assert any(why in errors for why in ("Permission denied", "Operation not permitted", "Read-only file system"))
    assert not list(folder.glob("*typebar-test-output*"))


@pytest.fixture
def small_files() -> Iterator[None]:
    """A limit of 32 KiB a file, as a stand-in for a full disk: writing fails half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32768, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("command", ["compile", "simulate", "report", "asm"])
def test_full_disk(command: str, work: Work, small_files: None, capsys: pytest.CaptureFixture[str]) -> None:
    out = work.folder / "out"
    arguments = {
        "compile": ["compile", str(work.checkpoint), "-o", str(out)],
        "simulate": simulating(work, "--trace", str(out)),
        "report": ["report", str(work.image), "--prompt-tokens", "2", "--new-tokens", "2", "-o", str(out)],
        "asm": ["asm", work.file("long.s", "halt\n" * 1000), "-o", str(out)],
    }[command]
    out.write_text("the older file")
    before = contents(work.folder)
    status = main(arguments)
    assert_one_line(status, *capsys.readouterr(), "File too large")
    assert contents(work.folder) == before


@pytest.mark.parametrize("arguments", [["asm", "none.s"], ["sing"], ["disasm", "pyproject.toml"]])
def test_as_a_process(arguments: list[str]) -> None:
    made = subprocess.run([sys.executable, "-m", "typebar", *arguments], capture_output=True, text=True, timeout=60)
    assert_one_line(made.returncode, made.stdout, made.stderr, "")
    assert made.returncode == 2
