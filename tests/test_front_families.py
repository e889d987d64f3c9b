"""Every decoder family, small and random, from torch.export to a re-rolled step that means the same in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

from typebar.compiler.frontend import FrontendModel, load_model
from typebar.compiler.interpreter import StepInterpreter
from typebar.compiler.passes.attention import MASKED
from typebar.compiler.passes.masks import ScoreMask, Unclassified, classify_scores
from typebar.compiler.problems import LoweringError

logging.set_verbosity_error()

VOCAB, CONTEXT, TOKENS = 61, 32, 24
WIDE = {"vocab_size": VOCAB, "initializer_range": 0.3}
# Head sizes are powers of four and epsilons powers of two, so that a step's float32 attributes hold them exactly.
EPS = 2.0**-16
LLAMA = WIDE | {
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": EPS,
}
GPT = WIDE | {"n_embd": 48, "n_head": 3, "n_layer": 2, "n_positions": CONTEXT, "layer_norm_epsilon": EPS}
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "ffn_dim": 40,
    "max_position_embeddings": CONTEXT,
    "init_std": 0.3,
}
BLOOM = WIDE | {"n_layer": 2, "layer_norm_epsilon": EPS}


class NanoGPT(nn.Module):
    """In nanoGPT's style: q, k and v of one projection, fused attention."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.fused = fused
        self.wte, self.wpe = nn.Embedding(VOCAB, 48), nn.Embedding(CONTEXT, 48)
        self.h = nn.ModuleList(
            nn.ModuleDict(
                {
                    "n1": nn.LayerNorm(48, bias=not fused),
                    "qkv": nn.Linear(48, 144),
                    "o": nn.Linear(48, 48),
                    "n2": nn.LayerNorm(48, elementwise_affine=fused),
                    "up": nn.Linear(48, 96),
                    "down": nn.Linear(96, 48),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(48, VOCAB, bias=not fused)
        self.register_buffer("bias", torch.ones(CONTEXT, CONTEXT).tril().view(1, 1, CONTEXT, CONTEXT))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.fused:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = (q * 0.25) @ k.permute(0, 1, 3, 2)  # in minGPT's style, with a buffer for a mask
        past = self.bias[:, :, : q.shape[2], : q.shape[2]]
        return functional.softmax(scores.masked_fill(past == 0, float("-inf")), dim=-1) @ v

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        size = ids.shape[1]
        x = self.wte(ids) + self.wpe(torch.arange(size))
        for block in self.h:
            parts = block["qkv"](block["n1"](x)).split(48, dim=2)
            q, k, v = (p.view(1, size, 3, 16).transpose(1, 2) for p in parts)
            x = x + block["o"](self.attend(q, k, v).transpose(1, 2).contiguous().view(1, size, 48))
            x = x + block["down"](functional.gelu(block["up"](block["n2"](x))))
        return self.head(x)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "GPT-2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT)),
    "OPT 125M": lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT, word_embed_proj_dim=48)),
    "OPT 350M": lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False)),
    "BLOOM 8 heads": lambda: tf.BloomForCausalLM(tf.BloomConfig(**BLOOM, hidden_size=32, n_head=8)),
    "BLOOM 12 heads": lambda: tf.BloomForCausalLM(tf.BloomConfig(**BLOOM, hidden_size=48, n_head=12)),
    "GPT-Neo": lambda: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(
            **WIDE,
            hidden_size=24,
            num_heads=3,
            num_layers=4,
            attention_types=[[["global", "local"], 2]],
            window_size=5,
            max_position_embeddings=CONTEXT,
            intermediate_size=40,
            layer_norm_epsilon=EPS,
        )
    ),
    "GPT-J": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**GPT, rotary_dim=4)),
    "GPT-NeoX": lambda: tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(
            **WIDE,
            hidden_size=48,
            num_attention_heads=3,
            num_hidden_layers=2,
            intermediate_size=40,
            max_position_embeddings=CONTEXT,
            rotary_pct=0.25,
            layer_norm_eps=EPS,
        )
    ),
    "Llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)),
    "Qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**LLAMA)),
    "Mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**LLAMA, sliding_window=7)),
    "Gemma": lambda: tf.GemmaForCausalLM(
        tf.GemmaConfig(**LLAMA | {"hidden_size": 64, "num_key_value_heads": 1, "head_dim": 16})
    ),
    "nanoGPT": NanoGPT,
    "minGPT": lambda: NanoGPT(fused=False),
}


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """A model with parameters that 1 + w and float32 hold exactly, none of them at its trivial value."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 or "bias" in name else 0.0)
            parameter.copy_(((parameter + noise) * 256).round() / 256)
    return model


class Upcasts(TorchFunctionMode):
    """Lets a model that computes norms and softmax in float32 do so in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = [torch.float64 if a is torch.float32 else a for a in args]
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def exact(model: nn.Module) -> nn.Module:
    """A copy with parameters in float64; tables of positions stay as they are."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data = parameter.data.double()
    return copied


def run(brought: FrontendModel, ids: Sequence[int], source: Sequence[int] = ()) -> torch.Tensor:
    interpreter = StepInterpreter(
        brought.module, lambda name: torch.from_numpy(np.array(brought.lookup(name))), torch.float64
    )
    if source:
        interpreter.encode(source)
    return torch.stack([interpreter.step(token, position) for position, token in enumerate(ids)])


def require_same(got: torch.Tensor, expected: torch.Tensor, bound: float = 1e-9) -> None:
    scale = float(expected.abs().max())
    assert float(expected.std()) > 0.05 * scale > 0  # logits worth comparing
    assert float((got - expected).abs().max()) < bound * scale


@pytest.mark.parametrize("eager", [False, True], ids=["fused", "written out"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_re_rolls_and_means_the_same(name: str, eager: bool) -> None:
    model = built(FAMILIES[name])
    if eager:
        if not hasattr(model, "set_attn_implementation"):
            pytest.skip("a plain module has one attention")
        model.set_attn_implementation("eager")
    brought = load_model(model, {"context": CONTEXT})
    assert "tb.repeat" in str(brought.module)
    ids = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.no_grad(), Upcasts():
        out = exact(model)(torch.tensor([ids]))
    # BLOOM writes sqrt(2 / pi) with eight digits: its GELU is the tanh form up to 1e-9 of each value.
    require_same(run(brought, ids), getattr(out, "logits", out)[0], 2e-8 if "BLOOM" in name else 1e-9)


@pytest.mark.parametrize("form", ["relu", "gated-gelu"])
def test_t5_means_the_same(form: str) -> None:
    config = tf.T5Config(
        vocab_size=VOCAB,
        d_model=64,
        d_kv=16,
        num_heads=3,
        num_layers=2,
        num_decoder_layers=3,
        d_ff=40,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        decoder_start_token_id=0,
        layer_norm_epsilon=EPS,
        n_positions=CONTEXT,
        feed_forward_proj=form,
        initializer_factor=2.0,
    )
    model = built(lambda: tf.T5ForConditionalGeneration(config))
    brought = load_model(model, {"context": CONTEXT})
    text = str(brought.module)
    assert text.count("tb.repeat") == 2 and text.count('bias_kind = "relative"') == 2
    ids = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(3)).tolist()
    source = ids[5:18]
    with torch.no_grad(), Upcasts():
        out = exact(model)(torch.tensor([source]), decoder_input_ids=torch.tensor([ids]))
    require_same(run(brought, ids, source), out.logits[0])


class Turned(NanoGPT):
    """Rotary positions in ways people write them; `broken` ways are no rotation."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        angles = torch.arange(CONTEXT)[:, None] * torch.tensor([1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01, 0.001])
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        if self.way == "halves":
            a, b = x.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        if self.way == "pairs":
            a, b = x.unflatten(-1, (8, 2)).unbind(-1)
            return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
        if self.way == "backwards":
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack([sin * b + cos * a, cos * b - sin * a], dim=-1).flatten(-2)
        if self.way == "broken: two angles":
            a, b = x.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * (sin * 2)], dim=-1)
        a, b = x.chunk(2, dim=-1)  # broken: a reflection
        return torch.cat([a * cos + b * sin, a * sin - b * cos], dim=-1)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return super().attend(self.turn(q), self.turn(k), v)


