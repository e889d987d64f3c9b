"""Tables of float32 rows that a position chooses: rotary factors and score biases, as memory holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from typebar.compiler import device_ir as dev
from typebar.isa.errors import TypebarError
from typebar.isa.machine import LINE_BYTES

F32 = NDArray[np.float32]
MASKED_SCORE = float(np.finfo(np.float32).min)
"""What a masked score's bias becomes: finite, and so low that its weight is exactly zero."""


def _line_bytes(words: int) -> int:
    return -(-words * 4 // LINE_BYTES) * LINE_BYTES


def rotary_meta(op: dev.RotaryRowOp, cos: str, sin: str, shape: tuple[int, ...], context: int) -> dict[str, Any]:
    """How the rows of a `tbd.rotary_row` are made from tables of `shape`.

    Raises:
        TypebarError: the tables are not [context or more, turned / 2].
    """
    turned, half, pad = (int(a.value.data) for a in (op.turned, op.half, op.pad))
    if len(shape) != 2 or shape[0] < context or shape[1] != turned // 2:
        raise TypebarError(f"the rotary table {cos!r} is {list(shape)}: the step needs [{context}, {turned // 2}]")
    return {
        "kind": "rotary", "cos": cos, "sin": sin, "rows": shape[0], "turned": turned, "half": half, "pad": pad,
        "row_bytes": _line_bytes(2 * pad),
    }  # fmt: skip


def rotary_rows(meta: Mapping[str, Any], cos: F32, sin: F32) -> F32:
    """Rows [positions, row words]: factors (cosines twice, then ones), and crossed factors (-sine, sine, zeros)."""
    pairs, half, pad = meta["turned"] // 2, meta["half"], meta["pad"]
    rows = np.zeros((meta["rows"], meta["row_bytes"] // 4), np.float32)
    rows[:, 2 * half : pad] = 1
    for first, sign in ((0, -1), (half, 1)):
        rows[:, first : first + pairs] = cos
        rows[:, pad + first : pad + first + pairs] = sign * sin
    return rows


def rotary_source(meta: Mapping[str, Any], rows: F32, name: str) -> F32:
    """The table `name`, cosines or sines, that `rotary_rows` was given."""
    start = 0 if name == meta["cos"] else meta["pad"] + meta["half"]
    return rows[:, start : start + meta["turned"] // 2].copy()


def planes_meta(op: dev.ScoreBiasOp, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """How the rows of a `tbd.score_bias` are made from a table of `shape`.

    Raises:
        TypebarError: the table does not have the operation's planes and positions.
    """
    kind, heads = op.kind.data, int(op.heads.value.data)
    wanted = (heads, *op.shape)
    if shape != wanted:
        raise TypebarError(f"the score bias {name!r} is {list(shape)}: {kind} ones of this step need {list(wanted)}")
    words = int(np.prod(shape[1:]))
    return {
        "kind": "planes", "symbol": name, "reversed": kind == "relative" and op.both is None, "heads": heads,
        "planes": int(op.planes.value.data), "words": words, "plane_bytes": _line_bytes(words),
    }  # fmt: skip


def first_plane(meta: Mapping[str, Any], rank: int | None) -> int:
    """The first of a device's planes."""
    return 0 if rank is None else rank * int(meta["planes"])


def plane_rows(meta: Mapping[str, Any], source: F32, rank: int | None) -> F32:
    """This device's planes [planes, words]; relative ones reversed, for their rows to run with the position."""
    held = source[first_plane(meta, rank) :][: meta["planes"]]
    held = held[:, ::-1] if meta["reversed"] else held
    rows = np.zeros((meta["planes"], meta["plane_bytes"] // 4), np.float32)
    rows[: len(held), : meta["words"]] = np.maximum(held.reshape(len(held), meta["words"]), MASKED_SCORE)
    return rows


def plane_source(meta: Mapping[str, Any], rows: F32, rank: int | None, out: F32) -> None:
    """Put a device's planes where `plane_rows` found them."""
    target = out[first_plane(meta, rank) :][: meta["planes"]]
    held = rows[: len(target), : meta["words"]].reshape(target.shape)
    target[...] = held[:, ::-1] if meta["reversed"] else held
