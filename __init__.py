"""Typebar: compiler, exact simulators and host runtime for text generation on a ring of FPGAs.

`compile` makes an image of a model, `load` runs one, `simulate` times one; `host.api` documents them. They are imported
when first used, for they bring torch with them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typebar.host.api import compile, load, simulate

__all__ = ["compile", "load", "simulate"]


def __getattr__(name: str) -> Any:
    """Import the public functions when they are asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'typebar' has no attribute {name!r}")
    from typebar.host import api

    return getattr(api, name)


def __dir__() -> list[str]:
    """The public names beside the module's own."""
    return sorted([*globals(), *__all__])