@pytest.mark.parametrize("way", ["halves", "pairs", "backwards"])
def test_rotary_positions_in_any_writing(way: str) -> None:
    model = built(lambda: Turned(way))
    brought = load_model(model, {"context": CONTEXT})
    assert f'pairing = "{"half" if way == "halves" else "interleaved"}"' in str(brought.module)
    ids = list(range(3, 3 + TOKENS))
    with torch.no_grad():
        require_same(run(brought, ids), exact(model)(torch.tensor([ids]))[0])


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("broken: two angles", "not turned by one angle"),
        ("broken: a reflection", "it reorders each token's values"),  # a rotation of the halves, exchanged
    ],
)
def test_what_is_no_rotation_is_refused(way: str, reason: str) -> None:
    with pytest.raises(LoweringError, match=reason):
        load_model(built(lambda: Turned(way)), {"context": CONTEXT})


# Masks, told apart by their values ----------------------------------------------------------------------------------
LENGTHS = st.integers(2, 12)


def past(length: int, window: int | None = None) -> torch.Tensor:
    lower = torch.ones(length, length, dtype=torch.bool).tril()
    return lower if window is None else lower.triu(1 - window)


def scores(allowed: torch.Tensor, bias: torch.Tensor | float = 0.0) -> torch.Tensor:
    planes = torch.zeros(1, *allowed.shape) + bias
    return planes.masked_fill(~allowed, float("-inf"))


