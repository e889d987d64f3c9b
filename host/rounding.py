"""What the matrix unit's operand format explains: torch in float64 with every factor of every product rounded to it.

Operands of products have 11 significant bits (docs/numerics.md), so each factor is off by up to 2^-11 of itself before
the exact product is taken. Running the model once more with just these roundings, all else in float64, gives errors of
the size that the machine must have; what it adds beyond them, float32 sums and function tables, is smaller by 2^-12.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

OPERAND_BITS = 11
"""Significant bits of a product's factor: one implied and ten fraction bits, as fp16 has."""

_FACTORS = (0, 1)
_PRODUCTS = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "linear", "matmul"), _FACTORS),
    **dict.fromkeys(("addmm", "addmv", "baddbmm"), (1, 2)),
}
"""torch's products and which of their arguments are factors; linear and matmul arrive whole in inference mode only."""


def rounded(x: torch.Tensor, bits: int = OPERAND_BITS) -> torch.Tensor:
    """A floating-point tensor to `bits` significant bits, nearest even; its type and range stay."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(mantissa * 2.0**bits) / 2.0**bits, exponent)


class _Rounding(TorchDispatchMode):  # type: ignore[misc]  # torch is not typed here
    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.split(".")[0]
        if "attention" in name:
            raise AssertionError(f"{name} multiplies out of sight")
        places = _PRODUCTS.get(name, ())
        given = (rounded(a, self.bits) if i in places else a for i, a in enumerate(args))
        return function(*given, **(kwargs or {}))


@contextmanager
def rounded_operands(bits: int = OPERAND_BITS) -> Iterator[None]:
    """Within it, every matrix product in torch rounds its factors to `bits` significant bits first.

    Fused attention is taken apart, so that its products are seen.
    """
    with sdpa_kernel(SDPBackend.MATH), _Rounding(bits):
        yield
