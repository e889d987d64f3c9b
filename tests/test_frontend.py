"""From torch modules and checkpoints to a re-rolled step that computes the same logits."""

from __future__ import annotations

import copy
import io
import json
import logging as python_logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM
from transformers.utils import logging

from typebar.compiler import ir
from typebar.compiler.evaluate import evaluate_step
from typebar.compiler.frontend import SHAPES, FrontendModel, import_model, load_model
from typebar.compiler.interpreter import StepInterpreter
from typebar.compiler.pipeline import lower
from typebar.compiler.problems import LoweringError
from typebar.isa.errors import TypebarError

logging.set_verbosity_error()
logging.disable_progress_bar()

Activation = Callable[[torch.Tensor], torch.Tensor]


class Attention(nn.Module):
    """Self-attention in one of the ways people write it."""

    def __init__(self, width: int, heads: int, context: int, kind: str) -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.register_buffer("past", torch.ones(context, context).tril().view(1, 1, context, context))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, width = x.shape[1:]
        size = width // self.heads
        if self.kind == "packed":
            q, k, v = self.qkv(x).view(1, tokens, 3, self.heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = self.qkv(x).split(width, dim=2)
            q, k, v = (p.view(1, tokens, self.heads, size).transpose(1, 2) for p in parts)
        return self.proj(self.attend(q, k, v).transpose(1, 2).contiguous().view(1, tokens, width))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        tokens, scale = q.shape[2], 1 / math.sqrt(q.shape[3])
        scores = q @ k.transpose(-2, -1) * scale if self.kind in ("buffer", "where", "added") else q
        if self.kind == "buffer":
            scores = scores.masked_fill(self.past[:, :, :tokens, :tokens] == 0, float("-inf"))
        elif self.kind == "where":
            past = torch.ones(tokens, tokens, dtype=torch.bool).tril()
            scores = torch.where(past, scores, torch.finfo(torch.float32).min)
        elif self.kind == "added":
            scores = scores + torch.full((tokens, tokens), float("-inf")).triu(1)
        elif self.kind == "window":
            away = torch.arange(tokens)[:, None] - torch.arange(tokens)
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=(away >= 0) & (away < 5))
        else:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.softmax(scores, dim=-1) @ v


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, context: int, kind: str, act: Activation) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.att = Attention(width, heads, context, kind)
        self.fc, self.out, self.act = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.att(self.ln1(x))
        return x + self.out(self.act(self.fc(self.ln2(x))))


