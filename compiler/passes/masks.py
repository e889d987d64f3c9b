"""What is added to attention's scores, told apart by values: causal, windowed, all; and a bias by what it depends on.

Everything here is decided on all pairs of positions; what is no known kind becomes a table of all its values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from typebar.compiler.passes.attention import MASKED


@dataclass(frozen=True)
class ScoreMask:
    """A mask of ir.MASKS with its window, and a bias of ir.BIASES with its float32 values, if there is one."""

    mask: str
    window: int | None = None
    bias_kind: str | None = None
    bias: np.ndarray | None = None


class Unclassified(Exception):
    """Why a mask has no counterpart, and what to do."""

    def __init__(self, reason: str, remedy: str) -> None:
        """Say why, and what to do."""
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


def added(kind: ScoreMask, length: int) -> torch.Tensor:
    """What a mask without a bias adds to scores, float32 [length, length]: 0, or MASKED."""
    seen = torch.ones(length, length, dtype=torch.bool)
    if kind.mask != "none":
        seen = seen.tril()
    if kind.window is not None:
        seen = seen.triu(1 - kind.window)
    return torch.zeros(length, length).masked_fill_(~seen, MASKED)


def classify_scores(added: torch.Tensor, encoder: bool = False) -> ScoreMask:
    """The kind of what is added to scores, float32 [planes, n, n]; MASKED or less leaves a score out.

    For a decoder no position may see a later one, unless all see all without a bias; an encoder's mask is always
    none, and what it leaves out stands in its bias. Raises Unclassified for the rest: biases that are no numbers,
    and positions that look ahead.
    """
    if bool(added.isnan().any()) or bool((added == float("inf")).any()):
        raise Unclassified("its mask holds values that are no numbers", "add finite biases, or -inf")
    if len(added) > 1 and all(torch.equal(added[0], plane) for plane in added[1:]):
        added = added[:1]
    values = added.clamp(min=MASKED)
    if encoder:
        return _biased("none", None, values, torch.ones_like(values[:1], dtype=torch.bool), encoder)
    seen = values > MASKED
    length = values.shape[1]
    past = torch.ones(length, length, dtype=torch.bool).tril()
    if bool((seen & ~past).any()):
        if length > 1 and not bool(values.any()):
            return ScoreMask("none")
        raise _looks_ahead(seen, past)
    plane = seen[0]
    same = bool((seen == plane).all())
    if same and torch.equal(plane, past):
        return _biased("causal", None, values, past[None], encoder)
    window = int(plane[-1].sum())
    near = past.triu(1 - window)
    if same and window and torch.equal(plane, near):
        return _biased("window", window, values, near[None], encoder)
    return _biased("causal", None, values, past[None], encoder)


def _looks_ahead(seen: torch.Tensor, past: torch.Tensor) -> Unclassified:
    row, column = (int(n) for n in (seen & ~past).any(0).nonzero()[0])
    rule = f"its mask is neither causal nor a sliding window: position {row} attends to {column}"
    shared = seen[0] & ~past
    prefix = int(seen[0, 0].sum())
    columns = torch.arange(len(past))
    if bool(seen[0].all()):
        rule += ", and each position to all later ones"
    elif bool((seen == seen[0]).all()) and torch.equal(shared, (columns < prefix) & ~past):
        rule += f", and every position to the first {prefix}"
    return Unclassified(rule, "use a causal mask or a sliding window")


def _biased(mask: str, window: int | None, values: torch.Tensor, counts: torch.Tensor, encoder: bool) -> ScoreMask:
    """The mask with the bias that `values` are at the pairs that count; elsewhere they may be anything."""
    values = torch.where(counts, values, 0.0)
    if not bool(values.any()):
        return ScoreMask(mask, window)
    length = values.shape[1]
    places = torch.arange(length)
    if encoder:
        away = places[None, :] - places[:, None] + length - 1
        relative = torch.cat([values[:, 1:, 0].flip(1), values[:, 0, :]], dim=1)
    else:
        away = places[:, None] - places[None, :]
        relative, away = values[:, -1, :].flip(1), away.clamp(min=0)
    if torch.equal(torch.where(counts, relative[:, away], 0.0), values):
        return ScoreMask(mask, window, "relative", relative.numpy().copy())
    column = values[:, places, places]
    if torch.equal(torch.where(counts, column[:, None, :].expand_as(values), 0.0), values):
        return ScoreMask(mask, window, "column", column.numpy().copy())
    return ScoreMask(mask, window, "table", values.numpy().copy())
