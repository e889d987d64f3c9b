"""How the columns of linear weights go to the devices, and where each lies in its device's registers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray
from xdsl.dialects.builtin import DictionaryAttr, IntegerAttr, StringAttr, SymbolRefAttr
from xdsl.utils.exceptions import VerifyException

from typebar.compiler.ir_values import LAYOUTS, number, symbol

_SYMBOLS = ("weight", "bias", "scale")
_WORDS = ("layout",)


@dataclass(frozen=True)
class Segment:
    """Columns of a linear weight as they are split over the devices: a column from `start` on, `size` of them.

    Without `run`, element i is column start + i; with it, column start + i // run * stride + i % run. Units of `unit`
    elements take `pad` words each; device r holds units r // share * per_device and following, `per_device` of them,
    those beyond the last one being zeros.

    Units that rotary positions turn (`turned` > 0) keep the two elements of a pair apart: the first half of the pairs'
    elements from word 0 on, the other from word `half` on, what is not turned from word 2 * half on. The pairs are
    elements i and i + turned / 2, or, if `interleaved`, 2 i and 2 i + 1.

    With `scale` the weight is int8, and `scale` names the float32 scale of each column.
    """

    weight: str
    layout: str
    bias: str | None
    start: int
    size: int
    unit: int
    pad: int
    per_device: int
    run: int = 0
    stride: int = 0
    share: int = 1
    turned: int = 0
    half: int = 0
    interleaved: int = 0
    scale: str | None = None

    @property
    def words(self) -> int:
        """Words of this segment on one device."""
        return self.per_device * self.pad

    def columns(self, rank: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Words of the segment that device `rank` fills, and the source column of each."""
        first = rank // self.share * self.per_device
        inner = np.arange(self.unit)
        element = ((first + np.arange(self.per_device))[:, None] * self.unit + inner).reshape(-1)
        word = (np.arange(self.per_device)[:, None] * self.pad + self._words_of_unit()).reshape(-1)
        held = element < self.size
        element, word = element[held], word[held]
        run, stride = (self.run, self.stride) if self.run else (self.size, self.size)
        return word, self.start + element // run * stride + element % run

    def _words_of_unit(self) -> NDArray[np.int64]:
        """The word of each element of a unit."""
        word = np.arange(self.unit)
        if self.turned:
            pairs = self.turned // 2
            turned = word[: self.turned]
            second, pair = (turned % 2, turned // 2) if self.interleaved else (turned // pairs, turned % pairs)
            word[: self.turned] = second * self.half + pair
            word[self.turned :] += 2 * self.half - self.turned
        return word

    def renamed(self, rename: Callable[[str], str]) -> Segment:
        """The segment with every name replaced by what `rename` makes of it."""
        names = {key: getattr(self, key) for key in _SYMBOLS}
        return replace(self, **{key: rename(name) for key, name in names.items() if name is not None})  # type: ignore[arg-type]

    def attribute(self) -> DictionaryAttr:
        """The segment as an attribute; fields that have their defaults are left out."""
        values: dict[str, SymbolRefAttr | StringAttr | IntegerAttr] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value is None or value == item.default:
                continue
            if item.name in _SYMBOLS:
                values[item.name] = symbol(value)
            else:
                values[item.name] = StringAttr(value) if item.name in _WORDS else number(value)
        return DictionaryAttr(values)

    @staticmethod
    def parse(data: DictionaryAttr) -> Segment:
        """The segment an attribute describes.

        Raises:
            VerifyException: a key is missing or of the wrong kind, or a number is out of range.
        """
        values: dict[str, str | int | None] = {"bias": None}
        known = {item.name: item for item in fields(Segment)}
        for name, value in data.data.items():
            if name not in known:
                raise VerifyException(f"a segment has no {name!r}")
            values[name] = _plain(name, value)
        missing = [n for n, item in known.items() if n not in values and item.default is MISSING]
        if missing:
            raise VerifyException(f"a segment needs {', '.join(missing)}")
        made = Segment(**values)  # type: ignore[arg-type]
        made.check()
        return made

    def check(self) -> None:
        """Raise VerifyException for numbers that make no segment."""
        fits = self.start >= 0 < self.size and 0 < self.unit <= self.pad and self.per_device > 0 < self.share
        runs = self.run == 0 or (0 < self.run <= self.stride and self.size % self.run == 0)
        turned = self.turned == 0 or (
            self.turned % 2 == 0
            and 0 < self.turned <= self.unit
            and self.turned // 2 <= self.half
            and 2 * self.half + self.unit - self.turned <= self.pad
        )
        if self.layout not in LAYOUTS or not fits or not runs or not turned:
            raise VerifyException(f"a segment is out of range: {asdict(self)}")


def _plain(name: str, value: object) -> str | int:
    if name in _SYMBOLS and isinstance(value, SymbolRefAttr):
        return str(value.string_value())  # type: ignore[no-untyped-call]
    if name in _WORDS and isinstance(value, StringAttr):
        return value.data
    if name not in _SYMBOLS + _WORDS and isinstance(value, IntegerAttr):
        return int(value.value.data)
    raise VerifyException(f"a segment's {name} cannot be {value}")
