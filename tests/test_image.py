"""Images: written and read back to the byte, streamed atomically, and refused in one line when anything is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open

from typebar.isa.image import Image, ImageError, TensorPlan, plan_regions, write_image
from typebar.isa.instructions import Region
from typebar.isa.machine import Machine
from typebar.isa.program import assemble, encode

TINY = Machine.load("tiny")
PROGRAM = assemble("start:\n    sli rd=r3 value=7   ; embed\nloop:\n    bne to=loop a=r3 b=7\n    halt\n")
PLANS = [
    TensorPlan("qkv", Region.WEIGHTS, 0, 5000, {"kind": "matrix"}),
    TensorPlan("qkv", Region.WEIGHTS, 1, 3000),
    TensorPlan("bias", Region.LOCAL, 1, 12),
    TensorPlan("wte", Region.PARAMS, None, 4097),
    TensorPlan("bias", Region.LOCAL, 0, 12),
    TensorPlan("head", Region.WEIGHTS, 0, 0),
    TensorPlan("head", Region.WEIGHTS, 1, 64),
    TensorPlan("wpe", Region.PARAMS, None, 100),
]


def content(plan: TensorPlan) -> NDArray[np.uint8]:
    seed = hash((plan.bytes, plan.device or 0, int(plan.region))) & 0xFFFF
    return np.random.default_rng(seed).integers(0, 256, plan.bytes, np.uint8)


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "name": "trial",
        "machine": TINY,
        "devices": 2,
        "weights_format": "fp16",
        "entries": {"start": 0, "step": 1},
        "labels": PROGRAM.labels,
        "comments": PROGRAM.comments,
        "regions": {"kv": 8192, "io": 4096},
        "io": {"tokens_line": 3},
        "model": {"vocab": 300, "eos": None, "rate": 0.5},
        "accounting": {"weight_bytes": 8064},
        "sources": {"h.0.w": {"shape": [3, 5], "dtype": "F16"}},
        "source_hash": "abc",
        **changes,
    }


def write(path: Path, plans: list[TensorPlan] = PLANS, **changes: Any) -> Path:
    write_image(path, fields(**changes), encode(PROGRAM), "graph α", b'{"a": 1}', plans, content)
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("image") / "good.safetensors")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("small") / "small.safetensors", [PLANS[3]], devices=1)


# Round trip ----------------------------------------------------------------------------------------------
def test_reads_back_what_was_written(good: Path) -> None:
    with Image.open(good) as image:
        assert image.program == PROGRAM and image.program.labels == PROGRAM.labels
        assert image.program.comments == PROGRAM.comments == {0: "embed"}
        assert (image.graph, image.tokenizer) == ("graph α", b'{"a": 1}')
        assert image.machine == TINY
        for plan in PLANS:
            assert np.array_equal(image.tensor(plan.name, plan.device), content(plan))
        manifest = image.manifest
        assert manifest.entries == {"start": 0, "step": 1} and manifest.io == {"tokens_line": 3}
        assert manifest.model == {"vocab": 300, "eos": None, "rate": 0.5}
        assert manifest.sources["h.0.w"].shape == (3, 5)
        assert manifest.regions == {
            Region.WEIGHTS: 12288, Region.KV: 8192, Region.PARAMS: 12288, Region.LOCAL: 4096, Region.IO: 4096,
        }  # fmt: skip
        assert image.record("qkv", 0).meta == {"kind": "matrix"}


def test_regions_are_mapped_slices_addressed_alike_on_all_devices(good: Path) -> None:
    image = Image.open(good)
    addresses = plan_regions(PLANS, TINY, 2)
    assert addresses.lines == {"qkv": 0, "bias": 0, "wte": 0, "head": 128, "wpe": 128}
    for plan in PLANS:
        for device in [plan.device] if plan.device is not None else [0, 1]:
            region = image.region(device, plan.region)
            start = addresses.lines[plan.name] * 64
            assert np.array_equal(region[start : start + plan.bytes], content(plan))
            assert not region[start + plan.bytes : start + addresses.slots[plan.name]].any()
            assert region.base is not None and not region.flags.writeable
            assert region.ctypes.data % 4096 == 0


def test_the_library_reads_the_file(good: Path) -> None:
    with safe_open(good, framework="numpy") as file:
        names = set(file.keys())
        assert np.array_equal(file.get_tensor("device.1.weights.qkv")[:3000], content(PLANS[1]))
        assert file.get_tensor("program").shape == (3, 64)
    assert names >= {"manifest", "graph", "tokenizer", "params.wte", "device.0.local.bias"}


def test_rows_longer_than_a_page_align_the_tensors() -> None:
    wider = {"hbm.channels": "64", "hbm.channel_bytes": "128", "hbm.fifo_bytes": "65536"}
    larger = {
        "matrix.interleave": "64",
        "matrix.lanes": "64",
        "matrix.fifo_port_bytes": "8192",
        "attention_block": "256",
    }
    wide = TINY.override({**wider, **larger})
    plans = [TensorPlan(name, Region.WEIGHTS, 0, 1) for name in ("a", "b")]
    assert plan_regions(plans, wide, 1).lines == {"a": 0, "b": wide.row_lines} == {"a": 0, "b": 128}


def test_writing_is_deterministic_and_streams_in_plan_order(good: Path, tmp_path: Path) -> None:
    calls, seen = [], []

    def payload(plan: TensorPlan) -> NDArray[np.uint8]:
        calls.append((plan.name, plan.device))
        return content(plan)

    path = tmp_path / "again"
    args = (encode(PROGRAM), "graph α", b'{"a": 1}', PLANS, payload)
    write_image(path, fields(), *args, lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == good.read_bytes()
    assert calls == [(plan.name, plan.device) for plan in PLANS]
    assert seen == sorted(seen) and seen[-1] == (path.stat().st_size,) * 2


def test_an_open_image_survives_its_replacement_and_close_keeps_arrays(tmp_path: Path) -> None:
    image = Image.open(write(tmp_path / "i"))
    kept = image.tensor("qkv", 0)
    write(tmp_path / "i", name="other")
    image.close()
    assert np.array_equal(kept, content(PLANS[0]))
    with pytest.raises(ImageError, match="closed"):
        image.tensor("qkv", 0)


def test_timing_may_differ_and_the_machine_passed_is_used(good: Path) -> None:
    faster = TINY.override({"clock_mhz": "300", "hbm.latency": "9"})
    assert Image.open(good, faster).machine == faster


# Writing fails cleanly -----------------------------------------------------------------------------------
def broken_payload(error: BaseException) -> Callable[[TensorPlan], NDArray[np.uint8]]:
    def payload(plan: TensorPlan) -> NDArray[np.uint8]:
        if plan.name == "head":
            raise error
        return content(plan)

    return payload


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), OSError("source went away")])
def test_a_failing_payload_leaves_the_old_file_and_no_other(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "i"
    target.write_bytes(b"old")
    with pytest.raises(type(error)) as caught:
        write_image(target, fields(), encode(PROGRAM), "", b"", PLANS, broken_payload(error))
    assert caught.value is error
    assert os.listdir(tmp_path) == ["i"] and target.read_bytes() == b"old"


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))  # the same path as a full disk: the system refuses
    try:
        with pytest.raises(ImageError, match="cannot be written: File too large"):
            write(tmp_path / "i")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("target", "message"),
    [("", "exists and is no regular file"), ("no/such/folder", "No such file"), ("file/below", "Not a directory")],
)
def test_a_target_that_cannot_be_a_file(tmp_path: Path, target: str, message: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ImageError, match=message):
        write(tmp_path / target)
    assert os.listdir(tmp_path) == ["file"]


def test_a_pipe_or_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="no regular file"):
        write(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


WEIGHT = TensorPlan("w", Region.WEIGHTS, 0, 10)
REFUSED: list[tuple[dict[str, Any], list[TensorPlan], str]] = [
    ({"devices": 0}, [], "1 to 64 devices, not 0"),
    ({"devices": 65}, [], "1 to 64 devices, not 65"),
    ({}, [WEIGHT], "one shard on each of 2 devices; device 1 is missing"),
    ({"devices": 1}, [WEIGHT, WEIGHT], "'w' is given twice"),
    ({"devices": 1}, [WEIGHT, TensorPlan("w", Region.LOCAL, 0, 10)], "'w' is given twice"),
    ({"devices": 1}, [WEIGHT, TensorPlan("w", Region.WEIGHTS, 1, 10)], "device 1 is none of them"),
    ({}, [TensorPlan("w", Region.KV, 0, 10)], "region KV holds no packed tensors"),
    ({}, [TensorPlan("w", Region.PARAMS, 0, 10)], "PARAMS has none"),
    ({}, [TensorPlan("", Region.PARAMS, None, 10)], "not empty"),
    ({}, [TensorPlan("a b", Region.PARAMS, None, 10)], "without spaces"),
    ({}, [TensorPlan("w", Region.PARAMS, None, -1)], "-1 bytes"),
    ({"entries": {"start": 3}}, [], "entries: start must be an integer from 0 to 2, not 3"),
    ({"labels": {"end": 4}}, [], "labels: end must be"),
    ({"comments": {3: "x"}}, [], "outside the program of 3 instructions"),
    ({"weights_format": "fp4"}, [], "weights_format 'fp4' is unknown"),
    ({"regions": {"kv": 7, "io": 0}}, [], "KV has 7 bytes, no multiple of 64"),
    ({"regions": {"kv": 2**26 + 64, "io": 0}}, [], "bytes of HBM on each device, which has 67108864"),
    ({"regions": {"kv": 0, "io": 2**26 + 64}}, [], "bytes of DDR"),
    ({"regions": {"kv": 0}}, [], "regions lacks the field 'io'"),
    ({"regions": {"kv": 0, "io": 0, "x": 0}}, [], "regions has an unknown field 'x'"),
    ({"model": {"x": float("nan")}}, [], "cannot be written as JSON"),
    ({"model": {"x": {1, 2}}}, [], "cannot be written as JSON"),
    ({"sources": {"w": {"shape": [-1], "dtype": "F16"}}}, [], "shape of 'w'"),
    ({"colour": 1}, [], "missing or unknown: colour"),
    ({"machine": {"name": "x"}}, [], "description is missing"),
]


@pytest.mark.parametrize(("changes", "plans", "message"), REFUSED)
def test_a_bad_request_is_refused_before_a_file_is_made(
    tmp_path: Path, changes: dict[str, Any], plans: list[TensorPlan], message: str
) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        write(tmp_path / "i", plans, **changes)
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("program", "tokenizer", "message"),
    [
        (np.zeros(0, np.uint8), b"", "no instructions"),
        (np.zeros(63, np.uint8), b"", "truncated"),
        (np.full(64, 255, np.uint8), b"", "word 0 is no instruction"),
        (np.zeros(64, np.int32), b"", "not int32"),
        (encode(PROGRAM), b"[]", "not a JSON object"),
        (encode(PROGRAM), b"{", "not valid JSON"),
    ],
)
def test_bad_program_or_tokenizer(tmp_path: Path, program: NDArray[np.uint8], tokenizer: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        write_image(tmp_path / "i", fields(entries={}, labels={}, comments={}), program, "", tokenizer, [], content)
    assert os.listdir(tmp_path) == []


def test_a_payload_of_the_wrong_length(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"'params.wte' came as 9 elements of uint8; its plan says 4097 bytes"):
        write_image(tmp_path / "i", fields(), encode(PROGRAM), "", b"", [PLANS[3]], lambda plan: np.zeros(9, np.uint8))
    assert os.listdir(tmp_path) == []


# Reading refuses -----------------------------------------------------------------------------------------
def refuse(path: Path, message: str, machine: Machine | None = None) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        Image.open(path, machine)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def take_apart(path: Path) -> tuple[dict[str, Any], bytearray]:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])


def put_together(path: Path, header: Any, data: bytes | bytearray) -> Path:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def with_manifest(good: Path, path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy with a changed manifest and a checksum to match: what a faulty or hostile writer could make."""
    header, data = take_apart(good)
    start, end = header["manifest"]["data_offsets"]
    manifest = json.loads(data[start:end])
    text = change(manifest)
    raw = text if isinstance(text, bytes) else json.dumps(manifest).encode()
    header["manifest"] = {"dtype": "U8", "shape": [len(raw)], "data_offsets": [start, start + len(raw)]}
    header["__metadata__"]["manifest_sha256"] = hashlib.sha256(raw).hexdigest()
    return put_together(path, header, bytes(data[:start]) + raw)


