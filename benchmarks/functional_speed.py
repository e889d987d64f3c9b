"""Speed of the bit-exact functional simulator against torch float32, side by side in one run.

GPT-2 124M's shape with random weights, one u280 device, greedy decoding with K/V caches on both sides, the same
number of threads, steps interleaved so that both see the same machine load. The ratio is the figure; the times are not.

    python benchmarks/functional_speed.py [--threads 2] [--tokens 16] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

import typebar
from typebar.host.driver import DeviceEngine
from typebar.host.simulator import SimulatedDevice
from typebar.isa.image import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "gpt2.safetensors"
        typebar.compile(model, path, machine="u280", devices=1)
        image = Image.open(path)
        engine = DeviceEngine(image, SimulatedDevice(image.machine, 1, threads=args.threads), "sim")
        cache = DynamicCache()
        ours, theirs = [], []
        token = 464
        for _ in range(args.tokens + 2):  # two for warming up
            start = time.perf_counter()
            engine.logits([token])
            ours.append(time.perf_counter() - start)
            start = time.perf_counter()
            logits = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits
            theirs.append(time.perf_counter() - start)
            token = int(logits[0, -1].argmax())
    ratio = statistics.median(theirs[2:]) / statistics.median(ours[2:])
    if args.json:
        print(json.dumps({"threads": args.threads, "tokens": args.tokens, "speed_ratio": ratio}))
    else:
        print(f"functional simulator at {ratio:.2f} of torch float32's speed, {args.threads} threads each")


if __name__ == "__main__":
    main()
