"""Encoder-decoders: what is imported of them, and encoder and step in the interpreter against torch in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from xdsl.dialects.builtin import TensorType

from typebar.compiler import ir
from typebar.compiler.frontend import FrontendModel, import_model, load_model
from typebar.compiler.interpreter import StepInterpreter
from typebar.compiler.verify import verify
from typebar.isa.errors import TypebarError

VOCAB, WIDTH, CONTEXT = 61, 24, 40
SHAPE = {"d_model": WIDTH, "d_kv": 6, "d_ff": 40, "num_heads": 3, "vocab_size": VOCAB, "decoder_start_token_id": 0}


def randomised(model: nn.Module) -> nn.Module:
    """The model with weights of a size that makes logits differ, and norms away from one."""
    made = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=made) * scale + (0 if parameter.ndim > 1 else 1))
    return model.eval()


def t5(**options: Any) -> nn.Module:
    """A small T5, three layers in its decoder; its head is untied as v1.1 has it unless it scales its output."""
    config = tf.T5Config(**{**SHAPE, "num_layers": 2, "num_decoder_layers": 3, **options})
    model = tf.T5ForConditionalGeneration(config)
    if not config.scale_decoder_outputs:
        model.lm_head.weight = nn.Parameter(torch.empty(VOCAB, WIDTH))
    return randomised(model)


def in_float64(model: nn.Module) -> nn.Module:
    """The model in float64 throughout; T5's norms work out the variance in float32 otherwise."""

    def normalise(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(normalise, module)
    return model.double()


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "T5 v1.0": lambda: t5(),
    "T5 v1.1": lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mT5": lambda: randomised(
        tf.MT5ForConditionalGeneration(
            tf.MT5Config(**{**SHAPE, "num_layers": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})
        )
    ),
    "ByT5": lambda: t5(
        num_layers=4, num_decoder_layers=1, feed_forward_proj="gated-gelu", tie_word_embeddings=False, d_kv=4
    ),
}


