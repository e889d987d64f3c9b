"""Line 2 of the first issue, by the command that publishes the figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("model", ["folio", pytest.param("folio-draft", marks=pytest.mark.long)])
def test_logits_against_torch(model: str) -> None:
    command = [sys.executable, "benchmarks/accuracy.py", "--model", model, "--devices", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    for kind in ("passages", "continuations"):
        figures = report[kind]
        assert figures["positions"] == 20 * 64
        assert figures["agreement"] >= 0.995, kind
        assert figures["largest_margin_of_a_disagreement"] < figures["largest_logit_error"], kind
        assert figures["largest_logit_error"] <= figures["torch_float16_largest_logit_error"], kind
