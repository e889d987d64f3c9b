"""GGUF files, through transformers, which widens their quantised weights to float32."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from typebar.compiler.frontend.assembly import FrontendModel
from typebar.compiler.frontend.empty import check_layers, empty_model
from typebar.compiler.frontend.facts import facts_of
from typebar.compiler.frontend.gguf_header import Header, read_header
from typebar.compiler.frontend.pairs import import_functions
from typebar.compiler.frontend.weights import ModuleSource
from typebar.compiler.problems import first_line
from typebar.isa.errors import TypebarError


def from_gguf(path: Path, given: Mapping[str, Any]) -> FrontendModel:
    """The model, tokenizer and chat template of a GGUF file; `given` facts go before the file's own.

    transformers reads and widens all its weights at once: it takes memory for all of them in float32. Raises
    TypebarError for damaged files and for architectures that transformers does not know.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise TypebarError(f"reading {path} needs the packages gguf and accelerate: {first_line(error)}") from error
    header = read_header(path, {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()})
    try:
        with warnings.catch_warnings(action="ignore"), _read_once():
            model, tokenizer = _load(path, header)
    except TypebarError:
        raise
    except Exception as error:  # the readers raise whatever the file's contents provoke
        raise TypebarError(f"cannot read {path}: {first_line(error)}; copy the file again") from error
    facts = {**facts_of(model.config), **given}
    if isinstance(tokenizer.chat_template, str):
        facts["chat_template"] = tokenizer.chat_template
        special = tokenizer.special_tokens_map.items()
        facts["special_tokens"] = {name: str(text) for name, text in special if isinstance(text, str)}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    text: str = tokenizer.backend_tokenizer.to_str()
    return import_functions(path.stem, model, ModuleSource(tensors), facts, text.encode())


@contextmanager
def _read_once() -> Iterator[None]:
    """Lets transformers, which reads a file's header anew for each thing it makes, read it once, and draw no bar."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils

    library: Any = gguf
    widening: Any = modeling_gguf_pytorch_utils
    reader, bar, made = library.GGUFReader, widening.tqdm, dict[str, Any]()

    def once(path: Any) -> Any:
        if str(path) not in made:
            made[str(path)] = reader(path)
        return made[str(path)]

    library.GGUFReader = once
    widening.tqdm = lambda tensors, **_: tensors  # the one bar that transformers draws past its own switch
    try:
        yield
    finally:
        library.GGUFReader, widening.tqdm = reader, bar


def _load(path: Path, header: Header) -> tuple[torch.nn.Module, Any]:
    """The model with its weights, and its fast tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": path.name, "local_files_only": True}
    config = AutoConfig.from_pretrained(path.parent, **where)
    check_layers(config, len(header.shapes), path)
    wanted = sum(p.numel() for p in empty_model(config).parameters())
    if wanted > 2 * header.elements:
        raise TypebarError(
            f"{path} describes a model of {wanted} parameters but holds {header.elements}; copy the file again"
        )
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise TypebarError(f"{path} has no tokenizer that tokenizer.json can express; convert the model to safetensors")
    model, report = AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, output_loading_info=True, **where
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise TypebarError(f"{path} lacks {len(missing)} parameters, the first is {missing[0]!r}; copy the file again")
    return model, tokenizer
