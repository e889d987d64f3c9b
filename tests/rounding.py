"""What the matrix unit's operand format explains: torch in float64 with every factor of every product rounded to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

SIGNIFICANT_BITS = 11
"""Of the operands (docs/numerics.md): one implied and ten fraction bits, as float16 has."""

_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "dot": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To 11 significant bits, nearest even."""
    mantissa, exponent = torch.frexp(x)
    scale = 2.0**SIGNIFICANT_BITS
    return torch.ldexp(torch.round(mantissa * scale) / scale, exponent)


class _Rounding(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.split(".")[0]
        if name in _PRODUCTS:
            places = _PRODUCTS[name]
            args = tuple(rounded(a) if i in places else a for i, a in enumerate(args))
        elif "attention" in name:
            raise AssertionError(f"{name} multiplies out of sight")
        return function(*args, **(kwargs or {}))


@contextmanager
def rounded_operands() -> Iterator[None]:
    """Within it, every matrix product of float64 tensors rounds its factors first."""
    with sdpa_kernel(SDPBackend.MATH), _Rounding():
        yield
