"""What a user may name as a model, and how each becomes a graph, weights, a tokenizer and a configuration."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from xdsl.dialects.builtin import DYNAMIC_INDEX, ModuleOp, TensorType

from typebar.compiler import ir
from typebar.compiler.aten import base_name, depends_on_tokens
from typebar.compiler.frontend.torch_import import Exported, export, to_graph
from typebar.compiler.frontend.weights import DerivedSource, ModuleSource, ShapeSource, WeightSource, bind
from typebar.compiler.pipeline import lower
from typebar.isa.errors import TypebarError

SHAPES: Mapping[str, tuple[int, int, int]] = {
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 16, 24),
    "gpt2-large": (1280, 20, 36),
    "gpt2-xl": (1600, 25, 48),
    "dfx-345m": (1024, 16, 24),
    "dfx-774m": (1280, 20, 36),
    "dfx-1.5b": (1536, 24, 48),
}
"""Shapes without weights: (width, heads, layers). All have GPT-2's vocabulary of 50257 and 1024 positions."""

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context", "block_size")


@dataclass(frozen=True)
class FrontendModel:
    """A model, brought in.

    `module` holds the graph as imported, or the re-rolled step once lowered; `config` has at least context, vocab and
    eos_token_id (None if there is none). `weights` has the parameters, the buffers and the constants that the graph
    names, and takes those that the passes derive from them.
    """

    module: ModuleOp
    weights: DerivedSource
    tokenizer_json: bytes | None
    config: dict[str, Any]
    name: str

    def lookup(self, name: str) -> np.ndarray:
        """The values of a parameter, a buffer or a derived tensor; raises TypebarError if there are none."""
        return self.weights.load(name)


def load_model(source: str | Path | torch.nn.Module, config: Mapping[str, Any] | None = None) -> FrontendModel:
    """A model as one re-rolled `tb.step`, with its weights bound lazily.

    `source` is a checkpoint directory, a module from token ids [1, T] to logits, or the name of one of SHAPES. `config`
    is for modules: context, eos_token_id, name; what it lacks comes from the module's own config or position table.
    Raises TypebarError; LoweringError lists everything in the graph that cannot be lowered.
    """
    model = import_model(source, config)
    lower(model.module, model.lookup, model.weights.define)
    return model


def import_model(source: str | Path | torch.nn.Module, config: Mapping[str, Any] | None = None) -> FrontendModel:
    """The same as `load_model`, with the graph as imported and no pass run yet."""
    if isinstance(source, torch.nn.Module):
        return _from_module(source, dict(config or {}))
    if isinstance(source, str) and source in SHAPES and not Path(source).exists():
        return _from_shape(source)
    directory = Path(source)
    if not directory.is_dir():
        raise TypebarError(f"no model at {str(source)!r}: give a checkpoint directory or one of {', '.join(SHAPES)}")
    return _from_directory(directory)


def _from_module(model: torch.nn.Module, given: dict[str, Any]) -> FrontendModel:
    own = getattr(model, "config", None)
    merged = {**_facts(own), **{k: v for k, v in given.items() if v is not None}}
    exported = export(_in_float32(model))
    module, config = _graph(exported, merged)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    name = str(given.get("name") or type(model).__name__.lower())
    return FrontendModel(module, _with_constants(ModuleSource(tensors), exported), None, config, name)


def _in_float32(model: torch.nn.Module) -> torch.nn.Module:
    """The module itself, or a float32 copy of one with floating parameters of another type."""
    if all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point()):
        return model
    try:
        single: torch.nn.Module = copy.deepcopy(model).float()
    except Exception as error:  # modules may refuse either, each in its own way
        raise TypebarError(
            f"cannot copy the module to float32: {_first_line(error)}; give it with parameters in torch.float32"
        ) from error
    return single


def _from_shape(name: str) -> FrontendModel:
    from transformers import GPT2Config

    width, heads, layers = SHAPES[name]
    config = GPT2Config(n_embd=width, n_head=heads, n_layer=layers)
    model = _empty_model(config)
    exported = export(model)
    module, facts = _graph(exported, _facts(config))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    return FrontendModel(module, _with_constants(ShapeSource(shapes), exported), None, facts, name)


