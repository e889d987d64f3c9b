"""Where a model's weights come from: one parameter at a time, never all at once."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from typebar.compiler.frontend.facts import read_json
from typebar.isa.errors import TypebarError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
Place = tuple[Path, str]
"""A file, and a tensor's name in it."""

_OLD_BUFFERS = (
    *(f".{module}.{buffer}" for module in ("attn", "attention") for buffer in ("bias", "masked_bias")),
    ".rotary_emb.inv_freq",
)
"""Ends of the names of causal masks and rotary tables, which older versions of transformers saved as buffers."""


class WeightSource(ABC):
    """Maps a parameter's name, as the graph spells it, to its values."""

    @abstractmethod
    def names(self) -> list[str]:
        """Every name that the source knows."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The parameter's shape; raises TypebarError if there is no such parameter."""

    @abstractmethod
    def load(self, name: str) -> np.ndarray:
        """The values: floating point as float32, others as they are; raises TypebarError if there are none."""


def _unknown(name: str) -> TypebarError:
    return TypebarError(f"there is no parameter {name!r} in the weights; check that they belong to this model")


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    array: np.ndarray = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array


class ShapeSource(WeightSource):
    """Names and shapes only: for simulating a shape without its weights."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Remember the shapes."""
        self._shapes = dict(shapes)

    def names(self) -> list[str]:
        """Every parameter's name."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The parameter's shape; raises TypebarError if there is no such parameter."""
        if name not in self._shapes:
            raise _unknown(name)
        return self._shapes[name]

    def load(self, name: str) -> np.ndarray:
        """Always raises TypebarError: a shape has no values."""
        raise TypebarError(f"{name!r} has a shape but no values; compile a checkpoint instead of a named shape")


class ModuleSource(WeightSource):
    """The parameters, buffers and constants of a torch module; nothing is copied until it is loaded."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Refer to the tensors."""
        self._tensors = dict(tensors)

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape; raises TypebarError if there is no such tensor."""
        return tuple(self._tensor(name).shape)

    def load(self, name: str) -> np.ndarray:
        """The tensor's values; raises TypebarError for a tensor on the meta device, which has none."""
        tensor = self._tensor(name)
        if tensor.is_meta:
            raise TypebarError(f"{name!r} is on the meta device and has no values; load weights into the module first")
        return _as_numpy(tensor)

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise _unknown(name)
        return self._tensors[name]


class CheckpointSource(WeightSource):
    """The safetensors files of a checkpoint directory, memory-mapped.

    `stored` maps each of the graph's names to the file and the name in it. Raises TypebarError for unreadable files.
    """

    def __init__(self, stored: Mapping[str, Place]) -> None:
        """Remember where each parameter lies."""
        self._stored = dict(stored)

    def names(self) -> list[str]:
        """Every parameter's name, as the graph spells it."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """The parameter's shape, from the file's header."""
        path, key = self._place(name)
        with _opened(path) as file, _reading(path, key):
            return tuple(file.get_slice(key).get_shape())

    def load(self, name: str) -> np.ndarray:
        """The parameter's values, read from its file now."""
        path, key = self._place(name)
        with _opened(path) as file, _reading(path, key):
            return _as_numpy(file.get_tensor(key))

    def _place(self, name: str) -> Place:
        if name not in self._stored:
            raise _unknown(name)
        return self._stored[name]


class DerivedSource(WeightSource):
    """A source's tensors and those computed from them: 1 + a weight, a permuted projection, a table of positions."""

    def __init__(self, source: WeightSource) -> None:
        """Wrap `source`; nothing is derived yet."""
        self._source = source
        self._known = frozenset(source.names())
        self._derived: dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]] = {}

    def define(self, name: str, shape: Sequence[int], make: Callable[[], np.ndarray]) -> None:
        """Let `name` be the tensor that `make` returns, whenever it is loaded; it goes before the source's own.

        Raises TypebarError if the name already stands for a tensor of another shape.
        """
        wanted = tuple(int(size) for size in shape)
        if self.defines(name) and self.shape(name) != wanted:
            raise TypebarError(
                f"{name!r} is {list(self.shape(name))} already and cannot be derived as {list(wanted)}; rename it"
            )
        self._derived[name] = (wanted, make)

    def defines(self, name: str) -> bool:
        """Whether `name` has a shape here."""
        return name in self._derived or name in self._known

    def names(self) -> list[str]:
        """The source's names, and after them the derived ones."""
        return [*self._source.names(), *(name for name in self._derived if name not in self._known)]

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape; raises TypebarError if there is no such tensor."""
        return self._derived[name][0] if name in self._derived else self._source.shape(name)

    def load(self, name: str) -> np.ndarray:
        """The values, computed now if derived; raises TypebarError if there are none or of another shape."""
        if name not in self._derived:
            return self._source.load(name)
        shape, make = self._derived[name]
        made = make()
        if made.shape != shape:
            raise TypebarError(f"{name!r} was computed as {list(made.shape)}, not {list(shape)}; mend its definition")
        return made.astype(np.float32, copy=False) if np.issubdtype(made.dtype, np.floating) else made


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise TypebarError(f"cannot read weights from {path}: {error}; copy the checkpoint again") from error


@contextmanager
def _reading(path: Path, key: str) -> Iterator[None]:
    """Names the file and the tensor if the library cannot read it."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise TypebarError(f"{path} lacks {key!r} or holds it damaged: {error}; copy it again") from error


