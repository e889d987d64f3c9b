"""ONNX models exported by torch against the same models through torch: the same steps, and the same values."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from typebar.compiler import ir
from typebar.compiler.driver import build
from typebar.compiler.frontend import FrontendModel, load_model
from typebar.compiler.interpreter import StepInterpreter
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import Format
from typebar.isa.machine import Machine
from typebar.isa.program import encode

VOCAB = 97


def randomise(model: nn.Module) -> nn.Module:
    """Different weights everywhere, so that an exporter finds no two equal ones to store once."""
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def gpt2(tied: bool = False) -> nn.Module:
    config = GPT2Config(n_layer=3, n_embd=32, n_head=4, vocab_size=VOCAB, n_positions=64, tie_word_embeddings=tied)
    return randomise(GPT2LMHeadModel(config))


def llama() -> nn.Module:
    config = LlamaConfig(
        num_hidden_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=VOCAB,
        max_position_embeddings=64,
    )
    return randomise(LlamaForCausalLM(config))


class Logits(nn.Module):
    """A transformers model as a function of token ids, with a mask or without."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.m = model
        self.eval()  # exporters leave a module in the mode of its outermost part

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        logits: torch.Tensor = self.m(input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def exported(model: nn.Module, path: Path, how: str, length: int = 9) -> Path:
    """An ONNX file of the model; `how` is new, old, new-static or old-static."""
    ids = torch.arange(length)[None] % VOCAB
    names = {"input_names": ["input_ids"], "output_names": ["logits"]}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if how == "new":
            shapes = ({1: torch.export.Dim("T", min=2, max=64)},)
            torch.onnx.export(
                model, (ids,), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False, **names
            )
        elif how == "new-static":
            torch.onnx.export(model, (ids,), path, dynamo=True, external_data=False, verbose=False, **names)
        else:
            both = ("input_ids", "attention_mask") if how == "old" else ()
            axes = {name: {0: "batch", 1: "length"} for name in both}
            names["input_names"].append("attention_mask")
            inputs = (ids, torch.ones_like(ids))
            torch.onnx.export(model, inputs, path, dynamo=False, opset_version=18, dynamic_axes=axes, **names)
    return path


def logits_of(brought: FrontendModel, ids: list[int]) -> torch.Tensor:
    runner = StepInterpreter(brought.module, lambda name: torch.from_numpy(np.array(brought.lookup(name))))
    return torch.stack([runner.step(token, i) for i, token in enumerate(ids)])


def require_equal(model: nn.Module, brought: FrontendModel, length: int = 20, tolerance: float = 2e-5) -> None:
    ids = [(7 * i + 3) % VOCAB for i in range(length)]
    with torch.no_grad():
        out = model(torch.tensor([ids]))
    expected = (out if isinstance(out, torch.Tensor) else out.logits)[0]
    found = logits_of(brought, ids)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def skeleton(brought: FrontendModel) -> str:
    """The step's text without what only names things: symbols in order of use, no node names, no weight layouts."""
    text = re.sub(r'(node|module|layout) = "[^"]*",? ?', "", str(brought.module))
    text = re.sub(r", \}", "}", text)
    known: dict[str, str] = {}
    return re.sub(r'@("[^"]*"|[\w.]+)', lambda m: known.setdefault(m[0], f"@w{len(known)}"), text)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return {"gpt2": gpt2, "llama": llama}[request.param]()


@pytest.mark.parametrize("how", ["new", "old"])
def test_torch_and_onnx_give_the_same_step(model: nn.Module, how: str, tmp_path: Path) -> None:
    brought = load_model(exported(Logits(model), tmp_path / "m.onnx", how), {"context": 64})
    direct = load_model(model)
    assert skeleton(brought) == skeleton(direct)
    for devices in (1, 3):
        programs = [build(m, Machine.load("tiny"), devices, Format.FP16).program for m in (brought, direct)]
        assert encode(programs[0]).tobytes() == encode(programs[1]).tobytes()
    assert any(isinstance(op, ir.RepeatOp) and op.count.value.data == 3 for op in brought.module.walk())
    require_equal(model, brought)


@pytest.mark.parametrize("how", [pytest.param("new-static", marks=pytest.mark.long), "old-static"])
def test_a_graph_of_fixed_length_takes_every_shorter_text(model: nn.Module, how: str, tmp_path: Path) -> None:
    brought = load_model(exported(Logits(model), tmp_path / "m.onnx", how, 13), {"context": 64})
    assert brought.config["context"] == 13
    require_equal(model, brought, 13)


class Small(nn.Module):
    """A decoder of one's own, with a cache as inputs and outputs: two layers, learned positions."""

    def __init__(self, width: int = 16, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.wte, self.wpe, self.head = nn.Embedding(VOCAB, width), nn.Embedding(32, width), nn.Linear(width, VOCAB)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        empty = torch.zeros(1, self.heads, 0, self.width // self.heads)
        positions = torch.arange(input_ids.shape[1])[None]
        mask = torch.ones_like(input_ids)
        return self.cached(mask, positions, *[empty] * 4, input_ids)[0]

    def cached(
        self, attention_mask: torch.Tensor, position_ids: torch.Tensor, *rest: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        *past, input_ids = rest
        x = self.wte(input_ids) + self.wpe(position_ids)
        presents = []
        for i, (qkv, out, norm) in enumerate(zip(self.qkv, self.out, self.norm, strict=True)):
            parts = qkv(norm(x)).split(self.width, -1)
            q, k, v = (p.view(*p.shape[:2], self.heads, -1).transpose(1, 2) for p in parts)
            k, v = torch.cat((past[2 * i], k), 2), torch.cat((past[2 * i + 1], v), 2)
            presents += [k, v]
            total, length = k.shape[2], q.shape[2]
            rows = torch.arange(total - length, total)[:, None]
            allowed = (torch.arange(total)[None] <= rows)[None, None] & attention_mask[:, None, None].bool()
            scores = q @ k.transpose(-2, -1) / (self.width // self.heads) ** 0.5
            weights = torch.softmax(scores.masked_fill(~allowed, -1e9), -1)
            x = x + out((weights @ v).transpose(1, 2).flatten(2))
        return (self.head(functional.gelu(x)), *presents)


class Cached(nn.Module):
    def __init__(self, model: Small) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.model.cached(*inputs)


def cached_file(model: Small, path: Path, kind: torch.dtype = torch.int64) -> Path:
    """A graph with cache inputs and outputs, its token ids last."""
    caches = [f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")]
    presents = [name.replace("past_key_values", "present") for name in caches]
    names = ["attention_mask", "position_ids", *caches, "input_ids"]
    axes: dict[str, dict[int, str]] = {
        "input_ids": {0: "batch", 1: "length"},
        "position_ids": {0: "batch", 1: "length"},
    }
    axes |= {"attention_mask": {0: "batch", 1: "total"}} | {n: {0: "batch", 2: "past"} for n in caches}
    past = [torch.randn(1, 2, 3, 8) for _ in caches]
    inputs = (torch.ones(1, 8, dtype=torch.int64), torch.arange(3, 8)[None], *past, torch.arange(5, dtype=kind)[None])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Cached(model),
            inputs,
            path,
            dynamo=False,
            opset_version=17,
            input_names=names,
            output_names=["logits", *presents],
            dynamic_axes=axes,
        )
    return path


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_a_graph_with_a_cache_starts_with_an_empty_one(tmp_path: Path, kind: torch.dtype) -> None:
    model = randomise(Small())
    assert isinstance(model, Small)
    path = cached_file(model, tmp_path / "decoder_model.onnx", kind)
    assert sum("past" in v.name for v in onnx.load(path).graph.input) == 4
    brought = load_model(tmp_path)
    assert brought.config["context"] == 32
    require_equal(model, brought)


def test_weights_in_a_file_of_their_own_are_mapped(tmp_path: Path) -> None:
    model = randomise(Small())
    path = cached_file(model, tmp_path / "whole.onnx")
    split = tmp_path / "model.onnx"
    onnx.save_model(onnx.load(path), split, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    path.unlink()
    brought = load_model(split)
    require_equal(model, brought)
    stored = brought.weights.load("model.wte.weight")
    assert isinstance(stored.base if stored.base is not None else stored, np.memmap)


def test_facts_come_from_the_files_beside(tmp_path: Path) -> None:
    cached_file(randomise(Small()), tmp_path / "model.onnx")  # type: ignore[arg-type]
    (tmp_path / "config.json").write_text(json.dumps({"n_positions": 24}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    brought = load_model(tmp_path)
    assert (brought.config["context"], brought.config["eos_token_id"]) == (24, 5)
    assert (brought.tokenizer_json, brought.name) == (b"{}", tmp_path.name)
    assert load_model(tmp_path / "model.onnx", {"context": 8, "name": "own"}).config["context"] == 8


def test_a_model_without_a_table_of_positions_gets_a_context(tmp_path: Path) -> None:
    path = exported(Logits(llama()), tmp_path / "m.onnx", "old")
    assert load_model(path).config["context"] == 512


def dequantised(path: Path) -> dict[str, np.ndarray]:
    """The weights of a dynamically quantised file, [in, out], in the order of their products."""
    graph = onnx.load(path).graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            name = node.input[1].removesuffix("_quantized")
            zero = stored[node.input[3]].astype(np.int32)
            found[node.name] = (stored[node.input[1]].astype(np.int32) - zero) * stored[f"{name}_scale"]
    return found


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("by_column", [False, True])
def test_dynamically_quantised_weights_stay_int8(tmp_path: Path, unsigned: bool, by_column: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = llama()
    path = exported(Logits(model), tmp_path / "float.onnx", "old")
    quantised = tmp_path / "model.onnx"
    kind = QuantType.QUInt8 if unsigned else QuantType.QInt8
    symmetric = {"WeightSymmetric": True} if unsigned else {}
    quantize_dynamic(path, quantised, per_channel=by_column, weight_type=kind, extra_options=symmetric)
    brought = load_model(quantised, {"context": 64})
    linears = [op for op in brought.module.walk() if isinstance(op, ir.LinearOp)]
    assert len(linears) == 8 and all(op.scale is not None for op in linears)
    names = [
        n for n in brought.weights.names() if brought.weights.shape(n) and brought.weights.load(n).dtype == np.int8
    ]
    assert len(names) >= 22
    weights = list(dequantised(quantised).values())
    with torch.no_grad():
        for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
            near = [w for w in weights if w.shape == tuple(layer.weight.shape[::-1])]
            close = min(near, key=lambda w: np.abs(w.T - layer.weight.numpy()).max())
            assert np.abs(close.T - layer.weight.numpy()).max() < 0.02
            layer.weight.copy_(torch.from_numpy(close.T.astype(np.float32)))
        table = next(
            n for n in brought.weights.names() if "embed_tokens" in n and brought.lookup(n).dtype == np.float32
        )
        model.m = model.get_input_embeddings()
        model.get_input_embeddings().weight.copy_(torch.from_numpy(np.array(brought.lookup(table))))
    require_equal(model, brought)


class Averaged(Small):
    """Adds the mean over all positions, later ones too: at another length every logit is another."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        logits = super().forward(input_ids)
        return logits + logits.mean(1, keepdim=True)


def test_a_fixed_length_that_cannot_be_generalised_is_refused(tmp_path: Path) -> None:
    path = exported(randomise(Averaged()), tmp_path / "m.onnx", "old-static")
    with pytest.raises(TypebarError, match=r"exported for 9 tokens and gives other logits for fewer; export it with"):
        load_model(path)


def test_a_tied_head_is_a_copy_in_the_file(tmp_path: Path) -> None:
    """The one difference: exporters store a tied head transposed, as a tensor of its own."""
    model = gpt2(tied=True)
    brought = load_model(exported(Logits(model), tmp_path / "m.onnx", "new"), {"context": 64})
    lines = skeleton(brought).splitlines(), skeleton(load_model(model)).splitlines()
    differing = [pair for pair in zip(*lines, strict=True) if pair[0] != pair[1]]
    assert len(differing) == 1 and "tb.linear" in differing[0][0]
    require_equal(model, brought)
