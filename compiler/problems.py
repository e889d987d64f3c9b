"""What cannot be lowered, reported all at once: the node, the reason and the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.ir import Operation, SSAValue

from typebar.isa.errors import TypebarError

_SHOWN = 3
_ANNOUNCED = re.compile(r"(Class v|V)alidation error for (field|validator) .*:")
_KIND = re.compile(r"^\w*Error: ")
MODULE = "module"
"""Attribute of an imported operation: the path of the source's module that it comes from."""


@dataclass(frozen=True)
class Problem:
    """One operation that cannot be lowered; `module` is the path of the source's module it comes from, if known."""

    node: str
    reason: str
    remedy: str
    module: str = ""

    def __str__(self) -> str:
        """One clause: node: reason; remedy."""
        return f"{self.node}: {self.reason}; {self.remedy}"


class LoweringError(TypebarError):
    """A graph with operations that cannot be lowered; `items` lists them all."""

    def __init__(self, items: Sequence[Problem]) -> None:
        """Say how many there are, the first ones in full and the names of the rest."""
        self.items = list(items)
        first = " | ".join(str(p) for p in self.items[:_SHOWN])
        rest = len(self.items) - _SHOWN
        more = f" | and {rest} more, the next at {self.items[_SHOWN].node}" if rest > 0 else ""
        noun = "operation" if len(self.items) == 1 else "operations"
        super().__init__(f"{len(self.items)} {noun} cannot be lowered: {first}{more}")


class UnsupportedError(LoweringError):
    """A model of a kind that no machine runs, whatever its operations are; `items` has the one reason."""

    def __init__(self, item: Problem) -> None:
        """Say what it is, why it cannot run and what to do."""
        super().__init__([item])
        self.args = (str(item),)


def node_name(op: Operation) -> str:
    """How messages name an operation: by the exporter's node, else by its result or kind."""
    node = op.attributes.get("node")
    if isinstance(node, StringAttr):
        return node.data
    hint = op.results[0].name_hint if op.results else None
    return f"{op.name} %{hint}" if hint else op.name


def keep_name(new: Operation, old: Operation | SSAValue) -> None:
    """Let `new` be known by the node that `old` came from."""
    owner = old.owner if isinstance(old, SSAValue) else old
    if isinstance(owner, Operation) and "node" in owner.attributes:
        new.attributes["node"] = owner.attributes["node"]


def module_paths(module: ModuleOp) -> dict[str, str]:
    """The module path of every node that has one; "a or b" where an encoder's node and a decoder's have one name."""
    found: dict[str, dict[str, None]] = {}
    for op in module.walk():
        path = op.attributes.get(MODULE)
        if isinstance(path, StringAttr):
            found.setdefault(node_name(op), {})[path.data] = None
    return {node: " or ".join(paths) for node, paths in found.items()}


def placed(problems: Iterable[Problem], paths: Mapping[str, str]) -> list[Problem]:
    """The problems with their module paths filled in."""
    return [replace(p, module=p.module or paths.get(p.node, "")) for p in problems]


def first_line(error: Exception) -> str:
    """The first line of an error's message that has any text, else the kind of error.

    Where that line only announces, as those of transformers' checks of a configuration do, it is the next one.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and _ANNOUNCED.fullmatch(lines[0]):
        return _KIND.sub("", lines[1])
    return lines[0] if lines else type(error).__name__
