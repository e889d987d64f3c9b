"""Typebar: compiler, exact simulators and host runtime for text generation on a ring of FPGAs.

`check` tells whether a model compiles, `compile` makes an image of it, `load` runs one, `simulate` times one, `report`
writes a page on where its time goes, `compare` holds one against torch; the modules of `host` document them. They are
imported when first used, for they bring torch with them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typebar.host.api import compile, load, report, simulate
    from typebar.host.check import check
    from typebar.host.compare import compare

__all__ = ["check", "compare", "compile", "load", "report", "simulate"]


def __getattr__(name: str) -> Any:
    """Import the public functions when they are asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'typebar' has no attribute {name!r}")
    home = name if name in ("check", "compare") else "api"
    return getattr(import_module(f"typebar.host.{home}"), name)


def __dir__() -> list[str]:
    """The public names beside the module's own."""
    return sorted([*globals(), *__all__])
