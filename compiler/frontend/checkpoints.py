"""Checkpoints on disk: a directory in Hugging Face's layout, with safetensors or a GGUF file, through transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typebar.compiler.frontend.assembly import FrontendModel
from typebar.compiler.frontend.empty import all_names, check_layers, computed_buffers, empty_model, renamer, untie
from typebar.compiler.frontend.facts import facts_beside, facts_of, read_json
from typebar.compiler.frontend.gguf import from_gguf
from typebar.compiler.frontend.onnx import missing_half
from typebar.compiler.frontend.pairs import import_functions
from typebar.compiler.frontend.weights import bind, stored_tensors, tied_apart
from typebar.compiler.problems import first_line
from typebar.isa.errors import TypebarError


def from_directory(directory: Path, given: Mapping[str, Any]) -> FrontendModel:
    """The model of a checkpoint directory; `given` facts go before the directory's own.

    Its weights stay in their safetensors files. Without a config.json, its one GGUF file is taken. Raises TypebarError.
    """
    path = directory / "config.json"
    if not path.is_file():
        return _gguf_of(directory, given)
    config = _configuration(directory, path)
    stored = stored_tensors(directory)
    check_layers(config, len(stored), path)
    model = empty_model(config)
    rename = renamer(model)
    files = {rename(key): (file, key) for key, file in stored.items()}
    prefix = getattr(model, "base_model_prefix", "")
    untie(model, tied_apart(files, all_names(model), prefix))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    shapes |= {n: tuple(b.shape) for n, b in model.named_buffers() if n in model.state_dict()}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    weights = bind(directory, files, all_names(model), shapes, prefix, [re.compile(rf"(^|\.)({p})$") for p in ignored])
    tokenizer = directory / "tokenizer.json"
    text = tokenizer.read_bytes() if tokenizer.is_file() else None
    facts = {**facts_of(config), **facts_beside(directory), **given}
    made = import_functions(directory.resolve().name, model, weights, facts, text)
    for name, values in computed_buffers(model).items():
        made.weights.define(name, values.shape, lambda values=values: values)  # type: ignore[misc]
    return made


def _configuration(directory: Path, path: Path) -> Any:
    """The configuration object of a directory, checked enough for a model to be built from it."""
    from transformers import AutoConfig

    read_json(path)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the reader raises whatever the file's contents provoke
        raise TypebarError(f"cannot read {path}: {first_line(error)}") from error
    return config


def _gguf_of(directory: Path, given: Mapping[str, Any]) -> FrontendModel:
    files = sorted(directory.glob("*.gguf"))
    if not files:
        lone = missing_half(directory)
        if lone is not None:
            raise TypebarError(f"{directory} has {lone[0]} but no {lone[1]}; an encoder-decoder needs both")
        raise TypebarError(f"{directory} has no config.json; give a checkpoint directory in Hugging Face's layout")
    if len(files) > 1:
        raise TypebarError(f"{directory} has {len(files)} GGUF files and no config.json; give the path of one file")
    return from_gguf(files[0], given)
