"""What each input of an ONNX graph is for, and which of its outputs is the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from onnx import GraphProto, TensorProto, ValueInfoProto

from typebar.compiler.frontend.onnx.ops_math import DTYPES
from typebar.compiler.frontend.onnx.values import Filled, Size, Value
from typebar.compiler.problems import Problem
from typebar.isa.errors import TypebarError

_TOKENS = ("input_ids", "decoder_input_ids", "ids", "tokens", "input", "idx", "x")
_MEMORIES = ("encoder_hidden_states", "encoder_outputs", "encoder_output", "memory", "last_hidden_state")
_LOGITS = ("logits", "lm_logits", "output")
_STATES = ("last_hidden_state", "encoder_hidden_states", "hidden_states", "memory", "output")
_INTEGERS = (TensorProto.INT64, TensorProto.INT32)
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_EXPORT = "export the model again"


@dataclass(frozen=True)
class Inputs:
    """The roles of a graph's inputs: `roles` by name, `tokens` and `memory` the names of those two.

    `static` is the number of tokens that the graph was exported for, None for any. A role is tokens, memory, mask
    (one for each token), source_mask, positions, types, past or cache.
    """

    declared: dict[str, ValueInfoProto]
    roles: dict[str, str]
    static: int | None

    @property
    def takes_memory(self) -> bool:
        """Whether the graph is a decoder that reads an encoder's result."""
        return "memory" in self.roles.values()

    def memory_width(self) -> int:
        """The size of an encoder's vector; raises TypebarError if the graph leaves it open."""
        name = next(n for n, role in self.roles.items() if role == "memory")
        sizes = _sizes(self.declared[name])
        if len(sizes) != 3 or not isinstance(sizes[2], int):
            raise TypebarError(f"input {name!r} must be [batch, positions, width] with a fixed width; {_EXPORT}")
        return sizes[2]

    def values(self, ids: torch.Tensor, memory: torch.Tensor | None) -> dict[str, Value]:
        """What the inputs are for `ids` [1, T] and `memory` [1, S, D]: no padding and an empty cache."""
        made: dict[str, Value] = {}
        length: Size = ids.shape[1]
        source: Size = memory.shape[1] if memory is not None else length
        for name, role in self.roles.items():
            declared = self.declared[name]
            match role:
                case "tokens":
                    made[name] = ids if len(_sizes(declared)) != 1 else ids[0]
                case "memory":
                    made[name] = memory
                case "mask" | "source_mask" | "types":
                    dtype = DTYPES[declared.type.tensor_type.elem_type]
                    size = source if role == "source_mask" else length
                    made[name] = Filled((1, size), 0 if role == "types" else {torch.bool: True}.get(dtype, 1), dtype)
                case "positions":
                    places = torch.arange(length, device=ids.device)
                    made[name] = places if len(_sizes(declared)) == 1 else places[None]
                case "cache":
                    made[name] = np.zeros(tuple(s if isinstance(s, int) else 1 for s in _sizes(declared)), bool)
                case _:
                    made[name] = Filled(_empty_past(declared), 0.0, torch.float32)
        return made


def _sizes(value: ValueInfoProto) -> list[int | str]:
    """The declared sizes of an input's axes; what is open is text."""
    return [
        d.dim_value if d.WhichOneof("value") == "dim_value" else d.dim_param
        for d in value.type.tensor_type.shape.dim
    ]  # fmt: skip


def _empty_past(value: ValueInfoProto) -> tuple[int, ...]:
    """The shape of an empty cache: one text in the batch, no positions."""
    sizes = _sizes(value)
    batch = 1 if len(sizes) == 5 else 0
    return tuple(s if isinstance(s, int) else (1 if i == batch or "batch" in s else 0) for i, s in enumerate(sizes))


