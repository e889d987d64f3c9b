"""Ways to choose int8 weights, measured: the largest magnitude of a column, finer scales, and scaled inputs.

In torch float32, every linear layer's weights replaced by what int8 makes of them; embeddings and activations stay.
Ten of the twenty passages of held-out text give the activations' statistics, the other ten are measured.

- max-abs: a column's scale is its largest magnitude / 127. What `--weights int8` does.
- clip: the scale of least squared error among max-abs times 1, 0.975, 0.95, 0.9 and 0.85.
- clip, weighted: the same, each input's error weighted by its mean square.
- smooth A: inputs divided and weights multiplied by max|x|^A / max|w|^(1 - A) (SmoothQuant, equation 4).
- aware A: the same with mean|x|^A (AWQ, section 3.2).

Figures: mean divergence of the next token's distribution from the unquantised model's (nats), root mean square error of
the logits (each position's mean taken off), the perplexity's rise, and how often the best next token is the same.

    python benchmarks/int8_choices.py [folio folio-draft smollm2-135m-instruct] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from typebar.benchmarks.accuracy import PASSAGES
from typebar.models import find
from typebar.models.real import find_real

MODELS = ("folio", "folio-draft", "smollm2-135m-instruct")
CLIPS = (1.0, 0.975, 0.95, 0.9, 0.85)


@dataclass
class Inputs:
    """Sums over all positions of each input of a layer: |x|, x^2, max |x|, and the positions."""

    absolute: torch.Tensor
    square: torch.Tensor
    largest: torch.Tensor
    positions: int = 0

    def add(self, x: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        self.absolute += rows.abs().sum(0)
        self.square += rows.square().sum(0)
        self.largest = torch.maximum(self.largest, rows.abs().amax(0))
        self.positions += len(rows)


Choice = Callable[[torch.Tensor, Inputs], torch.Tensor]
"""What int8 makes of a weight [inputs, columns]."""


def quantised(weight: torch.Tensor, clip: float = 1.0) -> torch.Tensor:
    scale = weight.abs().amax(0) * clip / 127
    scale[scale == 0] = 1
    return (weight / scale).round().clamp(-127, 127) * scale


def clipped(weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    tried = torch.stack([quantised(weight, clip) for clip in CLIPS])
    best = ((tried - weight).square() * importance[:, None]).sum(1).argmin(0)
    return tried.gather(0, best.expand(1, *weight.shape))[0]


def scaled(weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    even = factor / factor.log().mean().exp()
    return quantised(weight * even[:, None]) / even[:, None]


def smooth(alpha: float) -> Choice:
    def choose(weight: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        largest = weight.abs().amax(1).clamp(min=1e-5)
        return scaled(weight, inputs.largest.clamp(min=1e-5) ** alpha / largest ** (1 - alpha))

    return choose


def aware(alpha: float) -> Choice:
    return lambda weight, inputs: scaled(weight, (inputs.absolute / inputs.positions).clamp(min=1e-5) ** alpha)


CHOICES: dict[str, Choice] = {
    "max-abs": lambda weight, inputs: quantised(weight),
    "clip": lambda weight, inputs: clipped(weight, torch.ones(len(weight))),
    "clip, weighted": lambda weight, inputs: clipped(weight, inputs.square / inputs.positions),
    "smooth 0.25": smooth(0.25),
    "smooth 0.5": smooth(0.5),
    "aware 0.25": aware(0.25),
    "aware 0.5": aware(0.5),
}


def layers(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, torch.Tensor]]:
    """Every linear layer with its weight as [inputs, columns]."""
    for module in model.modules():
        kind = type(module).__name__
        if kind in ("Linear", "Conv1D"):
            yield module, module.weight.data if kind == "Conv1D" else module.weight.data.t()


def logits(model: Any, texts: list[torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([model(tokens[None], use_cache=False).logits[0, :-1] for tokens in texts])


def observed(model: Any, texts: list[torch.Tensor]) -> dict[torch.nn.Module, Inputs]:
    found = {module: Inputs(*(torch.zeros(3, len(weight)).unbind())) for module, weight in layers(model)}
    hooks = [module.register_forward_pre_hook(lambda module, given: found[module].add(given[0])) for module in found]
    logits(model, texts)
    for hook in hooks:
        hook.remove()
    return found


def measure(name: str) -> dict[str, Any]:
    if name == "smollm2-135m-instruct":
        file = find_real(name).path()
        place, options = file.parent, {"gguf_file": file.name}
    else:
        place, options = find(name).path, dict[str, str]()
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options).eval()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    tokenizer = AutoTokenizer.from_pretrained(place, **options)
    passages = [torch.tensor(tokenizer(item["text"])["input_ids"]) for item in json.loads(PASSAGES.read_text())]
    inputs, texts = observed(model, passages[::2]), passages[1::2]
    targets, before = torch.cat([tokens[1:] for tokens in texts]), logits(model, texts)
    whole = [(module, weight, weight.clone()) for module, weight in layers(model)]
    rows = {}
    for label, choose in CHOICES.items():
        for module, weight, given in whole:
            weight.copy_(choose(given, inputs[module]))
        rows[label] = difference(before, logits(model, texts), targets)
    return {"tokens": len(targets), "choices": rows}


def difference(before: torch.Tensor, after: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    old, new = before.log_softmax(-1), after.log_softmax(-1)
    error = after - before
    rise = functional.cross_entropy(after, targets) - functional.cross_entropy(before, targets)
    return {
        "divergence": float((old.exp() * (old - new)).sum(-1).mean()),
        "rms_logit_error": float((error - error.mean(-1, keepdim=True)).square().mean().sqrt()),
        "rise_percent": 100 * (math.exp(float(rise)) - 1),
        "agreement": float((before.argmax(-1) == after.argmax(-1)).float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS, help=", ".join(MODELS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.models) - set(MODELS):
        parser.error(f"no model {', '.join(sorted(unknown))}: choose from {', '.join(MODELS)}")
    report = {name: measure(name) for name in args.models}
    if args.json:
        print(json.dumps(report))
        return
    for name, found in report.items():
        table = Table(
            "choice", "divergence", "rms error", "rise, %", "agreement", title=f"{name}, {found['tokens']} tokens"
        )
        for label, row in found["choices"].items():
            table.add_row(label, *(f"{row[key]:.4g}" for key in row))
        Console().print(table)


if __name__ == "__main__":
    main()
