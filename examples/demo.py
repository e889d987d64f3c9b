"""The whole way, checked: compile, generate on four simulated devices, compare with torch float32, count the cycles.

`make demo` runs it. Exit status 1 if a token differs from torch's.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import typebar
from typebar.host.cli_errors import guarded
from typebar.host.cli_model import print_report
from typebar.models import find

MODEL, MACHINE, DEVICES = "folio", "u280", 4
PROMPT = "In the beginning of the night the king said unto his servants,"
NEW_TOKENS = 64
IMAGE = Path("build") / f"{MODEL}.safetensors"


def torch_greedy(prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of the checkpoint itself, in torch float32, each step recomputed without a cache."""
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(find(MODEL).path, dtype=torch.float32).eval()
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def main() -> int:
    """Run the demonstration; returns the exit status."""
    start = time.perf_counter()
    IMAGE.parent.mkdir(exist_ok=True)
    print(f"Compiling {MODEL} for {DEVICES} {MACHINE} devices into {IMAGE} ...", flush=True)
    typebar.compile(MODEL, IMAGE, machine=MACHINE, devices=DEVICES)
    print(f"  {IMAGE.stat().st_size:,} bytes in {time.perf_counter() - start:.1f} s\n")

    print(f"Generating on a simulated ring of {DEVICES}, bit-exactly:\n\n{PROMPT}", end="", flush=True)
    with typebar.load(IMAGE, device="sim") as model:
        made = model.generate(PROMPT, max_new_tokens=NEW_TOKENS, streamer=lambda text: print(text, end="", flush=True))
    print("\n")
    if made.device != "sim":
        print(f"The simulator did not finish: {'; '.join(made.reasons)}", file=sys.stderr)
        return 1

    expected = torch_greedy(made.prompt_tokens, len(made.tokens))
    if made.tokens != expected:
        at = next(i for i, pair in enumerate(zip(made.tokens, expected, strict=True)) if pair[0] != pair[1])
        print(f"Token {at} is {made.tokens[at]}, but torch float32 chose {expected[at]}", file=sys.stderr)
        return 1
    print(f"All {len(expected)} tokens equal torch's float32 greedy tokens.\n")

    print_report(typebar.simulate(IMAGE, prompt_tokens=len(made.prompt_tokens), new_tokens=len(made.tokens)))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
