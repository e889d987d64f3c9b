"""Kinds of model that a configuration may describe and no machine runs, refused in one line before anything is read."""

from __future__ import annotations

from typing import Any

import torch

from typebar.compiler.problems import Problem, UnsupportedError

_DECODING = ("is_decoder", "causal")
"""Flags that make a decoder of a model which is an encoder without them."""


def builder_of(config: Any) -> Any:
    """The class of transformers that builds this configuration's model: a decoder, or an encoder-decoder pair.

    Raises:
        UnsupportedError: it is an encoder alone, or no model that transformers would generate text with.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
    )

    kind = type(config)
    if getattr(config, "is_encoder_decoder", False):
        known, builder, alone = kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoModelForSeq2SeqLM, False
    else:
        known, builder = kind in MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
        halves = kind in MODEL_FOR_MASKED_LM_MAPPING or (not known and kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
        alone = halves and not any(getattr(config, flag, False) for flag in _DECODING)
    if known and not alone:
        return builder
    name = next(iter(getattr(config, "architectures", None) or ()), kind.__name__)
    reason = "an encoder alone, which generates no text" if alone else "a model that does not generate text from text"
    raise UnsupportedError(Problem(str(name), reason, "give a decoder or an encoder-decoder, or run it in torch"))


def refuse_experts(model: torch.nn.Module) -> None:
    """Refuse a mixture of experts, known by the modules that hold them.

    Raises:
        UnsupportedError: it is one.
    """
    for path, module in model.named_modules():
        if path.endswith("experts") or type(module).__name__.endswith("Experts"):
            reason = "a mixture of experts, whose router chooses weights by the values of each token, is not supported"
            remedy = "give a dense model, or run it in torch"
            raise UnsupportedError(Problem(type(model).__name__, reason, remedy, path))
