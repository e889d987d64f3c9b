"""What a configuration says that is no part of the graph: lengths, the tokens that start and end a text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from typebar.isa.errors import TypebarError

_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "seq_length",
    "context",
    "block_size",
)
_SPECIAL = ("eos_token_id", "decoder_start_token_id", "bos_token_id", "pad_token_id")
_LARGEST_JSON = 1 << 24

PAIR_FACTS = ("bos_token_id", "pad_token_id", "decoder_start_token_id", "source_context", "is_encoder_decoder")
"""What a configuration says of an encoder-decoder only, or only to find the token that its decoder starts from."""

NO_END = -1
"""What stands for an end of text where there is to be none."""

PAIR_CONTEXT = 512
"""The context of an encoder-decoder whose positions are relative and whose configuration says nothing, in tokens."""


def facts_of(config: Any) -> dict[str, Any]:
    """Context and special tokens of a configuration object or mapping; what it lacks is left out."""
    if config is None:
        return {}
    read: Callable[[str], Any] = config.get if isinstance(config, Mapping) else lambda key: getattr(config, key, None)
    found = {key: read(key) for key in (*_SPECIAL, "source_context")}
    found["context"] = next((v for v in map(read, _CONTEXT_KEYS) if isinstance(v, int)), None)
    return {key: value for key, value in found.items() if value is not None}


def facts_beside(directory: Path) -> dict[str, Any]:
    """The special tokens that a directory's files name, config.json first, and its chat template if it has one."""
    facts: dict[str, Any] = {}
    for file in ("generation_config.json", "config.json"):
        found = read_json(directory / file)
        facts |= {key: found[key] for key in _SPECIAL if found.get(key) is not None}
    template = chat_template(directory)
    if template is None:
        return facts
    return {**facts, "chat_template": template, "special_tokens": _special_texts(directory)}


def _special_texts(directory: Path) -> dict[str, str]:
    """The texts of the special tokens that a chat template may ask for."""
    found = read_json(directory / "tokenizer_config.json")
    texts = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = found.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            texts[name] = value
    return texts


def chat_template(directory: Path) -> str | None:
    """The chat template that a checkpoint directory holds, in a file of its own or in its tokenizer's configuration."""
    own = directory / "chat_template.jinja"
    if own.is_file():
        return _read_text(own)
    found = read_json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a file, empty if there is no file; raises TypebarError for one that holds anything else."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise TypebarError(f"cannot read {path}: {str(error).splitlines()[0]}; copy the checkpoint again") from error
    if not isinstance(found, dict):
        raise TypebarError(f"{path} holds a {type(found).__name__}, not a mapping; copy the checkpoint again")
    return found


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _LARGEST_JSON:
            raise TypebarError(f"{path} has {size} bytes, too many for a configuration; copy the checkpoint again")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TypebarError(f"cannot read {path}: {error}; copy the checkpoint again") from error


def ends_of(end: Any, vocab: int) -> int | list[int] | None:
    """The tokens that end a text, of one token or a list: None, one, or several in their order, each once.

    What is no token of the vocabulary ends no text and is left out.
    """
    listed = end if isinstance(end, list | tuple) else [end]
    known = dict.fromkeys(token for item in listed if (token := token_or_none(item, vocab)) is not None)
    tokens = list(known)
    return tokens if len(tokens) > 1 else tokens[0] if tokens else None


def token_or_none(token: Any, vocab: int) -> int | None:
    """A token of the vocabulary, or None for anything else."""
    known = isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocab
    return token if known else None


def check_given(given: Mapping[str, Any], vocab: int, encoder: bool) -> None:
    """Refuse what a user says of a model and what it cannot have; the same in a checkpoint's files is only left out.

    Raises:
        TypebarError: an end outside the vocabulary of `vocab` tokens, or a fact of pairs without an encoder.
    """
    ends = given.get("eos_token_id")
    for token in ends if isinstance(ends, list | tuple) else [] if ends is None else [ends]:
        if token != NO_END and token_or_none(token, vocab) is None:
            raise TypebarError(
                f"eos_token_id = {token!r} is outside the vocabulary of {vocab} tokens: give 0 to {vocab - 1}, or"
                f" {NO_END} for no end"
            )
    for key in ("source_context", "decoder_start_token_id"):
        if not encoder and given.get(key) is not None:
            raise TypebarError(
                f"{key} = {given[key]!r} is for models with an encoder, and this one has none: leave it out"
            )


def length_of(facts: Mapping[str, Any], key: str) -> int | None:
    """A declared length in tokens, or None; raises TypebarError for one that is no positive number."""
    declared = facts.get(key)
    if declared is None:
        return None
    if isinstance(declared, bool) or not isinstance(declared, int) or not 0 < declared < 2**31:
        raise TypebarError(f"{key} must be a positive number of tokens, not {declared!r}")
    return declared


def start_token(facts: Mapping[str, Any], vocab: int) -> int:
    """The token that a decoder with an encoder starts from; raises TypebarError if nothing says, or wrongly."""
    start = facts.get("decoder_start_token_id")
    if start is not None and token_or_none(start, vocab) is None:
        raise TypebarError(
            f"decoder_start_token_id = {start!r} is outside the vocabulary of {vocab} tokens: give 0 to {vocab - 1}"
        )
    for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        token = token_or_none(facts.get(key), vocab)
        if token is not None:
            return token
    raise TypebarError(
        "nothing says which token the decoder starts from: give config={'decoder_start_token_id': N}, or write it into "
        "config.json"
    )