class SmallGPT(nn.Module):
    """A decoder with learned positions, as users write them."""

    def __init__(self, kind: str = "fused", act: Activation = functional.gelu, sliced: bool = False) -> None:
        super().__init__()
        self.sliced = sliced
        self.wte, self.wpe = nn.Embedding(50, 24), nn.Embedding(32, 24)
        self.blocks = nn.ModuleList(Layer(24, 3, 32, kind, act) for _ in range(3))
        self.ln, self.head = nn.LayerNorm(24), nn.Linear(24, 50, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        tokens = ids.shape[1]
        x = self.wte(ids) + (self.wpe.weight[:tokens] if self.sliced else self.wpe(torch.arange(tokens)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))


def randomise(model: nn.Module) -> nn.Module:
    """Weights of a size that makes logits differ, reproducibly."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def logits_of(model: nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        out = model(torch.tensor([ids]))
    return (out if isinstance(out, torch.Tensor) else out.logits)[0]


def require_equal(model: nn.Module, brought: FrontendModel, tokens: int = 30, tolerance: float = 1e-5) -> None:
    vocab = brought.config["vocab"]
    ids = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(3)).tolist()
    expected = logits_of(model, ids)
    found = evaluate_step(str(brought.module), brought.weights, ids)
    assert found.shape == expected.shape == (tokens, vocab)
    assert expected.std() > 0.01
    assert (found - expected).abs().max() < tolerance


def loops(brought: FrontendModel) -> list[int]:
    return [op.count.value.data for op in brought.module.walk() if isinstance(op, ir.RepeatOp)]


def gpt2(layers: int = 2, **options: object) -> GPT2LMHeadModel:
    config = GPT2Config(n_layer=layers, n_embd=32, n_head=4, vocab_size=97, n_positions=64, **options)
    return randomise(GPT2LMHeadModel(config))


@pytest.fixture(scope="module")
def brought() -> FrontendModel:
    """A GPT-2 of two layers, brought in once."""
    return load_model(gpt2())


def test_gpt2_equals_torch_and_re_rolls() -> None:
    model = gpt2(3)
    brought = load_model(model)
    require_equal(model, brought, 40)
    assert loops(brought) == [3]
    assert brought.config == {"context": 64, "vocab": 97, "eos_token_id": None}
    linears = [op for op in brought.module.walk() if isinstance(op, ir.LinearOp)]
    head = linears[-1]
    assert (ir.text(head.weight), head.layout.data) == ("transformer.wte.weight", "out_in")
    assert [op.layout.data for op in linears[:-1]] == ["in_out"] * 4


def test_float64_shows_that_the_graph_is_exact(brought: FrontendModel) -> None:
    model = gpt2().double()
    ids = list(range(20))
    expected = logits_of(model, ids)
    found = evaluate_step(brought.module, brought.weights, ids, torch.float64)
    # Weights are the same to the bit; eps and the attention's scale are float32 in the graph, hence not 1e-15.
    assert (found - expected).abs().max() < 1e-7


def test_twenty_five_heads() -> None:
    config = GPT2Config(n_layer=1, n_embd=25 * 64, n_head=25, vocab_size=53, n_positions=16, n_inner=64)
    model = randomise(GPT2LMHeadModel(config))
    brought = load_model(model)
    attention = next(op for op in brought.module.walk() if isinstance(op, ir.AttentionOp))
    assert (attention.heads.value.data, attention.head_dim.value.data) == (25, 64)
    ids = list(range(16))
    expected = logits_of(model, ids)
    found = evaluate_step(brought.module, brought.weights, ids)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", ["fused", "packed", "buffer", "where", "added", "window"])
def test_attention_however_it_is_written(kind: str) -> None:
    model = randomise(SmallGPT(kind))
    brought = load_model(model)
    require_equal(model, brought)
    assert loops(brought) == [3]
    masks = {op.mask.data for op in brought.module.walk() if isinstance(op, ir.AttentionOp) and op.mask}
    assert masks == {"window" if kind == "window" else "causal"}


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def tanh_gelu_by_hand(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)))


def erf_gelu_by_hand(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


@pytest.mark.parametrize(
    ("act", "kinds"),
    [
        (functional.relu, ["relu"]),
        (functional.silu, ["silu"]),
        (tanh_gelu_by_hand, ["gelu_tanh"]),
        (erf_gelu_by_hand, ["gelu_erf"]),
        (quick_gelu, ["sigmoid"]),
        (lambda x: torch.tanh(2 * functional.gelu(x)), ["gelu_erf", "tanh"]),
    ],
)
def test_activations_are_known_by_what_they_compute(act: Activation, kinds: list[str]) -> None:
    model = randomise(SmallGPT(act=act))
    brought = load_model(model)
    require_equal(model, brought)
    assert [op.kind.data for op in brought.module.walk() if isinstance(op, ir.ActivationOp)] == kinds


def test_positions_taken_by_slicing() -> None:
    model = randomise(SmallGPT(sliced=True))
    brought = load_model(model)
    require_equal(model, brought)
    assert brought.config["context"] == 32


def test_positions_with_an_offset_and_untied_scores() -> None:
    config = OPTConfig(
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_dim=64,
        vocab_size=97,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    model = randomise(OPTForCausalLM(config))
    brought = load_model(model)
    require_equal(model, brought)
    offsets = [op.offset.value.data for op in brought.module.walk() if isinstance(op, ir.EmbeddingOp)]
    assert offsets == [0, 2]


def test_different_layers_are_not_rolled() -> None:
    model = gpt2(3, scale_attn_by_inverse_layer_idx=True)
    brought = load_model(model)
    require_equal(model, brought)
    assert loops(brought) == []


def test_every_pass_leaves_a_valid_module() -> None:
    brought = import_model(randomise(SmallGPT("where")))
    lower(brought.module, brought.lookup, check=True)
    assert loops(brought) == [3]


def test_import_leaves_the_module_as_it_was() -> None:
    model = SmallGPT().train()
    model.blocks[1].eval()
    before = [m.training for m in model.modules()]
    load_model(model)
    assert [m.training for m in model.modules()] == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_module_of_another_precision(dtype: torch.dtype) -> None:
    model = gpt2().to(dtype)
    brought = load_model(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert "lm_head.weight" not in brought.weights.names()
    require_equal(copy.deepcopy(model).float(), brought)


def test_a_module_that_cannot_be_copied() -> None:
    model = SmallGPT().half()
    model.last = model.head.weight * 2
    with pytest.raises(TypebarError, match=r"cannot copy the module to float32: .*; give it with .* torch\.float32"):
        load_model(model)


@pytest.mark.parametrize(
    ("listed", "kept"),
    [([5], 5), ([6, 5], [6, 5]), ((5, 6, 5), [5, 6]), ([5, -1], 5), ([], None), ([-1], None)],
)
def test_end_of_text_tokens_from_a_list(listed: list[int], kept: object) -> None:
    model = gpt2()
    model.config.eos_token_id = [7, 8]
    assert import_model(model).config["eos_token_id"] == [7, 8]
    assert import_model(model, {"eos_token_id": listed}).config["eos_token_id"] == kept


class Mixing(SmallGPT):
    """Mixes the tokens in eight ways, none of which depends on another."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids)
        means = x.mean(1, keepdim=True) + x.amax(1, keepdim=True) + x.amin(1, keepdim=True)
        return self.head(x.flip(1) + x.cumsum(1) + x.roll(1, 1) + x.softmax(1) + x.log_softmax(1) + means)


def test_what_cannot_be_lowered_is_reported_at_once() -> None:
    with pytest.raises(LoweringError) as caught:
        load_model(Mixing(), {"context": 32})
    items = caught.value.items
    assert len(items) >= 8
    assert len({item.node for item in items}) == len(items)
    assert all(item.reason and item.remedy for item in items)
    assert str(caught.value).startswith(f"{len(items)} operations cannot be lowered: {items[0].node}: ")
    assert "\n" not in str(caught.value)


def test_one_pair_of_positions_that_breaks_the_mask_is_found() -> None:
    model = SmallGPT("buffer")
    model.blocks[1].att.past[0, 0, 3, 31] = 1
    with pytest.raises(LoweringError, match="position 3 attends to 31") as caught:
        load_model(model)
    assert len(caught.value.items) == 1


def test_one_pair_of_positions_that_a_mask_leaves_out_stands_in_a_table() -> None:
    model = randomise(SmallGPT("buffer"))
    model.blocks[1].att.past[0, 0, 29, 3] = 0
    brought = load_model(model)
    assert str(brought.module).count('bias_kind = "table"') == 1
    require_equal(model, brought)


class Reversed(SmallGPT):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids.flip(1))


