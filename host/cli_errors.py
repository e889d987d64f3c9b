"""How the command line fails: one line on standard error and an exit status, never a traceback.

| status | meaning |
|---|---|
| 0 | done |
| 1 | a failure while running: a device, memory, the disk |
| 2 | bad usage or bad input |
| 70 | a defect of Typebar |
| 130 | interrupted |
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping

from typer.exceptions import Abort, TyperException

from typebar.isa.errors import TypebarError

FAILED, USAGE, DEFECT, INTERRUPTED = 1, 2, 70, 130
_SHOULD = re.compile(r"Input should be (.*?)(, unable to parse .*)?$")
DEBUG = "TYPEBAR_DEBUG"
"""Environment variable that lets tracebacks through when it is set."""


def guarded(run: Callable[[], int]) -> int:
    """The status of `run`, or one line on standard error and the status of what it raised."""
    try:
        return run()
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        status, text = _describe(error)
    except KeyboardInterrupt:
        status, text = INTERRUPTED, "interrupted"
    print(f"typebar: error: {text}", file=sys.stderr)
    return status


@contextlib.contextmanager
def as_options(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors speak of options where the Python interface has names: `names` are the options by those names."""
    try:
        yield
    except TypebarError as error:
        ways = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        # Not within a path, a quotation or a longer name.
        text = re.sub(rf"(?<![\w./'\"-])({ways})(?![\w./'\"-])", lambda found: names[found[1]], str(error))
        error.args = (text,)
        raise


def _describe(error: Exception) -> tuple[int, str]:
    """Exit status and message of an exception."""
    if isinstance(error, TyperException):
        return error.exit_code or USAGE, _usage(error)
    if isinstance(error, Abort):
        return INTERRUPTED, "interrupted"
    if isinstance(error, TypebarError):
        from typebar.host.device import DeviceError

        return FAILED if isinstance(error, DeviceError) else USAGE, _one_line(str(error))
    if isinstance(error, OSError):
        place = f"{error.filename!r}: " if error.filename is not None else ""
        return FAILED, _one_line(f"{place}{error.strerror or error}")
    if isinstance(error, MemoryError):
        return FAILED, "out of memory: use a smaller model, a shorter context or a larger host"
    text = _one_line(str(error)) or "no message"
    return DEFECT, f"internal error, {type(error).__name__}: {text} (set {DEBUG}=1 for the traceback)"


def _usage(error: TyperException) -> str:
    """What is wrong with the arguments, without the phrases of the library that checks their types."""
    text = _one_line(error.format_message()).replace("Value error, ", "")
    causes = getattr(error.__cause__, "errors", None)
    given = causes()[0]["input"] if callable(causes) else None
    return _SHOULD.sub(lambda found: f"must be {found[1]}, not {given!r}", text) if given is not None else text


def _one_line(text: str) -> str:
    return " ".join(text.split())
