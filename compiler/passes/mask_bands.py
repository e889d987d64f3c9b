"""Masks over more pairs of positions than memory holds: worked out and checked some rows at a time.

Such a mask must be put together pair by pair, with elementwise operations on values that belong to rows or to columns:
then the same operations on some of the rows give the same rows of the mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from xdsl.dialects.builtin import DYNAMIC_INDEX
from xdsl.ir import OpResult, SSAValue

from typebar.compiler import ir
from typebar.compiler.aten import Evaluator, NotEvaluable, arguments, base_name, shape_of, words
from typebar.compiler.passes.attention import MASKED
from typebar.compiler.passes.masks import ScoreMask, Unclassified

_BAND = 1 << 22
"""Pairs of positions in a band: its int64 differences take 32 MiB."""

LONGEST_BY_ROWS = 1 << 17
"""The greatest context whose masks are checked: on one core that takes some minutes, 16 times as long as 2^15."""

_ELEMENTWISE = words(
    """abs add alias bitwise_and bitwise_not bitwise_or clamp clamp_max clamp_min clone contiguous detach detach_ eq ge
    gt le lift_fresh_copy logical_and logical_not logical_or lt masked_fill maximum minimum mul ne neg rsub sub to
    _to_copy where __and__ __or__ __xor__"""
)


def classify_bands(evaluator: Evaluator, value: SSAValue, longest: int, encoder: bool = False) -> ScoreMask:
    """The mask that `value` [..., n, n] is over all pairs of the evaluator's n positions, all of which are checked.

    `longest` is the greatest context that needs no bands, for the remedy of what is refused. Raises Unclassified for
    a mask that is no elementwise work on rows and columns, that adds a bias, or that is neither causal, nor a sliding
    window, nor none.
    """
    length = evaluator.tokens
    remedy = f"declare a context of at most {longest}"
    if length > LONGEST_BY_ROWS:
        rule = f"its mask cannot be checked on all pairs of {length} positions"
        raise Unclassified(rule, f"declare a context of at most {LONGEST_BY_ROWS}")
    try:
        wholes = _frontier(value, evaluator)
        last = _seen(value, wholes, evaluator, length - 1, length)
        reach = int(last[0].sum())
        mask, window = "causal", length
        if encoder or (reach == length and bool(_seen(value, wholes, evaluator, 0, 1).all())):
            mask = "none"
        elif 0 < reach < length:
            mask, window = "window", reach
        columns = torch.arange(length)
        for start, end in _bands(length):
            rows = torch.arange(start, end)[:, None]
            wanted = columns <= rows if mask != "none" else torch.ones(1, length, dtype=torch.bool)
            if mask == "window":
                wanted = wanted & (columns > rows - window)
            wrong = _seen(value, wholes, evaluator, start, end) != wanted
            if bool(wrong.any()):
                row, column = (int(n) for n in wrong.any(0).nonzero()[0])
                rule = f"its mask of {length} positions is neither causal nor a sliding window"
                does = "does not attend to" if bool(wanted[row % len(wanted), column]) else "attends to"
                rule += f": position {start + row} {does} {column}"
                raise Unclassified(rule, f"use a causal mask or a sliding window, or {remedy}")
    except NotEvaluable as error:
        reason = f"its mask of {length} positions cannot be checked by rows: {error}"
        raise Unclassified(reason, remedy) from error
    except _BiasError as error:
        raise Unclassified(f"its mask of {length} positions adds a bias to scores", remedy) from error
    return ScoreMask(mask, window if mask == "window" else None)


class _BiasError(Exception):
    """Something other than a mask is added to scores."""


def _bands(length: int) -> Iterator[tuple[int, int]]:
    rows = max(1, _BAND // length)
    return ((start, min(start + rows, length)) for start in range(0, length, rows))


def _frontier(value: SSAValue, evaluator: Evaluator) -> dict[SSAValue, object]:
    """What the pairs are made from: the values of all operands of elementwise operations that are no pairs."""
    wholes: dict[SSAValue, object] = {}
    stack, met = [value], set[SSAValue]()
    while stack:
        top = stack.pop()
        if top in met:
            continue
        met.add(top)
        if shape_of(top).count(DYNAMIC_INDEX) < 2:
            wholes[top] = evaluator(top)
            continue
        if not _by_rows(top):
            named = top.op if isinstance(top, OpResult) else None
            what = named.target.data if isinstance(named, ir.AtenOp) else named.name if named else "an argument"
            raise NotEvaluable(f"{what} is no elementwise operation")
        stack.extend(top.owner.operands)  # type: ignore[union-attr]
    return wholes


def _by_rows(value: SSAValue) -> bool:
    """Whether rows of a value [..., n, n] are worked out from the same rows of operands."""
    shape = shape_of(value)
    if not isinstance(value, OpResult) or shape.count(DYNAMIC_INDEX) != 2 or DYNAMIC_INDEX in shape[:-2]:
        return False
    op = value.op
    if not isinstance(op, ir.AtenOp):
        return isinstance(op, ir.AddOp | ir.MulOp | ir.ScaleOp)
    if base_name(op) == "unsqueeze":
        return _leads(arguments(op)[1], len(shape))
    return base_name(op) in _ELEMENTWISE


def _leads(axis: object, rank: int) -> bool:
    """Whether a new axis of a tensor that then has `rank` axes stands before the last two."""
    return isinstance(axis, int) and axis % rank < rank - 2


def _seen(
    value: SSAValue, wholes: Mapping[SSAValue, object], evaluator: Evaluator, start: int, end: int
) -> torch.Tensor:
    """Which columns the rows see, bool [planes, end - start, n]; raises _BiasError if something is added to those."""
    length = evaluator.tokens
    given = {key: _cut(whole, length, start, end) for key, whole in wholes.items()}
    mask = Evaluator(length, given=given)(value)
    assert isinstance(mask, torch.Tensor)
    if mask.dtype == torch.bool:
        seen = mask
    else:
        seen = ~(mask <= MASKED)
        if bool((seen & (mask != 0)).any()):
            raise _BiasError
    return seen.expand(*seen.shape[:-2], end - start, length).reshape(-1, end - start, length)


def _cut(whole: object, length: int, start: int, end: int) -> object:
    """The rows of an operand that has them, in the last but one axis; anything else as it is."""
    if isinstance(whole, torch.Tensor) and whole.ndim > 1 and whole.shape[-2] == length:
        return whole[..., start:end, :]
    return whole