class Pair(SmallGPT):
    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(ids), None


class LastOnly(SmallGPT):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids)[:, -1:]


class FixedLength(SmallGPT):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids.view(1, 7))


class Mismatched(SmallGPT):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.head(self.wte(ids)))


class Unbounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Reversed(), "cannot be lowered: embedding: "),
        (Pair(), r"must return logits \[1, T, V\] or an object with .logits, not tuple"),
        (LastOnly(), "it takes some of the positions; compute every position"),
        (FixedLength(), r"your code specialized it to be a constant \(7\); make its forward"),
        (Mismatched(), "cannot trace the model with a dynamic length: "),
        (Unbounded(), r"give config=\{'context': N\}"),
    ],
)
def test_modules_that_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(TypebarError, match=message) as caught:
        load_model(model)
    assert "\n" not in str(caught.value)


def test_torch_does_not_log_what_is_reported_in_one_line() -> None:
    logger, written = python_logging.getLogger("torch._subclasses.fake_tensor"), io.StringIO()
    handler = python_logging.StreamHandler(written)
    logger.addHandler(handler)
    try:
        with pytest.raises(TypebarError, match="cannot trace"):
            load_model(Mismatched())
        assert written.getvalue() == ""
        logger.error("afterwards")
        assert written.getvalue() == "afterwards\n"
    finally:
        logger.removeHandler(handler)


def test_a_context_beyond_the_table_is_refused() -> None:
    with pytest.raises(LoweringError, match=r"table wpe\.weight has 32 rows, 33 positions from 0 need more"):
        load_model(SmallGPT(), {"context": 33})
    assert load_model(SmallGPT(), {"context": 20}).config["context"] == 20


def checkpoint(path: Path, **options: object) -> GPT2LMHeadModel:
    model = gpt2(**options)
    model.save_pretrained(path)
    return model


def test_checkpoint_directory(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, eos_token_id=5)
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    brought = load_model(tmp_path)
    require_equal(model, brought)
    assert brought.tokenizer_json == b"{}"
    assert brought.name == tmp_path.name
    assert brought.config["eos_token_id"] == 5


def test_checkpoint_in_half_precision_and_shards(tmp_path: Path) -> None:
    model = gpt2().half()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    require_equal(model.float(), load_model(str(tmp_path)))


def test_checkpoint_without_the_base_models_prefix(tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k.removeprefix("transformer."): v for k, v in load_file(file).items()}, file)
    require_equal(model, load_model(tmp_path))


def test_the_tensors_say_whether_a_head_is_tied(tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    assert model.config.tie_word_embeddings
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    head = torch.randn_like(tensors["transformer.wte.weight"])
    save_file({**tensors, "lm_head.weight": head}, file)
    model.lm_head.weight = nn.Parameter(head)
    require_equal(model, load_model(tmp_path))
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}, file)
    assert "lm_head.weight" not in load_model(tmp_path).weights.names()