def _from_directory(directory: Path) -> FrontendModel:
    from transformers import AutoConfig

    path = directory / "config.json"
    if not path.is_file():
        raise TypebarError(f"{directory} has no config.json; give a checkpoint directory in Hugging Face's layout")
    try:
        json.loads(path.read_text())
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the reader raises whatever the file's contents provoke
        raise TypebarError(f"cannot read {path}: {_first_line(error)}") from error
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:
        raise TypebarError(f"{path} gives {layers} layers; it must describe its weights, with at least 1")
    model = _empty_model(config)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    shapes |= {n: tuple(b.shape) for n, b in model.named_buffers() if n in model.state_dict()}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    aliases = {n: first.setdefault(id(t), n) for n, t in tensors.items()}
    weights = bind(directory, aliases, shapes, getattr(model, "base_model_prefix", ""))
    exported = export(model)
    module, facts = _graph(exported, _facts(config))
    tokenizer = directory / "tokenizer.json"
    text = tokenizer.read_bytes() if tokenizer.is_file() else None
    return FrontendModel(module, _with_constants(weights, exported), text, facts, directory.resolve().name)


def _empty_model(config: Any) -> torch.nn.Module:
    """The model of a configuration on the meta device, in float32 and without values."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # the builders raise many kinds for the configurations they do not support
        raise TypebarError(f"cannot build a decoder from this configuration: {_first_line(error)}") from error
    return model


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _facts(config: Any) -> dict[str, Any]:
    """Context and end of text, from a configuration object or mapping."""
    read: Callable[[str], Any] = config.get if isinstance(config, Mapping) else lambda key: getattr(config, key, None)
    if config is None:
        return {}
    context = next((v for v in map(read, _CONTEXT_KEYS) if isinstance(v, int)), None)
    return {"context": context, "eos_token_id": read("eos_token_id")}


def _with_constants(source: WeightSource, exported: Exported) -> DerivedSource:
    """The source, and the constants that the graph names."""
    weights = DerivedSource(source)
    for name, tensor in exported.constants.items():
        if not tensor.is_meta:
            weights.define(name, tuple(tensor.shape), lambda tensor=tensor: tensor.detach().cpu().numpy())  # type: ignore[misc]
    return weights


def _graph(exported: Exported, facts: Mapping[str, Any]) -> tuple[ModuleOp, dict[str, Any]]:
    """The imported graph and the configuration that goes with it."""
    declared = facts.get("context")
    if declared is not None and (not isinstance(declared, int) or declared < 1):
        raise TypebarError(f"context must be a positive number of tokens, not {declared!r}")
    end = _one_end(facts.get("eos_token_id"))
    module = to_graph(exported, declared or 1)
    graph = module.body.block.first_op
    assert isinstance(graph, ir.GraphOp)
    context = declared or _position_rows(graph) or exported.limit
    if context is None:
        raise TypebarError("the model has no table of positions that bounds its length; give config={'context': N}")
    graph.properties["context"] = ir.number(context)
    last = graph.body.block.last_op
    assert isinstance(last, ir.ReturnOp)
    vocab = ir.width(last.values[0]) if len(last.values) == 1 else None
    if vocab is None or vocab == DYNAMIC_INDEX:
        raise TypebarError("a model must return logits [1, T, V] with a fixed vocabulary, and nothing else")
    known = isinstance(end, int) and 0 <= end < vocab
    return module, {**facts, "context": context, "vocab": vocab, "eos_token_id": end if known else None}


def _one_end(end: Any) -> Any:
    """The end-of-text token of a configuration, which may list it; raises TypebarError for a list of several."""
    if not isinstance(end, list | tuple):
        return end
    if len(end) > 1:
        raise TypebarError(
            f"eos_token_id lists {len(end)} tokens, but only a single end-of-text token is supported; name one in "
            "config.json, or for a module with config={'eos_token_id': N}"
        )
    return end[0] if end else None


def _position_rows(graph: ir.GraphOp) -> int | None:
    """The rows of the smallest table that is looked up by position."""
    known: dict[Any, bool] = {}
    rows = []
    for op in graph.body.block.ops:
        if not isinstance(op, ir.AtenOp) or base_name(op) not in ("embedding", "slice"):
            continue
        table = op.inputs[0]
        positions = not any(depends_on_tokens(v, known) for v in op.inputs)
        if positions and isinstance(table.owner, ir.ParameterOp) and isinstance(table.type, TensorType):
            shape = table.type.get_shape()
            if len(shape) == 2:
                rows.append(shape[0])
    return min(rows) if rows else None
