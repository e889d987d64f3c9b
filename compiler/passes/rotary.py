"""Rotary positions, read off forms: which elements turn together, and by which columns of numbers by position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from typebar.compiler.passes.forms import NONE, Form, Refused


@dataclass(frozen=True)
class Rotation:
    """Two-term elements of [heads, size] read as one rotation: which elements are turned, by which columns.

    `own` are the elements before they are turned; `cos` and `sin` are (columns, signs) of rotary_dim / 2 pairs.
    """

    own: Form
    rotary_dim: int
    pairing: str
    cos: tuple[np.ndarray, np.ndarray]
    sin: tuple[np.ndarray, np.ndarray]


def rotation(form: Form) -> Rotation:
    """Read a form of [heads, size] as a rotation of pairs; raises Refused if it is none."""
    two: np.ndarray = (
        form.element[1] != NONE if len(form.element) == 2 else np.zeros(form.element.shape[1:], dtype=bool)
    )
    turned = int(two[0].sum())
    if not turned or turned % 2 or (two != (np.arange(two.shape[1]) < turned)).any():
        raise Refused(
            "its products with positional factors are no rotation of the first elements of each head",
            "turn pairs of elements by cos and sin of the position",
            form.moved,
        )
    rest = two.shape[1] - turned
    if rest and ((form.column[0, :, turned:] != NONE).any() or (form.sign[0, :, turned:] != 1).any()):
        raise Refused("it scales elements by position that it does not turn", node=form.moved)
    half = turned // 2
    pairs = {
        "half": (np.arange(half), np.arange(half) + half),
        "interleaved": (np.arange(half) * 2, np.arange(half) * 2 + 1),
    }
    for pairing, (a, b) in pairs.items():
        found = _rotation(form, turned, pairing, a, b)
        if found is not None:
            return found
    raise Refused(
        "its pairs of elements are not turned by one angle, or by others in each head",
        "turn elements i and i + d / 2, or 2 i and 2 i + 1, by cos and sin of the position",
        form.moved,
    )


def _rotation(form: Form, turned: int, pairing: str, a: np.ndarray, b: np.ndarray) -> Rotation | None:
    """x_a' = x_a c - x_b s and x_b' = x_b c + x_a s, whichever of the two terms comes first."""
    element = form.element
    for swap in (False, True):
        x_a = element[int(swap)][:, a]
        x_b = element[int(not swap)][:, a]
        cos_a, sin_a = _factor(form, int(swap), a), _factor(form, int(not swap), a)
        first = element[0][:, b] == x_b
        cos_b = [np.where(first, f, s) for f, s in zip(_factor(form, 0, b), _factor(form, 1, b), strict=True)]
        sin_b = [np.where(first, s, f) for f, s in zip(_factor(form, 0, b), _factor(form, 1, b), strict=True)]
        other = np.where(first, element[1][:, b], element[0][:, b])
        same = np.where(first, element[0][:, b], element[1][:, b])
        if (same != x_b).any() or (other != x_a).any():
            continue
        if any((p != q).any() for p, q in zip(cos_a, cos_b, strict=True)):
            continue
        if (sin_a[0] != sin_b[0]).any() or (sin_a[1] != -sin_b[1]).any():
            continue
        if any((f != f[:1]).any() for f in (*cos_a, *sin_b)):
            continue
        own = element[0].copy()
        own[:, a], own[:, b] = x_a, x_b
        plain = np.full_like(own, NONE)[None]
        before = Form(form.base, own[None], np.ones_like(own)[None], plain, form.moved)
        return Rotation(before, turned, pairing, (cos_a[0][0], cos_a[1][0]), (sin_b[0][0], sin_b[1][0]))
    return None


def _factor(form: Form, term: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return form.column[term][:, places], form.sign[term][:, places]


class Columns:
    """Factors by position, each [context] float32; equal ones, and ones equal but for their sign, are one."""

    def __init__(self) -> None:
        """No factors yet."""
        self.values: list[np.ndarray] = []
        self._known: dict[bytes, int] = {}

    def add(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Columns and signs of values [context, *sizes]; a factor that is always one is no column."""
        rows = np.ascontiguousarray(values.reshape(len(values), -1).T.astype(np.float32) + np.float32(0))
        columns, signs = np.empty(len(rows), dtype=np.int64), np.ones(len(rows), dtype=np.int64)
        for i, row in enumerate(rows):
            if (row == 1).all():
                columns[i] = NONE
                continue
            filled = row[row != 0]
            if len(filled) and filled[0] < 0:
                row, signs[i] = np.float32(0) - row, -1
            columns[i] = self._known.setdefault(row.tobytes(), len(self.values))
            if columns[i] == len(self.values):
                self.values.append(row)
        return columns.reshape(values.shape[1:]), signs.reshape(values.shape[1:])

    def table(self, columns: np.ndarray, signs: np.ndarray) -> np.ndarray:
        """The values [context, n] of n columns and signs."""
        context = len(self.values[0])
        ones = np.ones(context, dtype=np.float32)
        made = [(self.values[c] if c != NONE else ones) * s for c, s in zip(columns, signs, strict=True)]
        return np.stack(made, axis=1).astype(np.float32) + np.float32(0)