def rebuilt(kind: ScoreMask, length: int, encoder: bool = False) -> torch.Tensor:
    """What a kind means: [planes, length, length], MASKED where a score does not count."""
    allowed = torch.ones(length, length, dtype=torch.bool) if kind.mask == "none" else past(length, kind.window)
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    bias = torch.zeros(1, 1, 1) if kind.bias is None else torch.from_numpy(kind.bias)
    if kind.bias_kind == "relative":
        bias = bias[:, j - i + length - 1] if encoder else bias[:, (i - j).clamp(min=0)]
    elif kind.bias_kind == "column":
        bias = bias[:, None, :]
    return (torch.zeros(1, length, length) + bias).masked_fill(~allowed, MASKED)


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(length=LENGTHS, window=st.integers(1, 12))
def test_causal_and_windowed_masks_are_known(length: int, window: int) -> None:
    assert classify_scores(scores(past(length))) == ScoreMask("causal")
    expected = ScoreMask("window", window) if window < length else ScoreMask("causal")
    assert classify_scores(scores(past(length, window))) == expected


@settings(max_examples=60, deadline=None)
@given(length=st.integers(3, 12), heads=st.integers(1, 3), seed=st.integers(0, 999), window=st.integers(2, 12))
def test_biases_are_known_by_what_they_depend_on(length: int, heads: int, seed: int, window: int) -> None:
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    allowed = past(length, min(window, length))
    biases = {
        "relative": numbers(seed, heads, length)[:, (i - j).clamp(min=0)],
        "column": (numbers(seed, heads, 1, length) + 5).expand(heads, length, length),
        "table": numbers(seed, heads, length, length),
    }
    for name, bias in biases.items():
        added = scores(allowed, bias)
        kind = classify_scores(added)
        assert kind.bias_kind == name
        assert torch.equal(rebuilt(kind, length), added.clamp(min=MASKED)[: len(rebuilt(kind, length))])
    slopes = torch.tensor([2.0 ** -(h + 1) for h in range(heads)])[:, None, None]
    assert classify_scores(scores(past(length), slopes * (j - i))).bias_kind == "relative"
    assert classify_scores(scores(past(length), slopes * j)).bias_kind == "column"


@settings(max_examples=80, deadline=None)
@given(length=st.integers(3, 12), data=st.data())
def test_one_pair_that_deviates_is_never_misread(length: int, data: st.DataObject) -> None:
    window = data.draw(st.none() | st.integers(2, length - 1))
    row, column = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, length - 1))
    added = scores(past(length, window)).clamp(min=MASKED)
    value = data.draw(st.sampled_from([MASKED, 0.0, 0.5]))
    added[0, row, column] = value
    if column > row and value > MASKED:
        with pytest.raises(Unclassified, match=f"position {row} attends to {column}"):
            classify_scores(added)
        return
    assert torch.equal(rebuilt(classify_scores(added), length), added)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(3, 12), prefix=st.integers(2, 12), seed=st.integers(0, 999))
def test_prefix_bidirectional_and_arbitrary_masks_are_told_apart(length: int, prefix: int, seed: int) -> None:
    everything = torch.ones(length, length, dtype=torch.bool)
    assert classify_scores(scores(everything)) == ScoreMask("none")
    assert classify_scores(scores(everything), encoder=True) == ScoreMask("none")
    with pytest.raises(Unclassified, match="each position to all later ones"):
        classify_scores(scores(everything, numbers(seed, 1, length, length)))
    if prefix < length:
        with pytest.raises(Unclassified, match=f"every position to the first {prefix}"):
            classify_scores(scores(past(length) | (torch.arange(length) < prefix)))
    holes = past(length) & (numbers(seed, length, length) > 0) | torch.eye(length, dtype=torch.bool)
    kind = classify_scores(scores(holes))
    assert torch.equal(rebuilt(kind, length), scores(holes).clamp(min=MASKED))


@settings(max_examples=60, deadline=None)
@given(length=st.integers(2, 12), heads=st.integers(1, 3), seed=st.integers(0, 999), near=st.integers(1, 12))
def test_an_encoder_keeps_everything_in_its_bias(length: int, heads: int, seed: int, near: int) -> None:
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    window = (i - j).abs() < near
    added = scores(window, numbers(seed, heads, 2 * length - 1)[:, j - i + length - 1])
    kind = classify_scores(added, encoder=True)
    assert (kind.mask, kind.bias_kind) == ("none", "relative")
    assert kind.bias is not None and kind.bias.shape == (heads, 2 * length - 1)
    assert torch.equal(rebuilt(kind, length, encoder=True), added.clamp(min=MASKED))
