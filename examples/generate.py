"""Compile a shipped model, generate on four simulated devices, and count the cycles: the whole of Typebar's API."""

import tempfile
from pathlib import Path

import typebar

with tempfile.TemporaryDirectory() as folder:
    image = Path(folder) / "folio.safetensors"
    typebar.compile("folio", image, machine="u280", devices=4)

    with typebar.load(image, device="sim") as model:
        answer = model.generate("To be, or not to be", max_new_tokens=48, do_sample=True, top_p=0.9, seed=7)
    print(answer.text)

    report = typebar.simulate(image, prompt_tokens=len(answer.prompt_tokens), new_tokens=len(answer.tokens))
    print(f"{report.decode['ms_per_token']:.4f} ms/token on {report.devices} x {report.machine}")