def stored_tensors(directory: Path) -> dict[str, Path]:
    """The file of every tensor of a checkpoint; raises TypebarError if it has no (whole) safetensors files."""
    index = directory / _INDEX
    if index.is_file():
        placed = read_json(index).get("weight_map")
        if not isinstance(placed, dict):
            raise TypebarError(f"{index} is no index of weights: it has no weight_map; copy the checkpoint again")
        found = {str(key): directory / str(file) for key, file in placed.items()}
        missing = sorted(p.name for p in set(found.values()) if p.parent != directory or not p.is_file())
        if missing:
            raise TypebarError(f"{directory} lacks the weight file {missing[0]} that its index names; copy it again")
        return found
    single = directory / _SINGLE
    if not single.is_file():
        raise TypebarError(
            f"{directory} has no {_SINGLE}; load the model with transformers and save it again with save_pretrained"
        )
    with _opened(single) as file:
        return dict.fromkeys(file.keys(), single)


def tied_apart(files: Mapping[str, Place], aliases: Mapping[str, str], prefix: str) -> list[str]:
    """The names that the builder tied to others while the checkpoint holds other values for them.

    A configuration may tie what its checkpoint does not: the tensors decide. `aliases` maps all names of a tensor to
    one of them; `prefix` is the base model's, which files may leave out.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for alias, name in aliases.items():
        keys = [k for k in _spellings(alias, prefix) if k in files]
        if keys:
            groups.setdefault(name, []).append((alias, keys[0]))
    apart = []
    for (_, first), *others in groups.values():
        apart += [alias for alias, key in others if key != first and not _equal(files, first, key)]
    return apart


def bind(
    directory: Path,
    files: Mapping[str, Place],
    aliases: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    prefix: str,
    ignored: Sequence[re.Pattern[str]] = (),
) -> WeightSource:
    """Find each of the graph's parameters in a checkpoint; `prefix` is the base model's, which files may leave out.

    `files` are the stored tensors by the names that the model has for them. `aliases` maps all names of a tensor to the
    graph's; a tied tensor is found under any of them. Raises TypebarError for parameters that are missing, of another
    shape, or stored twice with other values, and for weights that the graph does not use and that no pattern of
    `ignored` is found in: the configuration then describes another model.
    """
    groups: dict[str, list[str]] = {name: [] for name in shapes}
    for alias, name in aliases.items():
        groups.setdefault(name, []).append(alias)
    stored: dict[str, Place] = {}
    missing = []
    used: set[str] = set()
    for name in shapes:
        keys = [k for alias in groups[name] or [name] for k in _spellings(alias, prefix) if k in files]
        if not keys:
            missing.append(name)
            continue
        stored[name] = files[keys[0]]
        used.update(keys)
        for key in keys[1:]:
            if key != keys[0] and not _equal(files, keys[0], key):
                raise TypebarError(f"{directory} holds {name!r} as {keys[0]!r} and as {key!r}, which differ; keep one")
    if missing:
        raise TypebarError(
            f"{directory} lacks {len(missing)} parameters, the first is {missing[0]!r}; "
            "its config.json must describe its weights"
        )
    source = CheckpointSource(stored)
    for name, shape in shapes.items():
        if source.shape(name) != shape:
            raise TypebarError(
                f"{name!r} is {list(source.shape(name))} in {directory}, its config.json says {list(shape)}; "
                "they must agree"
            )
    unused = [key for key in files if key not in used and not any(p.search(key) for p in ignored)]
    unused = [key for key in unused if _is_weight(*files[key])]
    if unused:
        first = files[unused[0]][1]
        raise TypebarError(
            f"config.json leaves {len(unused)} of the tensors in {directory} unused, the first is {first!r}; "
            "it must describe all its weights"
        )
    return source


def _is_weight(path: Path, key: str) -> bool:
    """Whether a tensor is floating point and none of the buffers that old checkpoints store."""
    if f".{key}".endswith(_OLD_BUFFERS):
        return False
    with _opened(path) as file:
        try:
            dtype: str = file.get_slice(key).get_dtype()
        except SafetensorError as error:
            raise TypebarError(f"{path} lacks {key!r} that its index names: {error}; copy it again") from error
    return dtype.startswith(("F", "BF"))


def _spellings(name: str, prefix: str) -> Sequence[str]:
    if not prefix:
        return (name,)
    return (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")


def _equal(files: Mapping[str, Place], first: str, second: str) -> bool:
    source = CheckpointSource({key: files[key] for key in (first, second)})
    return source.shape(first) == source.shape(second) and np.array_equal(source.load(first), source.load(second))
