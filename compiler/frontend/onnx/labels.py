"""Names for initialisers that an exporter numbered: after the module that uses them, so that layers look alike."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

from onnx import NodeProto

_NUMBERED = re.compile(r"(onnx::\w+|_?[A-Za-z]+(_[A-Za-z]+)*)[_:]?\d+\w*$")
_SCOPES = "pkg.torch.onnx.name_scopes"
_QUANTISED = "_quantized"


def labels(nodes: Iterable[NodeProto], names: Iterable[str]) -> dict[str, str]:
    """A parameter name for each initialiser: its own, or that of the module that reads it first plus its role.

    torch's exporters number transposed weights (`onnx::MatMul_123`, `val_104`); a node's name or metadata still has
    the module's path, `model.layers.0.self_attn.q_proj`.
    """
    known = set(names)
    taken: set[str] = set(known)
    found: dict[str, str] = {}
    for node in nodes:
        for place, name in enumerate(node.input):
            if name not in known or name in found:
                continue
            bare = name.removesuffix(_QUANTISED)
            path = _module_of(node) if _NUMBERED.match(bare) and "." not in bare else ""
            label = f"{path}.{_kind(node, place)}" if path else bare.replace("::", ".").strip("/").replace("/", ".")
            free = label
            while free in taken and free != name:
                free += "_"
            taken.add(free)
            found[name] = free
    return found


def _kind(node: NodeProto, place: int) -> str:
    if node.op_type in ("MatMul", "Gemm", "MatMulInteger", "Gather", "Mul", "FusedMatMul"):
        return "bias" if place == 2 else "weight"
    return "bias" if node.op_type == "Add" else f"{node.op_type.lower()}_{place}"


def _module_of(node: NodeProto) -> str:
    """The path of the module that a node comes from, "" if nothing says so."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES and len(entry.value) < 10_000:
            try:
                scopes = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                return ""
            plain = isinstance(scopes, list) and len(scopes) > 1 and all(isinstance(s, str) for s in scopes)
            return str(scopes[-2]) if plain else ""
    parts = [p for p in node.name.split("/") if p]
    return ".".join(parts[:-1]) if node.name.startswith("/") else ""
