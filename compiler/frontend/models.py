"""What a user may name as a model, and how each becomes a graph, weights, a tokenizer and a configuration."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

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


class Shape(NamedTuple):
    """A model without weights: a transformers configuration class and the sizes that differ from its defaults."""

    width: int
    heads: int
    layers: int
    config: str = "GPT2Config"
    others: Mapping[str, int] = {}

    @property
    def kv_heads(self) -> int:
        """Heads of K and V."""
        return 1 if self.config == "GPTBigCodeConfig" else self.others.get("num_key_value_heads", self.heads)


SHAPES: Mapping[str, Shape] = {
    "gpt2": Shape(768, 12, 12),
    "gpt2-medium": Shape(1024, 16, 24),
    "gpt2-large": Shape(1280, 20, 36),
    "gpt2-xl": Shape(1600, 25, 48),
    "dfx-345m": Shape(1024, 16, 24),
    "dfx-774m": Shape(1280, 20, 36),
    "dfx-1.5b": Shape(1536, 24, 48),
    "tinyllama-1.1b": Shape(
        2048, 32, 22, "LlamaConfig", {"num_key_value_heads": 4, "intermediate_size": 5632, "vocab_size": 32000}
    ),
    "santacoder-32k": Shape(2048, 16, 24, "GPTBigCodeConfig", {"max_position_embeddings": 32768, "vocab_size": 49280}),
}
"""Shapes without weights: GPT-2's and DFX's, with 1024 positions and 50257 tokens; TinyLlama's (Zhang et al. 2024); and
SantaCoder's (GPTBigCode, 1.1 billion parameters, one K/V head), with 16 times its 2048 positions."""

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
    import transformers

    shape = SHAPES[name]
    sizes = {"hidden_size": shape.width, "num_attention_heads": shape.heads, "num_hidden_layers": shape.layers}
    config = getattr(transformers, shape.config)(**sizes, **shape.others)
    model = empty_model(config)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    made = import_functions(name, model, ShapeSource(shapes), facts_of(config))
    for buffer, values in computed_buffers(model).items():
        made.weights.define(buffer, values.shape, lambda values=values: values)  # type: ignore[misc]
    return made
