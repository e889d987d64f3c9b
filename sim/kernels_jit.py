"""How kernels are compiled: exact, without the interpreter lock, cached on disk until any source changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit


def _digest() -> str:
    """Digest of every source that compiles into a kernel."""
    here = Path(__file__).parent
    isa = here.parent / "isa"
    sources = [*here.glob("kernels*.py"), *(isa / "numerics").glob("*.py"), isa / "instructions.py"]
    text = hashlib.sha256()
    for path in sorted(sources):
        text.update(path.read_bytes())
    return text.hexdigest()


_DIGEST = _digest()


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a kernel on its first call, or load it from the cache.

    No `fastmath`: it would change results. Numba drops a cached kernel when the kernel's own file changes, but not
    when a function it calls or a table it holds does; so the digest of all sources joins the file's stamp.
    """
    kernel = njit(function, cache=True, nogil=True, error_model="numpy", boundscheck=False)
    stored = kernel._cache._cache_file
    stored._source_stamp = (stored._source_stamp, _DIGEST)
    return kernel