def setter(value: Any, *keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


def remover(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest.pop(key)


BAD_MANIFESTS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda manifest: b"{", "manifest is not valid JSON"),
    (lambda manifest: b'{"a":1,"a":1}', "a key is repeated"),
    (lambda manifest: b'{"a":NaN}', "NaN is not a number"),
    (lambda manifest: b"[" * 100_000, "not valid JSON"),
    (lambda manifest: b"1" * 10_000, "not valid JSON"),
    (lambda manifest: b"\xff", "not valid JSON"),
    (lambda manifest: b"[]", "must be an object"),
    (setter(2, "format_version"), "format version 2, this Typebar reads 1: update"),
    (setter(0, "isa_version"), "isa version 0, .*compile the model again"),
    (setter(9, "numerics_version"), "numerics version 9"),
    (setter(True, "format_version"), "must be an integer"),
    (remover("format_version"), "lacks the field 'format_version'"),
    *((remover(key), f"lacks the field '{key}'") for key in ("name", "machine", "tensors", "io", "sha256", "regions")),
    (setter(1, "surprise"), "unknown field 'surprise'"),
    (setter(5, "name"), "name must be text, not 5"),
    (setter({}, "tensors"), "tensors must be an array"),
    (setter([7], "tensors"), "must be an object, not 7"),
    (setter(0, "devices"), "devices must be an integer from 1 to 64, not 0"),
    (setter(10**30, "devices"), "devices must be"),
    (setter(1, "devices"), "one shard on each of 1 devices"),
    (setter("f" * 63, "contract_hash"), "contract_hash must be a SHA-256"),
    (setter("f" * 64, "contract_hash"), "does not hash"),
    (setter("f" * 64, "timing_hash"), "does not hash"),
    (setter(16, "machine", "matrix", "lanes"), "does not hash"),
    (setter(7, "machine", "matrix", "lanes"), "must be a power of two"),
    (setter("a\nb", "machine", "x\ny"), "unknown machine parameter"),
    (setter(3, "entries", "start"), "from 0 to 2"),
    (setter(1.0, "io", "tokens_line"), "must be an integer"),
    (setter(1, "comments", "01"), "comment at '01'"),
    (setter(1, "comments", "1"), "must be text"),
    (setter(1, "tensors", 0, "line"), "misaligned"),
    (setter(64, "tensors", 5, "line"), "overlapping"),
    (setter(10**9, "tensors", 0, "line"), "outside its region"),
    (setter(2**61, "tensors", 0, "bytes"), "'head' is at line 128, overlapping"),
    (setter(9000, "tensors", 6, "bytes"), "region WEIGHTS has 12288 bytes but its tensors take 20480"),
    (setter("x", "tensors", 2, "name"), "tensor 'x' must have one shard on each of 2 devices; device 0 is missing"),
    (setter("flash", "tensors", 0, "region"), "region 'flash' is unknown"),
    (setter("kv", "tensors", 0, "region"), "holds no packed tensors"),
    (setter(None, "tensors", 0, "device"), "has device None"),
    (setter("0" * 64, "tensors", 0, "sha256"), "checksum of 'device.0.weights.qkv'"),
    (setter("0" * 64, "sha256", "graph"), "checksum of 'graph'"),
    (setter(0, "regions", "params"), "region PARAMS has 0 bytes"),
    (setter(2**40, "regions", "kv"), "bytes of HBM on each device"),
    (setter(2**62, "regions", "io"), "bytes of DDR on each device"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD_MANIFESTS)
def test_a_bad_manifest(good: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    refuse(with_manifest(good, tmp_path / "bad", change), message)


def test_an_unchanged_manifest_passes(good: Path, tmp_path: Path) -> None:
    Image.open(with_manifest(good, tmp_path / "same", lambda manifest: None))


def test_other_files(good: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "none", "cannot be read: No such file")
    refuse(tmp_path, "no regular file")
    refuse(Path("/dev/zero"), "no regular file")
    for name, raw, message in [
        ("empty", b"", "has 0 bytes, too few"),
        ("short", b"1234567", "has 7 bytes"),
        ("text", b"hello world, this is text", "header cannot be"),
        ("huge", struct.pack("<Q", 2**63) + b"{}", "header cannot be"),
        ("junk", struct.pack("<Q", 4) + b"junk", "header is not valid JSON"),
        ("list", struct.pack("<Q", 2) + b"[]", "header is no JSON object"),
        ("other", struct.pack("<Q", 2) + b"{}", "no Typebar image: compile the model first"),
    ]:
        (tmp_path / name).write_bytes(raw)
        refuse(tmp_path / name, message)


def entry(offsets: list[int], dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [offsets[1] - offsets[0]] if shape is None else shape, "data_offsets": offsets}


def test_headers_that_lie(good: Path, tmp_path: Path) -> None:
    header, data = take_apart(good)
    end = len(data)
    qkv = header["device.0.weights.qkv"]["data_offsets"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"graph": None}, "is no safetensors file|'graph' is missing"),
        ({"extra": entry([end, end])}, "'extra' is not in the manifest"),
        ({"manifest": entry(header["manifest"]["data_offsets"], dtype="I8")}, "must be bytes"),
        ({"program": entry(header["program"]["data_offsets"])}, "'program' has shape"),
        ({"device.0.weights.qkv": entry(qkv, shape=[2, 4096])}, "header and manifest disagree"),
        ({"device.0.weights.qkv": entry(qkv, shape=[2**70])}, "no safetensors file"),
        ({"device.0.weights.qkv": entry([qkv[0], 2**62])}, "header says"),
        ({"device.0.weights.qkv": entry([qkv[0], qkv[1] - 64])}, "no safetensors file"),
        ({"device.0.weights.qkv": {"dtype": "U8"}}, "entry 'device.0.weights.qkv' is damaged"),
        ({"graph": {**header["graph"], "data_offsets": ["a", "b"]}}, "'graph' must be bytes"),
        ({"graph": {**header["graph"], "shape": [1.5]}}, "'graph' must be bytes"),
        ({"__metadata__": {"format": "typebar image"}}, "metadata is damaged"),
        ({"__metadata__": {"format": "pt"}}, "no Typebar image"),
    ]
    for changes, message in cases:
        changed = {key: value for key, value in {**header, **changes}.items() if value is not None}
        refuse(put_together(tmp_path / "bad", changed, data), message)
    swapped = {**header, "params.wte": header["params.wpe"], "params.wpe": header["params.wte"]}
    refuse(put_together(tmp_path / "bad", swapped, data), "disagree on its length or place")
    text = json.dumps(header).encode()
    (tmp_path / "bad").write_bytes(struct.pack("<Q", len(text)) + text + data)
    refuse(tmp_path / "bad", "no multiple of 4096")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer", b'["a", 1]', "tokenizer is not a JSON object"),
        ("tokenizer", b'{"a": 1 ', "tokenizer is not valid JSON"),
        ("graph", b"\xff", "graph is not UTF-8"),
        ("program", b"\xff", "word 0 is no instruction"),
    ],
)
def test_contents_that_are_wrong_although_their_checksums_match(
    good: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    header, data = take_apart(good)
    start, end = header[name]["data_offsets"]
    data[start : start + len(content)] = content
    digest = hashlib.sha256(data[start:end]).hexdigest()
    path = put_together(tmp_path / "bad", header, data)
    refuse(with_manifest(path, path, setter(digest, "sha256", name)), message)


def test_an_empty_program(good: Path, tmp_path: Path) -> None:
    header, data = take_apart(good)
    start, end = header["program"]["data_offsets"]
    for name in ("graph", "tokenizer", "manifest"):
        header[name]["data_offsets"] = [offset - (end - start) for offset in header[name]["data_offsets"]]
    header["program"] = entry([start, start], shape=[0, 64])
    path = put_together(tmp_path / "bad", header, data[:start] + data[end:])

    def change(manifest: dict[str, Any]) -> None:
        manifest.update(entries={}, labels={}, comments={})
        manifest["sha256"]["program"] = hashlib.sha256(b"").hexdigest()

    refuse(with_manifest(path, path, change), r"'program' has shape \(0, 64\)")


def test_missing_tensors(good: Path, tmp_path: Path) -> None:
    header, data = take_apart(good)
    start = header["manifest"]["data_offsets"][0]
    del header["manifest"]
    refuse(put_together(tmp_path / "bad", header, data[:start]), "'manifest' is missing")
    header, data = take_apart(good)
    header["weights"] = header.pop("device.1.weights.head")
    refuse(put_together(tmp_path / "bad", header, data), "'device.1.weights.head' is missing")


def test_another_machine_names_the_differing_parameters(good: Path) -> None:
    refuse(good, r"'tiny', not 'u280'; it needs .*matrix.lanes 8 \(not 64\)", Machine.load("u280"))
    other = TINY.override({"ring.buffer_words": "8192"})
    refuse(good, r"it needs ring.buffer_words 4096 \(not 8192\): compile for this machine", other)


def test_unverified_opening_skips_only_the_packed_tensors(good: Path, tmp_path: Path) -> None:
    header, data = take_apart(good)
    data[header["device.0.weights.qkv"]["data_offsets"][0]] ^= 1
    path = put_together(tmp_path / "bad", header, data)
    refuse(path, "checksum of 'device.0.weights.qkv'")
    Image.open(path, verify=False)
    data[header["graph"]["data_offsets"][0]] ^= 1
    with pytest.raises(ImageError, match="checksum of 'graph'"):
        Image.open(put_together(path, header, data), verify=False)


def test_look_ups(good: Path) -> None:
    image = Image.open(good)
    with pytest.raises(ImageError, match="no tensor 'nothing' on device 0"):
        image.tensor("nothing", 0)
    with pytest.raises(ImageError, match="no tensor 'qkv' on PARAMS"):
        image.tensor("qkv")
    with pytest.raises(ImageError, match="there is no device 2"):
        image.region(2, Region.WEIGHTS)
    with pytest.raises(ImageError, match="KV has only a size"):
        image.region(0, Region.KV)


# Fuzz ----------------------------------------------------------------------------------------------------
def test_every_truncation_is_refused(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    path.write_bytes(small.read_bytes())
    for length in range(small.stat().st_size - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(ImageError):
            Image.open(path)


def padding_of(raw: bytes | bytearray) -> range:
    length = struct.unpack("<Q", raw[:8])[0]
    return range(8 + len(raw[8 : 8 + length].rstrip(b" ")), 8 + length)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), change=st.integers(1, 255))
def test_a_changed_byte_never_passes(small: Path, data: st.DataObject, change: int) -> None:
    raw = bytearray(small.read_bytes())
    padding = padding_of(raw)
    spots = [st.integers(0, padding.start - 1), st.integers(padding.start, len(raw) - 1)]
    index = data.draw(st.one_of(*spots))
    raw[index] ^= change
    path = small.with_name("changed")
    path.write_bytes(raw)
    try:
        Image.open(path)
    except ImageError as error:
        assert "\n" not in str(error)
    else:
        assert index in padding


@settings(max_examples=150, deadline=None)
@given(raw=st.binary(max_size=200), length=st.none() | st.integers(0, 250))
def test_random_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes, length: int | None) -> None:
    path = tmp_path_factory.getbasetemp() / "random"
    path.write_bytes(raw if length is None else struct.pack("<Q", length) + raw)
    with pytest.raises(ImageError):
        Image.open(path)
