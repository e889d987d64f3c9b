"""What a user may name as a model, and how each becomes a graph, weights, a tokenizer and a configuration."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from typebar.compiler.frontend.assembly import FrontendModel
from typebar.compiler.frontend.checkpoints import from_directory
from typebar.compiler.frontend.empty import computed_buffers, empty_model, quiet
from typebar.compiler.frontend.facts import check_given, facts_of
from typebar.compiler.frontend.gguf import from_gguf
from typebar.compiler.frontend.onnx import find_onnx, import_onnx
from typebar.compiler.frontend.pairs import Pair, import_functions
from typebar.compiler.frontend.weights import ModuleSource, ShapeSource
from typebar.compiler.pipeline import lower
from typebar.compiler.problems import first_line
from typebar.isa.errors import TypebarError

_GPT2_SHAPES: Mapping[str, tuple[int, int, int]] = {
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 16, 24),
    "gpt2-large": (1280, 20, 36),
    "gpt2-xl": (1600, 25, 48),
    "dfx-345m": (1024, 16, 24),
    "dfx-774m": (1280, 20, 36),
    "dfx-1.5b": (1536, 24, 48),
}
"""(width, heads, layers). All have GPT-2's vocabulary of 50257 and 1024 positions."""
_LLAMA_SHAPES: Mapping[str, Mapping[str, int]] = {
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_hidden_layers": 22,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
}
"""Rotary positions, grouped queries and gated products; TinyLlama's configuration (Zhang et al. 2024)."""
SHAPES: Mapping[str, tuple[int, int, int]] = {
    **_GPT2_SHAPES,
    **{name: (c["hidden_size"], c["num_attention_heads"], c["num_hidden_layers"]) for name, c in _LLAMA_SHAPES.items()},
}
"""Shapes without weights: (width, heads, layers)."""

Source: TypeAlias = str | Path | torch.nn.Module | tuple[torch.nn.Module, torch.nn.Module]
"""A checkpoint directory, a GGUF or ONNX file or the name of a shape; a module from token ids [1, T] to logits; an
encoder-decoder, as one module that transformers would call so or as a pair of modules, from token ids [1, S] to a
memory [1, S, D] and from token ids [1, T] and the memory to logits."""


def load_model(source: Source, config: Mapping[str, Any] | None = None) -> FrontendModel:
    """A model as one re-rolled `tb.step`, after its `tb.encoder` if it has one, with its weights bound lazily.

    `config` is for what the source does not say or says wrongly: context, source_context, eos_token_id,
    decoder_start_token_id, name; what it lacks comes from the source's own configuration or position table. Raises
    TypebarError; LoweringError lists everything in the graph that cannot be lowered.
    """
    model = import_model(source, config)
    lower(model.module, model.lookup, model.weights.define)
    return model


def import_model(source: Source, config: Mapping[str, Any] | None = None) -> FrontendModel:
    """The same as `load_model`, with the graph as imported and no pass run yet."""
    given = {k: v for k, v in (config or {}).items() if v is not None}
    with quiet():
        model = _imported(source, given)
    check_given(given, model.config["vocab"], bool(model.config.get("is_encoder_decoder")))
    return model


def _imported(source: Source, given: dict[str, Any]) -> FrontendModel:
    if isinstance(source, tuple):
        return _from_module(_pair(source), given)
    if isinstance(source, torch.nn.Module):
        return _from_module(source, given)
    if isinstance(source, str) and source in SHAPES and not Path(source).exists():
        return _from_shape(source)
    path = Path(source)
    if path.is_file() and path.suffix == ".onnx":
        return import_onnx(path, given)
    if path.is_file() and path.suffix == ".gguf":
        return from_gguf(path, given)
    if not path.is_dir():
        raise TypebarError(no_model(str(source), SHAPES))
    files = None if any(path.glob("*.safetensors*")) else find_onnx(path)
    return from_directory(path, given) if files is None else import_onnx(files, given)


def no_model(name: str, known: Iterable[str] = (), image: bool = False) -> str:
    """What to say where `name` is no model; `known` are the names that would be, `image` if images would do too."""
    return (
        f"no {'image or ' if image else ''}model {name!r}: give {'an image, ' if image else ''}a checkpoint directory,"
        " an .onnx or .gguf file, a directory with encoder.onnx and decoder.onnx"
        + "".join(f", or one of {names}" for names in [", ".join(known)] if names)
    )


def _pair(source: tuple[torch.nn.Module, ...]) -> Pair:
    if len(source) != 2 or not all(isinstance(module, torch.nn.Module) for module in source):
        raise TypebarError("a pair of modules is (encoder, decoder); give two torch modules")
    return Pair(*source)


def _from_module(model: torch.nn.Module, given: dict[str, Any]) -> FrontendModel:
    """A module of the user's, whose weights are its own tensors."""
    single = _in_float32(model)
    facts = {**facts_of(getattr(model, "config", None)), **_generation_facts(model), **given}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    name = str(given.get("name") or type(model).__name__.lower())
    return import_functions(name, single, ModuleSource(tensors), facts)


def _generation_facts(model: torch.nn.Module) -> dict[str, Any]:
    """Special tokens that a module's configuration leaves to its generation configuration."""
    found = facts_of(getattr(model, "generation_config", None))
    known = facts_of(getattr(model, "config", None))
    return {k: v for k, v in found.items() if k.endswith("_token_id") and k not in known}


def _in_float32(model: torch.nn.Module) -> torch.nn.Module:
    """The module itself, or a float32 copy of one with floating parameters of another type."""
    if all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point()):
        return model
    try:
        single: torch.nn.Module = copy.deepcopy(model).float()
    except Exception as error:  # modules may refuse either, each in its own way
        raise TypebarError(
            f"cannot copy the module to float32: {first_line(error)}; give it with parameters in torch.float32"
        ) from error
    return single


def _from_shape(name: str) -> FrontendModel:
    from transformers import GPT2Config, LlamaConfig, PretrainedConfig

    config: PretrainedConfig
    if name in _LLAMA_SHAPES:
        config = LlamaConfig(**_LLAMA_SHAPES[name])
    else:
        width, heads, layers = _GPT2_SHAPES[name]
        config = GPT2Config(n_embd=width, n_head=heads, n_layer=layers)
    model = empty_model(config)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    made = import_functions(name, model, ShapeSource(shapes), facts_of(config))
    for buffer, values in computed_buffers(model).items():
        made.weights.define(buffer, values.shape, lambda values=values: values)  # type: ignore[misc]
    return made
