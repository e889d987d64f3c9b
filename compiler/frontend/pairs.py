"""Which functions of a model are exported: a decoder's logits, or an encoder's memory and then the logits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from typebar.compiler.frontend.assembly import FrontendModel, assemble, memory_width
from typebar.compiler.frontend.torch_import import export, logits_in
from typebar.compiler.frontend.torch_import import logits as decoder_logits
from typebar.compiler.frontend.weights import WeightSource
from typebar.isa.errors import TypebarError


class Pair(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """An encoder, from token ids [1, S] to a memory [1, S, D], and a decoder, from (ids [1, T], memory) to logits."""

    def __init__(self, encoder: torch.nn.Module, decoder: torch.nn.Module) -> None:
        """Hold both; tensors that they share stay shared."""
        super().__init__()
        self.encoder, self.decoder = encoder, decoder


def has_encoder(model: torch.nn.Module) -> bool:
    """Whether a model is a pair: one of this module's, or one whose configuration says so."""
    return isinstance(model, Pair) or bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def import_functions(
    name: str, model: torch.nn.Module, source: WeightSource, facts: Mapping[str, Any], tokenizer: bytes | None = None
) -> FrontendModel:
    """Export what `model` computes, and assemble it with its weights; raises TypebarError if torch cannot."""
    if not has_encoder(model):
        return assemble(name, source, export(model, context=facts.get("context")), facts, tokenizer=tokenizer)
    if not isinstance(model, Pair):
        _check_pair(model)
    encoder = export(model, _memory)
    decoder = export(model, _logits, memory_width(encoder))
    return assemble(name, source, decoder, facts, encoder, tokenizer)


def _check_pair(model: torch.nn.Module) -> None:
    accepted = inspect.signature(model.forward).parameters
    if not hasattr(model, "get_encoder") or not {"encoder_outputs", "decoder_input_ids"} <= set(accepted):
        raise TypebarError(
            f"{type(model).__name__} is an encoder-decoder without get_encoder() or without encoder_outputs and "
            "decoder_input_ids in its forward; give the pair (encoder module, decoder module) instead"
        )


def _memory(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    out = model.encoder(ids) if isinstance(model, Pair) else model.get_encoder()(input_ids=ids)
    found = out if isinstance(out, torch.Tensor) else getattr(out, "last_hidden_state", None)
    if not isinstance(found, torch.Tensor):
        raise TypebarError(
            f"an encoder must return a memory [1, S, D] or an object with .last_hidden_state, not {type(out).__name__}"
        )
    return found


def _logits(model: torch.nn.Module, ids: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    if isinstance(model, Pair):
        return decoder_logits(model.decoder, ids, memory)
    return logits_in(model(encoder_outputs=(memory,), decoder_input_ids=ids, use_cache=False))