class Encoder(nn.Module):
    """An encoder of a user's own: learned positions, one layer of attention, no transformers class."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.norm(x + attend(self.q(x), self.k(x), self.v(x), False))


class Decoder(nn.Module):
    """A decoder of a user's own: causal attention, attention to the memory, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT - 8, WIDTH)
        self.q, self.k, self.v, self.q2, self.k2, self.v2 = (nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        x = x + attend(self.q(x), self.k(x), self.v(x), True)
        x = x + attend(self.q2(x), self.k2(memory), self.v2(memory), False)
        logits: torch.Tensor = self.head(x)
        return logits


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Three heads of attention on [1, T, width]."""
    split = [x.view(1, -1, 3, WIDTH // 3).transpose(1, 2) for x in (q, k, v)]
    out = nn.functional.scaled_dot_product_attention(*split, is_causal=causal)
    return out.transpose(1, 2).reshape(1, -1, WIDTH)


def graphs(model: FrontendModel) -> tuple[ir.GraphOp, ir.GraphOp]:
    """The encoder's and the decoder's graph of a verified module."""
    verify(model.module)
    encoder, decoder = model.module.body.block.ops
    assert isinstance(encoder, ir.GraphOp) and encoder.encoder
    assert isinstance(decoder, ir.GraphOp) and not decoder.encoder
    return encoder, decoder


def require_equal(brought: FrontendModel, expected: Callable[[list[int], list[int]], torch.Tensor]) -> None:
    """Encoder and step agree with torch in float64 for several lengths of source and target."""
    runner = StepInterpreter(brought.module, lambda name: torch.from_numpy(brought.lookup(name)), torch.float64)
    made = torch.Generator().manual_seed(1)
    for source, target in ((1, 1), (2, 9), (13, 4), (30, 20)):
        words = torch.randint(VOCAB, (source,), generator=made).tolist()
        tokens = torch.randint(VOCAB, (target,), generator=made).tolist()
        runner.encode(words)
        found = torch.stack([runner.step(token, position) for position, token in enumerate(tokens)])
        wanted = expected(words, tokens)
        assert wanted.dtype == torch.float64
        assert float(wanted.std()) > 0.1
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_equal_torch(name: str) -> None:
    model = FAMILIES[name]()
    brought = load_model(model, {"context": CONTEXT, "source_context": CONTEXT - 4})
    facts = {"vocab": VOCAB, "context": CONTEXT, "source_context": CONTEXT - 4, "eos_token_id": 1}
    assert brought.config == {**facts, "decoder_start_token_id": 0, "is_encoder_decoder": True}
    exact = in_float64(model)

    def expected(source: list[int], target: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = exact(torch.tensor([source]), decoder_input_ids=torch.tensor([target])).logits[0]
        return logits

    require_equal(brought, expected)


def test_a_checkpoint_with_a_head_of_its_own(tmp_path: Path) -> None:
    model = FAMILIES["T5 v1.1"]()
    model.save_pretrained(tmp_path)
    brought = import_model(tmp_path, {"context": CONTEXT})
    encoder, decoder = graphs(brought)
    assert [argument.type.get_shape()[-1] for argument in decoder.body.block.args[1:]] == [WIDTH]
    assert encoder.context.value.data == decoder.context.value.data == CONTEXT
    for name, tensor in (("lm_head.weight", model.lm_head.weight), ("shared.weight", model.shared.weight)):
        assert torch.equal(torch.from_numpy(brought.lookup(name)), tensor)
    sources = {ir.text(op.source) for op in decoder.body.block.ops if isinstance(op, ir.ParameterOp)}
    assert {"lm_head.weight", "shared.weight"} <= sources
    assert not any(name.startswith("encoder.") for name in sources)


def test_lengths_and_tokens_come_from_the_files(tmp_path: Path) -> None:
    model = FAMILIES["T5 v1.0"]()
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    without = [line for line in config.splitlines() if "start_token" not in line and "eos" not in line]
    (tmp_path / "config.json").write_text("\n".join(without))
    (tmp_path / "generation_config.json").write_text('{"decoder_start_token_id": 7, "eos_token_id": 9}')
    facts = import_model(tmp_path).config
    assert (facts["context"], facts["source_context"]) == (512, 512)
    assert (facts["decoder_start_token_id"], facts["eos_token_id"]) == (7, 9)
    assert import_model(tmp_path, {"decoder_start_token_id": 3}).config["decoder_start_token_id"] == 3


def test_a_pair_of_plain_modules() -> None:
    torch.manual_seed(2)
    encoder, decoder = randomised(Encoder()), randomised(Decoder())
    decoder.tokens = encoder.tokens
    brought = import_model((encoder, decoder), {"decoder_start_token_id": 2, "name": "own"})
    first, second = graphs(brought)
    assert (first.context.value.data, second.context.value.data) == (CONTEXT, CONTEXT - 8)
    assert brought.name == "own"
    assert "decoder.tokens.weight" not in brought.weights.names()
    types = [argument.type for argument in second.body.block.args]
    assert all(isinstance(t, TensorType) for t in types) and len(types) == 2
    lowered = load_model((encoder, decoder), {"decoder_start_token_id": 2})
    encoder.double(), decoder.double()

    def expected(source: list[int], target: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = decoder(torch.tensor([target]), encoder(torch.tensor([source])))[0]
        return logits

    require_equal(lowered, expected)


def test_a_decoder_without_cross_attention_is_no_pair() -> None:
    config = tf.T5Config(**{**SHAPE, "num_layers": 2, "is_decoder": True, "is_encoder_decoder": False})
    stack = tf.T5EncoderModel(config).encoder
    brought = import_model(nn.Sequential(Last(stack), nn.Linear(WIDTH, VOCAB)), {"context": CONTEXT})
    verify(brought.module)
    assert len(list(brought.module.body.block.ops)) == 1
    assert "is_encoder_decoder" not in brought.config


class Last(nn.Module):
    """A stack's last states as a tensor."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.stack(input_ids=ids, use_cache=False).last_hidden_state
        return states


class Flat(nn.Module):
    """An encoder that returns no memory [1, S, D]."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        self.axes, self.tokens = axes, nn.Embedding(VOCAB, WIDTH)

    def forward(self, ids: torch.Tensor) -> object:
        x = self.tokens(ids)
        return [x] if self.axes == 0 else x.mean(1)


@pytest.mark.parametrize(
    ("source", "config", "message"),
    [
        ((Flat(0), Decoder()), {}, "an encoder must return a memory .* not list"),
        ((Flat(2), Decoder()), {}, "an encoder must return a memory"),
        ((Encoder(), Decoder()), {}, "which token the decoder starts from"),
        ((Encoder(), Decoder()), {"decoder_start_token_id": VOCAB}, "= 61 is outside the vocabulary of 61 tokens"),
        ((Encoder(), Decoder()), {"source_context": 0}, "source_context must be a positive number"),
        ((Encoder(),), {}, "a pair of modules is"),
        ((Encoder(), "decoder"), {}, "a pair of modules is"),
    ],
)
def test_bad_pairs_give_one_line(source: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(TypebarError, match=message) as caught:
        import_model(source, config)
    assert "\n" not in str(caught.value)
