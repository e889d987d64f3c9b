"""The margin of int8 K and V: how much beyond a calibration's range other text goes, and what room for it costs.

Calibrates on training texts, drawn at random, and counts in held-out text the values of K and V that are beyond the
range times each margin, and the tokens that have any. Then the divergence of the next token's distribution from that
without int8 K and V, in nats a token, for each margin.

    python benchmarks/int8_margin.py DATA [--model folio-draft] [--calibrate 1000 4000 16000] [--tokens 10000]

DATA is a corpus fetched by `python -m typebar.models.corpus DATA`. Some 5 minutes for the default.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from xdsl.ir import Operation

from typebar.compiler import caches
from typebar.compiler.frontend import FrontendModel, load_model
from typebar.compiler.interpreter import StepInterpreter
from typebar.compiler.passes.scale_caches import attentions
from typebar.models import find
from typebar.models.corpus import Document, documents

MARGINS = (1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
COMPARED = 8


def pieces(found: Sequence[Document], tokenizer: Tokenizer, context: int, count: int) -> list[list[int]]:
    """The beginnings of documents, `count` tokens in all."""
    made: list[list[int]] = []
    left = count
    for document in found:
        ids = tokenizer.encode(document.text).ids[: min(context, left)]
        if ids:
            made.append(ids)
            left -= len(ids)
        if not left:
            break
    return made


def beyond(
    model: FrontendModel, texts: list[list[int]], ranges: caches.Ranges
) -> tuple[int, dict[float, int], dict[float, int]]:
    """Values of K and V, and for each margin those beyond it and the tokens that have any."""
    watched: dict[Operation, list[tuple[int, int]]] = {}
    for number, op in enumerate(attentions(model.module)):
        for side, value in enumerate((op.k, op.v)):
            assert isinstance(value.owner, Operation)
            watched.setdefault(value.owner, []).append((number, side))
    values, counts, tokens = 0, dict.fromkeys(MARGINS, 0), dict.fromkeys(MARGINS, 0)
    now = dict.fromkeys(MARGINS, 0)

    def note(op: Operation, layer: int, value: torch.Tensor) -> None:
        nonlocal values
        for number, side in watched.get(op, ()):
            values += value.numel()
            share = value.abs().numpy() / ranges.found[number, layer][side]
            for margin in MARGINS:
                now[margin] += int((share > margin).sum())

    step = StepInterpreter(model.module, lambda name: torch.from_numpy(model.lookup(name)), trace=note)
    for text in texts:
        for position, token in enumerate(text):
            step.step(token, position)
            for margin in MARGINS:
                counts[margin] += now[margin]
                tokens[margin] += now[margin] > 0
                now[margin] = 0
    return values, counts, tokens


def log_probabilities(model: FrontendModel, texts: list[list[int]]) -> torch.Tensor:
    step = StepInterpreter(model.module, lambda name: torch.from_numpy(model.lookup(name)))
    rows = [step.step(token, position) for text in texts for position, token in enumerate(text)]
    return torch.log_softmax(torch.stack(rows).double(), -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="folio-draft")
    parser.add_argument("--calibrate", type=int, nargs="+", default=[1000, 4000, 16000], help="tokens to calibrate on")
    parser.add_argument("--tokens", type=int, default=10000, help="held-out tokens")
    args = parser.parse_args()
    model, path = load_model(find(args.model).path), find(args.model).path
    tokenizer, context = Tokenizer.from_file(str(path / "tokenizer.json")), int(model.config["context"])
    found = list(documents(args.data))
    training = [document for document in found if not document.held_out]
    np.random.default_rng(0).shuffle(training)  # type: ignore[arg-type]
    held = pieces([document for document in found if document.held_out], tokenizer, context, args.tokens)
    console = Console(width=120)
    table = Table("calibrated on", "values", *(f"beyond {margin:g}" for margin in MARGINS), title="Values (tokens)")
    for count in args.calibrate:
        ranges = caches.calibrate(model, pieces(training, tokenizer, context, count))
        values, counts, tokens = beyond(model, held, ranges)
        table.add_row(f"{count:,}", f"{values:,}", *(f"{counts[m]:,} ({tokens[m]:,})" for m in MARGINS))
    console.print(table)
    texts = held[:COMPARED]
    exact = log_probabilities(model, texts)
    table = Table(*(f"{margin:g}" for margin in MARGINS), title=f"Nats a token by margin, {len(exact):,} tokens")
    cells = []
    for margin in MARGINS:
        caches.MARGIN = margin
        found_here = log_probabilities(caches.int8_caches(model, ranges), texts)
        cells.append(f"{float((exact.exp() * (exact - found_here)).sum(-1).mean()):.3g}")
    table.add_row(*cells)
    console.print(table)


if __name__ == "__main__":
    main()