def test_buffers_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {f"transformer.h.{n}.attn.{name}": torch.ones(1) for n in (0, 1) for name in ("bias", "masked_bias")}
    others = {"attn.bias": torch.ones(1), "h.0.rotary_emb.inv_freq": torch.ones(4), "steps": torch.ones(1).long()}
    save_file({**load_file(file), **old, **others}, file)
    require_equal(model, load_model(tmp_path))


def spoil(path: Path, how: str) -> None:
    """Damage a good checkpoint in one way."""
    file = path / "model.safetensors"
    tensors = load_file(file) if file.exists() else {}
    if how == "no config":
        (path / "config.json").unlink()
    elif how == "bad config":
        (path / "config.json").write_text("{")
    elif how == "unknown type":
        (path / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    elif how == "no weights":
        file.rename(path / "pytorch_model.bin")
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:100])
    elif how == "lost file":
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "absent.safetensors"}}))
    elif how == "lost tensor":
        placed = dict.fromkeys([*tensors, "ghost"], file.name)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    elif how == "missing":
        save_file({k: v for k, v in tensors.items() if k != "transformer.h.1.ln_2.bias"}, file)
    elif how in ("fewer layers", "no layers", "layers below zero"):
        config = json.loads((path / "config.json").read_text())
        config["n_layer"] = {"fewer layers": 1, "no layers": 0, "layers below zero": -1}[how]
        (path / "config.json").write_text(json.dumps(config))
    elif how == "unused":
        save_file({**tensors, "transformer.h.0.attn.q_attn.bias": torch.zeros(32)}, file)
    elif how == "shape":
        save_file({**tensors, "transformer.ln_f.bias": torch.zeros(33)}, file)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "has no config.json"),
        ("bad config", "cannot read .*config.json"),
        ("unknown type", "cannot read .*config.json"),
        (
            "no weights",
            "has no model.safetensors; load the model with transformers and save it again with save_pretrained",
        ),
        ("truncated", "cannot read weights from"),
        ("lost file", "lacks the weight file absent.safetensors"),
        ("lost tensor", r"model\.safetensors lacks 'ghost' that its index names"),
        ("missing", "lacks 1 parameters, the first is 'transformer.h.1.ln_2.bias'"),
        ("shape", r"'transformer.ln_f.bias' is \[33\] in"),
        ("fewer layers", "leaves 12 of the tensors in .* unused, the first is 'transformer.h.1."),
        ("no layers", "config.json gives 0 layers"),
        ("layers below zero", "config.json gives -1 layers"),
        ("unused", "leaves 1 of the tensors in .* unused, the first is 'transformer.h.0.attn.q_attn.bias'"),
    ],
)
def test_bad_checkpoints_give_one_line(tmp_path: Path, how: str, message: str) -> None:
    checkpoint(tmp_path)
    spoil(tmp_path, how)
    with pytest.raises(TypebarError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_such_model() -> None:
    with pytest.raises(
        TypebarError, match=r"no model 'gpt3': give a checkpoint directory, an .onnx .*, or one of gpt2, gpt2-medium"
    ):
        load_model("gpt3")


def test_a_named_shape_has_no_weights() -> None:
    brought = load_model("gpt2-xl")
    assert loops(brought) == [48]
    assert brought.config == {"context": 1024, "vocab": 50257, "eos_token_id": 50256}
    assert sum(math.prod(brought.weights.shape(n)) for n in brought.weights.names()) == 1_557_611_200
    assert SHAPES["gpt2-xl"][:3] == (1600, 25, 48)
    with pytest.raises(TypebarError, match="has a shape but no values"):
        brought.weights.load("transformer.wte.weight")


def test_the_interpreter_goes_back_and_starts_again(brought: FrontendModel) -> None:
    runner = StepInterpreter(brought.module, lambda name: torch.from_numpy(brought.weights.load(name)))
    first = [runner.step(token, i).clone() for i, token in enumerate([5, 9, 2, 7])]
    runner.step(11, 2)
    assert torch.equal(runner.step(7, 3), runner.step(7, 3))
    assert not torch.equal(runner.step(7, 3), first[3])
    runner.reset()
    assert all(torch.equal(runner.step(token, i), first[i]) for i, token in enumerate([5, 9, 2, 7]))


@pytest.mark.parametrize(("token", "position", "message"), [(97, 0, "token 97"), (0, 1, "position 1 cannot follow 0")])
def test_the_interpreter_refuses_what_is_out_of_range(
    brought: FrontendModel, token: int, position: int, message: str
) -> None:
    runner = StepInterpreter(brought.module, lambda name: torch.from_numpy(brought.weights.load(name)))
    with pytest.raises(TypebarError, match=message):
        runner.step(token, position)
