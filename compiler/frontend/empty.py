"""Models without values: built from a configuration on the meta device, to be exported and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from typebar.compiler.frontend.kinds import builder_of, refuse_experts
from typebar.compiler.problems import first_line
from typebar.isa.errors import TypebarError

_LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from logging and from drawing bars: users hear of what matters by errors, in one line."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def check_layers(config: Any, tensors: int, path: Path) -> None:
    """Refuse a configuration with no layers, or with more than its `tensors` stored tensors, which no model has.

    Raises:
        TypebarError: it does.
    """
    for key in _LAYERS:
        layers = getattr(config, key, None)
        if isinstance(layers, int) and layers < 1:
            raise TypebarError(f"{path} gives {layers} layers; it must describe its weights, with at least 1")
        if isinstance(layers, int) and layers > tensors:
            raise TypebarError(f"{path} gives {layers} layers and {tensors} tensors; it must describe its weights")


def empty_model(config: Any) -> torch.nn.Module:
    """The model of a configuration on the meta device, in float32 and without values.

    Raises:
        TypebarError: transformers cannot build it; UnsupportedError for a kind of model that no machine runs.
    """
    builder = builder_of(config)
    try:
        with torch.device("meta"):
            model: torch.nn.Module = builder.from_config(config, dtype=torch.float32)
    except Exception as error:  # the builders raise many kinds for the configurations they do not support
        raise TypebarError(f"cannot build a model from this configuration: {first_line(error)}") from error
    refuse_experts(model)
    return model


def all_names(model: torch.nn.Module) -> dict[str, str]:
    """The name that stands for each parameter's tensor, by all its names."""
    first: dict[int, str] = {}
    return {n: first.setdefault(id(t), n) for n, t in model.named_parameters(remove_duplicate=False)}


def renamer(model: torch.nn.Module) -> Callable[[str], str]:
    """What turns the name of a stored tensor into the model's name for it, as transformers reads old checkpoints."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    return lambda key: str(rename_source_key(key, rules, [])[0])


def untie(model: torch.nn.Module, names: Sequence[str]) -> None:
    """Give the parameters `names`, which the builder tied to others, tensors of their own."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, leaf, torch.nn.Parameter(torch.empty_like(getattr(module, leaf)), requires_grad=False))


def computed_buffers(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The buffers that no checkpoint stores, such as tables of frequencies, as the model's own initialisation has them.

    `model` is on the meta device; its parameters stay there.
    """
    places = [(m, n, f"{p}.{n}" if p else n) for p, m in model.named_modules() for n in m._non_persistent_buffers_set]
    places = [(module, leaf, name) for module, leaf, name in places if isinstance(module._buffers[leaf], torch.Tensor)]
    if not places or not hasattr(model, "initialize_weights"):
        return {}
    for module, leaf, _ in places:
        module._buffers[leaf] = torch.empty_like(module._buffers[leaf], device="cpu")
    owners = {module for module, _, _ in places}
    for module in model.modules():
        module._is_hf_initialized = module not in owners
    try:
        model.initialize_weights()
    except Exception as error:  # each model initialises its modules in its own way
        raise TypebarError(f"cannot compute the model's buffers: {first_line(error)}") from error
    return {name: module._buffers[leaf].numpy() for module, leaf, name in places}
