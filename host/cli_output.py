"""What the command line prints and writes: tables or JSON on standard output, progress on standard error, files."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from typebar.isa.errors import TypebarError

_PLAIN_WIDTH = 120
"""Columns of a table that does not go to a terminal."""


def stdout() -> Console:
    """A console on standard output; it neither wraps prose nor guesses at markup."""
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)


def print_json(data: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(data, indent=2, allow_nan=False))


def print_table(
    title: str, header: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()
) -> None:
    """A table on standard output; `numbers` are the columns aligned to the right."""
    table = Table()
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    _titled(title, table)


def print_facts(title: str, rows: Iterable[tuple[str, object]]) -> None:
    """A table of names and values on standard output, without a header."""
    table = Table(show_header=False)
    for name, value in rows:
        table.add_row(name, str(value))
    _titled(title, table)


def _titled(title: str, table: Table) -> None:
    console = stdout()
    console.print(f"{title}:", soft_wrap=True)
    console.print(table)


def note(text: str) -> None:
    """One line on standard error."""
    print(f"typebar: {text}", file=sys.stderr)


@contextlib.contextmanager
def progress(label: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, drawn only on a terminal; gives `update(done, total)`.

    The bar pulses until the first update.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def status_line(wanted: bool = True) -> Iterator[Callable[[str], None]]:
    """A line on standard error that each call of what this gives writes anew; only on a terminal, gone at the end."""
    shown = wanted and sys.stderr.isatty()

    def show(text: str) -> None:
        if shown:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns  # 0 where the terminal does not say
            line = text[: columns - 1] if columns else text
            print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        show("")


def read_text(path: str, what: str) -> str:
    """A file's UTF-8 text, or standard input's for "-".

    Raises:
        TypebarError: it cannot be read, or is not text.
    """
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return raw.decode("utf-8")
    except OSError as error:
        raise TypebarError(f"{what} {path!r} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise TypebarError(f"{what} {path!r} is not UTF-8 text (byte {error.start}): give a text file") from None


def write_file(path: str | Path, data: bytes) -> None:
    """Write a file that appears complete or not at all.

    Raises:
        TypebarError: it cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise TypebarError(f"output {str(path)!r} is a directory: name a file")
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(draft, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    except OSError as error:
        raise TypebarError(f"output {str(path)!r} cannot be written: {error.strerror or error}") from None
    finally:
        draft.unlink(missing_ok=True)


def settings(items: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` items as a mapping.

    Raises:
        TypebarError: an item without "=", or a key given twice.
    """
    found: dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise TypebarError(f"--set {item!r} is no setting: write KEY=VALUE, for example hbm.latency=80")
        if key in found:
            raise TypebarError(f"--set gives {key} twice: give it once")
        found[key] = value
    return found
