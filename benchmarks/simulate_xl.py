"""What simulating GPT-2 XL on four devices costs here, compile included: seconds, memory, device-cycles a second.

The time depends on the machine; the cycle counts do not.

    python benchmarks/simulate_xl.py [--json]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

COMMAND = ["-m", "typebar", "simulate", "--shape", "gpt2-xl", "--devices", "4"]
LENGTHS = ["--prompt-tokens", "64", "--new-tokens", "64", "--json"]


def measure() -> dict[str, Any]:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *COMMAND, *LENGTHS], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    report = json.loads(done.stdout)
    return {
        "command_s": seconds,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        "device_cycles_per_s": report["device_cycles_per_s"],
        "program_bytes": report["program_bytes"],
        "ms_per_token": report["decode"]["ms_per_token"],
        "limit_ms_per_token": report["decode"]["limit_ms_per_token"],
        "hbm_utilization": report["decode"]["hbm_utilization"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    figures = measure()
    if parser.parse_args().json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):24} {value:,.4g}")


if __name__ == "__main__":
    main()