def find_inputs(graph: GraphProto, used: set[str], initialisers: set[str]) -> tuple[Inputs, list[Problem]]:
    """The role of every input that the graph reads, and a problem for each that has none.

    Raises TypebarError if there are no token ids.
    """
    declared = {v.name: v for v in graph.input if v.name not in initialisers}
    if len(declared) != sum(v.name not in initialisers for v in graph.input):
        raise TypebarError(f"two inputs of the graph have one name; {_EXPORT}")
    tokens = _token_input(declared)
    problems: list[Problem] = []
    memory = next((n for n, v in declared.items() if n != tokens and _is_memory(n, v)), None)
    roles: dict[str, str] = {}
    for name, value in declared.items():
        if name == tokens:
            roles[name] = "tokens"
        elif name == memory:
            roles[name] = "memory"
        elif name in used:
            role = _role(name, value, declared, memory)
            if isinstance(role, Problem):
                problems.append(role)
            else:
                roles[name] = role
    sizes = _sizes(declared[tokens])
    if len(sizes) > 2 or (len(sizes) == 2 and isinstance(sizes[0], int) and sizes[0] != 1):
        rule = f"input {tokens!r} is {sizes}; token ids are [1, T] or [batch, T] with an open batch"
        raise TypebarError(f"{rule}; {_EXPORT} for one text")
    static = sizes[-1] if sizes and isinstance(sizes[-1], int) and sizes[-1] > 0 else None
    return Inputs(declared, roles, static), problems


def _token_input(declared: dict[str, ValueInfoProto]) -> str:
    whole = [
        n for n, v in declared.items() if v.type.tensor_type.elem_type in _INTEGERS and len(_sizes(v)) in (0, 1, 2)
    ]
    found = next((n for n in _TOKENS if n in whole), None)
    if found is None:
        others = [n for n in whole if not any(w in n.lower() for w in ("mask", "position", "type", "past", "len"))]
        found = others[0] if len(others) == 1 else None
    if found is None:
        names = ", ".join(repr(n) for n in list(declared)[:6]) or "none"
        wrong = next((n for n in _TOKENS if n in declared), None)
        rule = f"{wrong!r} must be int64 or int32" if wrong else f"there is no input of token ids among {names}"
        raise TypebarError(f"the graph has no token ids to start from: {rule}; name them 'input_ids', int64 [batch, T]")
    return found


def _is_memory(name: str, value: ValueInfoProto) -> bool:
    floating = value.type.tensor_type.elem_type in _FLOATS and len(_sizes(value)) == 3
    return floating and (name in _MEMORIES or "encoder" in name.lower() or "memory" in name.lower())


def _role(name: str, value: ValueInfoProto, declared: dict[str, ValueInfoProto], memory: str | None) -> str | Problem:
    """What an input other than the tokens and the memory is, by its name and shape."""
    lower, sizes, kind = name.lower(), _sizes(value), value.type.tensor_type.elem_type
    if "past" in lower or "cache" in lower or lower.startswith(("k_", "v_")):
        if kind == TensorProto.BOOL or "branch" in lower:
            return "cache"
        if len(sizes) in (4, 5) and kind in _FLOATS:
            if 0 in _empty_past(value):
                return "past"
            return Problem(name, f"its cache has the fixed shape {sizes}", "export it without past keys and values")
    if "mask" in lower and len(sizes) == 2 and kind in DTYPES:
        if "encoder" in lower and "decoder" not in lower:
            return "source_mask" if memory is not None else "mask"
        follows = memory is not None and isinstance(sizes[1], str) and sizes[1] == _sizes(declared[memory])[1]
        return "source_mask" if follows else "mask"
    if "position" in lower and kind in _INTEGERS and len(sizes) in (1, 2):
        return "positions"
    if "type" in lower and kind in _INTEGERS and len(sizes) == 2:
        return "types"
    shape = "x".join(str(s or "?") for s in sizes)
    return Problem(name, f"it is an input [{shape}] of unknown meaning", "export the model as a function of token ids")


def find_output(graph: GraphProto, encoder: bool) -> str:
    """The name of the logits or, of an encoder, of its states; raises TypebarError if there are none."""
    known = {v.name: v for v in graph.output if not _is_present(v.name)}
    for name in _STATES if encoder else _LOGITS:
        if name in known:
            return name
    if not known:
        raise TypebarError(f"the graph has no logits among its outputs; {_EXPORT}")
    ranked: Sequence[str] = [n for n, v in known.items() if len(_sizes(v)) == 3] or list(known)
    return ranked[0]


def _is_present(name: str) -> bool:
    lower = name.lower()
    return lower.startswith(("present", "past", "next_")) or "key_value" in lower
