"""Odd shapes and refusals that random models of every family found: short contexts, and one line for what cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import MinGPT, _t5_model
from step_models import StepWriter
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import typebar
from typebar.compiler.driver import build
from typebar.compiler.frontend import import_model, load_model
from typebar.compiler.problems import LoweringError
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import Format
from typebar.isa.machine import Machine


def test_a_decoder_context_of_any_length_sees_all_of_the_source(tmp_path: Path) -> None:
    """Five, too: a length at which masks over the source text are tried."""
    torch.manual_seed(0)
    model = _t5_model(num_layers=1, num_decoder_layers=1).eval()
    path, tokens, source = tmp_path / "t5.safetensors", [0, 4, 9, 2, 7], [5, 1, 8]
    typebar.compile(model, path, machine="tiny", devices=2, config={"context": 5, "source_context": 6})
    with typebar.load(path, device=["sim"]) as image, torch.no_grad():
        found = image.logits(tokens, source)
        out = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([tokens]))
    assert np.abs(found - out.logits[0].numpy()).max() < 0.01 * out.logits.abs().max()


def test_tables_shorter_than_the_usual_trace() -> None:
    assert load_model(MinGPT(layers=1, context=5), {"context": 5}).config["context"] == 5


def test_what_follows_a_refused_attention_is_passed_over() -> None:
    """OLMo 2's norms of products, before attention and behind it: one refusal, of the attention."""
    w = StepWriter(19, 8)
    x = w.embedding("token", "wte", 16)
    with w.layers(x, 2) as (x, result):
        q, k, v = (w.linear(x, 16, f"h.{{}}.{part}") for part in "qkv")
        out = w.linear(w.attention(w.norm(q, "h.{}.q_norm"), w.norm(k, "h.{}.k_norm"), v, 2, 2), 16, "h.{}.o")
        result.append(w.add(x, w.norm(out, "h.{}.ln")))
    model = w.model(w.linear(result[0], 19, "head"))
    with pytest.raises(LoweringError, match=r"1 operation cannot be lowered: .*q, k or v is not a linear operation's"):
        build(model, Machine.load("tiny"), 2, Format.FP16)


class ByLength(nn.Module):
    """A model that counts with a function of Python's numbers that is no operation of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(8, 4), nn.Embedding(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        first = torch.sym_max(ids.shape[1] - 9, 0)
        left, right = (self.wpe.weight[first:] + self.wte.weight[first:]).split(2, dim=1)
        logits: torch.Tensor = torch.cat([left, right], dim=1)[ids]
        return logits


def test_what_follows_a_refused_call_is_passed_over() -> None:
    with pytest.raises(LoweringError, match="1 operation cannot be lowered: sym_max: sym_max is no plain torch op"):
        import_model(ByLength(), {"context": 8})


def test_torch_prints_nothing_of_a_model_that_it_cannot_trace(capfd: pytest.CaptureFixture[str]) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, max_position_embeddings=20, rope_parameters=rope, **shape))
    with pytest.raises(TypebarError, match="data-dependent"):
        import_model(model)
    assert capfd.readouterr().err == ""
