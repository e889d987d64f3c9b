"""Masks of contexts whose pairs of positions are too many to be held: checked by rows, every pair of them."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from typebar.compiler import ir
from typebar.compiler.frontend import load_model
from typebar.compiler.passes.classify_masks import LONGEST
from typebar.compiler.passes.mask_bands import LONGEST_BY_ROWS
from typebar.isa.errors import TypebarError

CONTEXT = LONGEST + 300
LAST = CONTEXT - 1
Mask = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


class Attending(nn.Module):
    """One attention whose mask is a formula of row, column and length."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask
        self.wte, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, places = self.wte(ids), torch.arange(ids.shape[1])
        q, k, v = (part(x).view(1, -1, 2, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        mask = self.mask(places[:, None], places[None, :], ids.shape[1])
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(1, -1, 8)
        logits: torch.Tensor = self.head(x)
        return logits


def lowered(mask: Mask, context: int = CONTEXT) -> ir.AttentionOp:
    model = load_model(Attending(mask), {"context": context})
    (found,) = (op for op in model.module.walk() if isinstance(op, ir.AttentionOp))
    return found


def summed(seen: torch.Tensor) -> torch.Tensor:
    """The mask as numbers to add, with the leading axes that exporters give it."""
    return torch.where(seen, 0.0, float("-inf")).unsqueeze(0).unsqueeze(0)


@pytest.mark.parametrize(
    ("mask", "window"),
    [
        (lambda row, column, length: column <= row, None),
        (lambda row, column, length: summed(column <= row), None),
        (lambda row, column, length: (column <= row) & (column > row - 7), 7),
        (lambda row, column, length: summed((row - column >= 0) & ~(row - column >= LAST)), LAST),
    ],
)
def test_masks_of_long_contexts(mask: Mask, window: int | None) -> None:
    found = lowered(mask)
    assert (found.window.value.data if found.window else None) == window
    assert found.bias is None


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            lambda row, column, length: (column <= row) & ((row != LAST - 5) | (column != 17)),
            f"position {LAST - 5} does not attend to 17; use a causal mask or a sliding window, or declare",
        ),
        (
            lambda row, column, length: (column <= row) | ((row == 8200) & (column == LAST)),
            f"position 8200 attends to {LAST}",
        ),
        (lambda row, column, length: (column <= row) & (column > row - length + 9), "changes kind with the length"),
        (lambda row, column, length: summed(column <= row) + (column - row) * 0.5, "adds a bias to scores; declare"),
        (lambda row, column, length: summed(column <= row) * float("inf"), "adds a bias to scores; declare"),
        (lambda row, column, length: torch.ones(length, length).tril() > 0, "cannot be checked by rows: aten.tril"),
        (lambda row, column, length: row + 0 * column >= 0, "position"),
    ],
)
def test_long_masks_that_are_refused(mask: Mask, message: str) -> None:
    with pytest.raises(TypebarError, match=re.escape(message)) as caught:
        lowered(mask)
    assert "\n" not in str(caught.value)


def test_a_context_that_cannot_be_checked_in_minutes() -> None:
    with pytest.raises(
        TypebarError, match=f"all pairs of {LONGEST_BY_ROWS + 1} positions; declare .* {LONGEST_BY_ROWS}"
    ):
        lowered(lambda row, column, length: column <= row, LONGEST_BY_ROWS + 1)
