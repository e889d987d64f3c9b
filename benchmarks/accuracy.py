"""How near the machine's logits are to torch's: twenty passages of held-out text, 64 tokens each, teacher-forced.

Two texts for each passage: the passage itself, and torch float32's greedy continuation of its first 8 tokens. At
every position the machine's best token is compared with torch float32's, and its logits with a float64 run; torch's
own float16 run gives the yardstick.

    python benchmarks/accuracy.py [--model folio] [--machine u280] [--devices 4] [--weights fp16] [--json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

import typebar
from typebar.models import find

PASSAGES = Path(__file__).parent.parent / "tests" / "data" / "passages.json"
LENGTH, GIVEN = 64, 8


def reference(model: torch.nn.Module, tokens: list[int]) -> NDArray[np.float64]:
    with torch.inference_mode():
        logits: NDArray[np.float64] = model(torch.tensor([tokens])).logits[0].double().numpy()
    return logits


def compare(ours: NDArray[np.float32], single: NDArray[np.float64], double: NDArray[np.float64]) -> dict[str, Any]:
    """Agreement with float32's best token; for each disagreement the margin between float32's two best logits."""
    differs = ours.argmax(-1) != single.argmax(-1)
    best = np.sort(single, -1)[:, -2:]
    error = float(np.abs(ours - double).max())
    return {
        "positions": len(ours),
        "agree": int((~differs).sum()),
        "margins": (best[:, 1] - best[:, 0])[differs].tolist(),
        "error": error,
    }


def measure(name: str, machine: str, devices: int, weights: str) -> dict[str, Any]:
    path = find(name).path
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    passages = [tokenizer.encode(item["text"]).ids[:LENGTH] for item in json.loads(PASSAGES.read_text())]
    models = {
        d: GPT2LMHeadModel.from_pretrained(path, dtype=d).eval() for d in (torch.float32, torch.float64, torch.float16)
    }
    texts = {"passages": passages, "continuations": []}
    for tokens in passages:
        grown = models[torch.float32].generate(
            torch.tensor([tokens[:GIVEN]]), max_new_tokens=LENGTH, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        texts["continuations"].append(grown[0].tolist()[:-1])
    report: dict[str, Any] = {"model": name, "machine": machine, "devices": devices, "weights": weights}
    with tempfile.TemporaryDirectory() as folder:
        image = typebar.compile(
            name, Path(folder) / "image.safetensors", machine=machine, devices=devices, weights=weights
        )
        with typebar.load(image, device=["sim"]) as ours:
            for kind, sequences in texts.items():
                start = GIVEN - 1 if kind == "continuations" else 0
                results, half_error = [], 0.0
                for tokens in sequences:
                    exact = reference(models[torch.float64], tokens)[start:]
                    half = reference(models[torch.float16], tokens)[start:]
                    single = reference(models[torch.float32], tokens)[start:]
                    half_error = max(half_error, float(np.abs(half - exact).max()))
                    results.append(compare(ours.logits(tokens)[start:], single, exact))
                report[kind] = summary(results, half_error)
    return report


def summary(results: list[dict[str, Any]], half_error: float) -> dict[str, Any]:
    positions, agree = (sum(r[key] for r in results) for key in ("positions", "agree"))
    margins = [m for r in results for m in r["margins"]]
    return {
        "positions": positions,
        "agreement": agree / positions,
        "disagreements": positions - agree,
        "largest_margin_of_a_disagreement": max(margins, default=0.0),
        "largest_logit_error": max(r["error"] for r in results),
        "torch_float16_largest_logit_error": half_error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="folio")
    parser.add_argument("--machine", default="u280")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--weights", default="fp16", choices=["fp16", "bf16"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    report = measure(args.model, args.machine, args.devices, args.weights)
    if args.json:
        print(json.dumps(report))
        return
    table = Table(
        title=f"{report['model']} on {report['devices']} x {report['machine']}, {report['weights']}, against torch"
    )
    table.add_column("figure")
    kinds = ("passages", "continuations")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for key in report["passages"]:
        table.add_row(key.replace("_", " "), *(f"{report[kind][key]:.6g}" for kind in kinds))
    Console().print(table)


if __name__ == "__main__":
    main()
