"""The command line: what it prints, in tables and as JSON, and how it fails."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from typebar.compiler.pipeline import PASSES, parse
from typebar.host import api, cli_tools
from typebar.host.cli import main
from typebar.host.cli_doctor import _package, _satisfies
from typebar.host.cli_errors import DEFECT, FAILED, INTERRUPTED, guarded
from typebar.host.cli_tools import split_passes
from typebar.host.device import DeviceError
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image
from typebar.isa.machine import Machine, shipped_machines
from typebar.isa.program import decode, encode
from typebar.models import find, shipped
from typebar.models.real import real_models

FRONT = Path(__file__).parent / "compiler" / "front"
MODEL, PROMPT = "folio-draft", "And the king said"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "draft.safetensors"
    assert main(["compile", MODEL, "-o", str(path), "--machine", "tiny", "--devices", "2"]) == 0
    return path


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that succeeds prints."""
    capsys.readouterr()
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def data(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(output(capsys, *arguments, "--json"))


def test_machines(capsys: pytest.CaptureFixture[str]) -> None:
    listed = data(capsys, "machines")
    assert [item["name"] for item in listed] == shipped_machines()
    for item in listed:
        hashes = item.pop("contract_hash"), item.pop("timing_hash")
        machine = Machine.from_mapping(item)
        assert hashes == (machine.contract_hash(), machine.timing_hash())
    assert all(name in output(capsys, "machines") for name in shipped_machines())


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    listed = data(capsys, "models")
    assert [item["name"] for item in listed] == [model.name for model in (*shipped(), *real_models())]
    assert all(Path(item["path"], "config.json").is_file() for item in listed if item["shipped"])
    assert MODEL in output(capsys, "models")


def test_compile_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bf16.safetensors"
    facts = data(capsys, "compile", MODEL, "-o", str(path), "--machine", "tiny", "--devices", "3", "--weights", "bf16")
    with Image.open(path) as opened:
        assert (facts["devices"], facts["weights"]) == (opened.manifest.devices, opened.manifest.weights_format)
        assert (facts["devices"], facts["weights"], facts["machine"]) == (3, "bf16", "tiny")
        assert facts["program_bytes"] == encode(opened.program).size
    assert facts["image_bytes"] == path.stat().st_size
    assert list(tmp_path.iterdir()) == [path]


def test_disassembly_assembles_to_the_same_program(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(capsys, "disasm", str(image))
    assert "main:" in text and "; layer_norm" in text
    source, words = tmp_path / "program.s", tmp_path / "program.bin"
    source.write_text(text)
    facts = data(capsys, "asm", str(source), "-o", str(words))
    with Image.open(image) as opened:
        assert decode(words.read_bytes()) == opened.program
        assert facts["instructions"] == len(opened.program)
    assert facts["bytes"] == words.stat().st_size
    as_json = data(capsys, "disasm", str(image))
    simulated = data(capsys, "simulate", str(image), "--prompt-tokens", "1", "--new-tokens", "1")
    assert as_json["text"] == text
    assert facts["sha256"] == as_json["sha256"] == simulated["program_sha256"]


def test_asm_without_output_only_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.s"
    source.write_text("again:\n    sadd rd=r3 a=r3 b=1\n    blt to=again a=r3 b=9\n    halt\n")
    assert data(capsys, "asm", str(source))["instructions"] == 3
    assert "192" in output(capsys, "asm", str(source))
    assert list(tmp_path.iterdir()) == [source]


def test_run_prints_the_text_that_the_interface_returns(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["run", str(image), "--prompt", PROMPT, "--max-new-tokens", "8"]
    with api.load(image, device=["sim"]) as model:
        expected = model.generate(PROMPT, max_new_tokens=8)
    simulated = data(capsys, *options, "--device", "sim")
    assert (simulated["text"], simulated["tokens"]) == (expected.text, expected.tokens)
    assert (simulated["device"], simulated["reasons"]) == ("sim", [])
    assert output(capsys, *options, "--device", "sim") == f"{PROMPT}{expected.text}\n"
    automatic = data(capsys, *options)
    assert automatic["device"] == "torch"
    assert any("XRT" in reason for reason in automatic["reasons"])


def test_run_from_token_ids_and_samples(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with api.load(image, device="torch") as model:
        ids = ",".join(map(str, model.tokenizer.encode(PROMPT)))
    common = ["run", str(image), "--device", "torch", "--max-new-tokens", "12", "--do-sample", "--top-k", "50"]
    by_text = data(capsys, *common, "--prompt", PROMPT, "--seed", "3")
    assert data(capsys, *common, "--prompt-ids", ids, "--seed", "3") == by_text
    assert data(capsys, *common, "--prompt", PROMPT, "--seed", "4")["tokens"] != by_text["tokens"]


def test_simulate_reports(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    options = ["simulate", str(image), "--prompt-tokens", "4", "--new-tokens", "5"]
    report = data(capsys, *options, "--trace", str(trace))
    wanted = {
        "machine", "devices", "clock_mhz", "prefill", "decode", "breakdown", "program_bytes", "program_sha256",
        "total_ms", "wall_s",
    }  # fmt: skip
    assert wanted <= report.keys()
    assert report["prefill"].keys() >= {"tokens", "cycles", "ms"}
    figures = {"ms_per_token", "tokens_per_s", "hbm_bytes_per_token", "hbm_utilization", "limit_ms_per_token"}
    assert report["decode"].keys() >= figures | {"tokens", "cycles"}
    assert (report["machine"], report["devices"], report["clock_mhz"]) == ("tiny", 2, 200)
    cycles = report["prefill"]["cycles"] + report["decode"]["cycles"]
    assert sum(report["breakdown"].values()) == cycles
    assert json.loads(trace.read_text())["traceEvents"]
    assert f"{report['decode']['ms_per_token']:.4f}" in output(capsys, *options)
    slower = data(capsys, *options, "--set", "hbm.latency=400")
    assert slower["decode"]["cycles"] > report["decode"]["cycles"]


def test_opt_runs_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = data(capsys, "opt", "--list")
    assert [item["name"] for item in listed] == list(PASSES)
    assert all(item["summary"].endswith(".") for item in listed)  # whole sentences
    given, _, expected = (FRONT / "mask_causal.mlir").read_text().partition("// -----")
    source, target = tmp_path / "in.mlir", tmp_path / "out.mlir"
    source.write_text(given)
    assert main(["opt", str(source), "--passes", "classify-masks", "-o", str(target)]) == 0
    assert parse(target.read_text()).is_structurally_equivalent(parse(expected.removeprefix("// -----")))
    assert 'mask = "causal"' not in output(capsys, "opt", str(source))


def test_passes_from_a_pipe_run_one_by_one_or_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = "partition{devices=2 align=8},fuse{hoist=false},allocate{words=16384 segment=256}"
    at_once = output(capsys, "opt", str(FRONT / "gpt2_step.mlir"), "-p", together)
    text = (FRONT / "gpt2_step.mlir").read_bytes()
    for name in split_passes(together):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        text = output(capsys, "opt", "-", "-p", name).encode()
    assert text.decode() == at_once
    assert "tbd.program" in at_once and "scratch" in at_once


@pytest.mark.parametrize(
    ("text", "names"),
    [("", []), ("a", ["a"]), ("a, b{x=1,y=2},c", ["a", "b{x=1,y=2}", "c"])],
)
def test_pass_names_split_at_outer_commas(text: str, names: list[str]) -> None:
    assert split_passes(text) == names


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    report = data(capsys, "doctor")
    assert report["ok"] and report["auto"] in [item["name"] for item in report["devices"] if item["available"]]
    assert {item["name"] for item in report["packages"]} >= {"torch", "xdsl", "pytest"}
    assert "ready" in output(capsys, "doctor")
    monkeypatch.setattr("typebar.host.cli_doctor.metadata.requires", lambda name: ["no-such-package==1"])
    assert main(["doctor", "--no-devices"]) == FAILED
    assert "problem: package no-such-package ==1: not installed" in capsys.readouterr().out


def test_versions_compare_by_their_numbers() -> None:
    assert _satisfies("2.13.0+cpu", "==", "2.13") and not _satisfies("2.13.1", "==", "2.13.0")
    assert _satisfies("0.100", ">=", "0.29") and not _satisfies("0.9", ">=", "0.29")
    assert _package('pytest>=0.1.post2; extra == "dev"')["wanted"] == ">=0.1.post2"


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (TypebarError("a rule\nof two lines"), 2, "a rule of two lines"),
        (DeviceError("device 0 is lost"), FAILED, "device 0 is lost"),
        (OSError(28, "No space left on device", "out"), FAILED, "'out': No space left on device"),
        (MemoryError(), FAILED, "out of memory: use a smaller model, a shorter context or a larger host"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted"),
        (RuntimeError("odd"), DEFECT, "internal error, RuntimeError: odd (set TYPEBAR_DEBUG=1 for the traceback)"),
    ],
)
def test_every_failure_is_one_line(
    error: BaseException, status: int, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> int:
        raise error

    monkeypatch.delenv("TYPEBAR_DEBUG", raising=False)
    assert guarded(fail) == status
    assert capsys.readouterr().err == f"typebar: error: {text}\n"


def test_debugging_lets_tracebacks_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TYPEBAR_DEBUG", "1")

    def fail(as_json: bool = False) -> None:
        raise TypebarError("as is")

    monkeypatch.setattr(cli_tools, "print_json", lambda found: fail())
    with pytest.raises(TypebarError, match="as is"):
        main(["machines", "--json"])


def test_starts_quickly_and_without_torch() -> None:
    code = "import sys; from typebar.host.cli import main; main(['machines']); assert 'torch' not in sys.modules"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 3, "under a second where nothing else runs"


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    listed = output(capsys)
    for command in [
        "compile",
        "run",
        "simulate",
        "disasm",
        "asm",
        "opt",
        "machines",
        "models",
        "unary-errors",
        "doctor",
    ]:
        assert command in listed
        assert "Usage: typebar" in output(capsys, command, "--help")
    assert output(capsys, "--version").startswith("typebar 0.")


def test_a_closed_pipe_is_no_traceback(image: Path) -> None:
    command = f"{sys.executable} -m typebar disasm {image} | head -n 1"
    made = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert made.stdout == "main:\n" and "Traceback" not in made.stderr


def test_closed_standard_output_is_one_line() -> None:
    command = f"{sys.executable} -m typebar machines >&-"
    made = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, timeout=60)
    assert made.returncode == FAILED and made.stderr.count("\n") == 1
    assert made.stderr.startswith("typebar: error: standard output is closed")


def test_text_that_the_terminal_cannot_show_is_replaced(image: Path) -> None:
    command = [sys.executable, "-m", "typebar", "run", str(image), "--prompt", "Na\xefve", "--max-new-tokens", "1"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    made = subprocess.run(command, capture_output=True, env=environment, timeout=60)
    assert made.returncode == 0 and made.stdout.startswith(b"Na?ve")


@pytest.mark.long
def test_unary_errors(capsys: pytest.CaptureFixture[str]) -> None:
    found = data(capsys, "unary-errors")
    assert all(item["ulp"] <= 2 for item in found if item["function"] in ("exp", "recip", "rsqrt"))
    assert len(found) == 16 and "gelu_tanh" in output(capsys, "unary-errors")


@pytest.mark.long
@pytest.mark.parametrize("script", ["generate.py", "demo.py"])
def test_examples_run(script: str, tmp_path: Path) -> None:
    path = Path(__file__).parent.parent / "examples" / script
    made = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr
    if script == "demo.py":
        assert "All 64 tokens equal torch's float32 greedy tokens." in made.stdout
    else:
        assert len(path.read_text().splitlines()) < 30 and "ms/token on 4 x u280" in made.stdout


def test_facts_that_the_files_lack_are_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "short.safetensors"
    ring = ["--machine", "tiny", "--devices", "1"]
    data(capsys, "compile", MODEL, "-o", str(path), *ring, "--context", "32", "--eos", "7", "--eos", "9")
    with Image.open(path) as opened:
        assert (opened.manifest.model["context"], opened.manifest.model["eos"]) == (32, [7, 9])
    assert main(["run", str(path), "--prompt", PROMPT, "--max-new-tokens", "64", "--device", "sim"]) == 2
    assert "context of 32" in capsys.readouterr().err


def test_a_chat_goes_through_the_models_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talker, path = tmp_path / "talker", tmp_path / "talker.safetensors"
    shutil.copytree(find(MODEL).path, talker)
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}[answer]"
    (talker / "chat_template.jinja").write_text(template)
    data(capsys, "compile", str(talker), "-o", str(path), "--machine", "tiny", "--devices", "1")
    options = ["run", str(path), "--max-new-tokens", "4", "--device", "sim"]
    answer = data(capsys, *options, "--chat", "Who goes there?", "--system", "Be brief.")
    spelt = data(capsys, *options, "--prompt", "[system] Be brief. [user] Who goes there? [answer]")
    assert (answer["tokens"], answer["prompt_tokens"]) == (spelt["tokens"], spelt["prompt_tokens"])
    assert output(capsys, *options, "--chat", "Who goes there?").strip() != ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--chat", "a"], "no chat template"),
        (["--prompt", "a", "--chat", "b"], "exactly one"),
        (["--prompt", "a", "--system", "b"], "give --chat"),
    ],
)
def test_bad_chats(image: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(image), *arguments, "--device", "sim"]) == 2
    assert says in capsys.readouterr().err
