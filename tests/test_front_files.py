"""Files on disk: GGUF, and damaged checkpoints, which end in one clear line."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from typebar.compiler.frontend import import_model
from typebar.compiler.frontend.gguf_header import read_header
from typebar.isa.errors import TypebarError

WORDS = ["<unk>", "<s>", "</s>", *(chr(97 + i) for i in range(20)), "ab", "cd"]
SIZES = {int(kind): sizes for kind, sizes in gguf.constants.GGML_QUANT_SIZES.items()}
WIDTH, HEADS, KV = 32, 4, 2
SECONDS = 20.0
"""Of computation: other tests run beside."""


def llama() -> LlamaForCausalLM:
    """A small Llama with random weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": KV, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(WORDS), intermediate_size=64, max_position_embeddings=32, **shape)
    return LlamaForCausalLM(config).eval()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from halves to pairs, the order that llama.cpp's rotary positions want."""
    size = len(weight) // heads
    return weight.reshape(heads, 2, size // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """A GGUF file of the model, with a byte-pair vocabulary of its own."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{a}_proj": f"attn_{b}" for a, b in zip("qkvo", ("q", "k", "v", "output"), strict=True)},
        **{f"mlp.{a}_proj": f"ffn_{a}" for a in ("gate", "up", "down")},
    }
    names |= {f"model.layers.0.{a}": f"blk.0.{b}" for a, b in parts.items()}
    for name, tensor in model.named_parameters():
        array = tensor.detach().numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", KV)):
            array = interleaved(array, heads) if part in name else array
        writer.add_tensor(names[name.removesuffix(".weight")] + ".weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path, llama())
    return path


def test_a_gguf_file_is_a_model(small_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, brought = llama(), import_model(small_gguf)
    assert capfd.readouterr() == ("", "")  # no bar of transformers' own
    assert brought.name == "small"
    assert brought.config["chat_template"] == "{{ messages[0].content }}"
    assert {key: brought.config[key] for key in ("vocab", "context", "eos_token_id")} == {
        "vocab": len(WORDS),
        "context": 32,
        "eos_token_id": 2,
    }
    for name, tensor in model.named_parameters():
        assert np.array_equal(brought.lookup(name), tensor.detach().numpy()), name
    assert json.loads(brought.tokenizer_json or b"")["model"]["merges"] == [["a", "b"], ["c", "d"]]


def test_a_directory_may_hold_one_gguf_file(small_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(TypebarError, match=r"has no config.json"):
        import_model(tmp_path)
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(small_gguf.read_bytes())
    with pytest.raises(TypebarError, match="2 GGUF files"):
        import_model(tmp_path)


def at(data: bytes, mark: bytes, change: bytes, offset: int) -> bytes:
    """The data with `change` written `offset` bytes after the end of `mark`."""
    start = data.index(mark) + len(mark) + offset
    return data[:start] + change + data[start + len(change) :]


HUGE, LONG = struct.pack("<Q", 2**62), struct.pack("<I", 2**31 - 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: b"", "no whole GGUF file"),
        (lambda d: b"GGUG" + d[4:], "does not start with GGUF"),
        (lambda d: d[:4] + struct.pack("<I", 9) + d[8:], "its version is 9"),
        (lambda d: d[:8] + HUGE + d[16:], "more than it has bytes for"),
        (lambda d: d[:16] + HUGE + d[24:], "more than it has bytes for"),
        (lambda d: d[: d.index(b"blk.0.ffn_up.weight") + 30], "beyond its end"),
        (lambda d: d[:-100], "and its tensors after"),
        (lambda d: at(d, b"tokenizer.ggml.tokens", HUGE, 8), "more than it has bytes for"),
        (lambda d: at(d, b"tokenizer.ggml.tokens", LONG, 0), "unknown kind"),
        (lambda d: at(d, b"token_embd.weight", HUGE, 4), "and its tensors after|no multiple"),
        (lambda d: at(d, b"token_embd.weight", LONG, 0), "axes"),
        (lambda d: at(d, b"token_embd.weight", LONG, 20), "unknown type"),
        (lambda d: at(d, b"llama.block_count", LONG, 4), "2147483647 layers and"),
        (lambda d: at(d, b"llama.block_count", struct.pack("<I", 0), 4), "gives 0 layers"),
        (lambda d: at(d, b"llama.feed_forward_length", LONG, 4), "describes a model of"),
        (lambda d: at(d, b"llama.attention.head_count\x04\0\0\0", struct.pack("<I", 0), 0), "cannot read"),
        (lambda d: d.replace(b"blk.0.ffn_up", b"blk.0.ffn_xx"), "lacks 1 parameters"),
        (lambda d: d.replace(b"\0llama", b"\0lamas"), "cannot read"),
    ],
)
def test_damaged_gguf_files_give_one_line(
    small_gguf: Path, tmp_path: Path, spoil: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(spoil(small_gguf.read_bytes()))
    require_one_line(path, message)


def require_one_line(path: Path, message: str) -> None:
    """Importing ends in one line, soon."""
    begun = time.process_time()
    with pytest.raises(TypebarError, match=message) as caught:
        import_model(path)
    assert "\n" not in str(caught.value)
    assert time.process_time() - begun < SECONDS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("checkpoint")
    config = GPT2Config(n_embd=16, n_head=2, n_layer=1, n_positions=16, vocab_size=20, eos_token_id=3, bos_token_id=3)
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


def copied(checkpoint: Path, folder: Path, **changes: bytes) -> Path:
    """The checkpoint in another folder, with files changed."""
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(changes.get(name.split(".")[0], (checkpoint / name).read_bytes()))
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_layer", 2**40),
        ("n_layer", 0),
        ("n_layer", "many"),
        ("n_layer", None),
        ("n_head", 0),
        ("n_head", -3),
        ("n_embd", 2**40),
        ("n_embd", 0),
        ("n_positions", 2**50),
        ("n_positions", "sixteen"),
        ("vocab_size", 10**12),
        ("vocab_size", -1),
        ("activation_function", "no_such"),
        ("model_type", ["gpt2"]),
        ("eos_token_id", {"a": 1}),
    ],
)
def test_absurd_configurations_give_one_line(checkpoint: Path, tmp_path: Path, key: str, value: Any) -> None:
    config = {**json.loads((checkpoint / "config.json").read_text()), key: value}
    require_one_line(copied(checkpoint, tmp_path, config=json.dumps(config).encode()), "")


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"3", b"{" * 100_000, b"[" * 100_000, b"\xff\xfe\0", b'{"model_type": 5}']
)
def test_configurations_that_are_none_give_one_line(checkpoint: Path, tmp_path: Path, text: bytes) -> None:
    require_one_line(copied(checkpoint, tmp_path, config=text), "cannot read|holds a")


def header(**entries: Any) -> bytes:
    """A safetensors file with this header and 64 bytes of data."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{}" * 40,
        header(x={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 64]}),
        header(x={"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 64]}),
        header(x={"dtype": "F32", "shape": [16], "data_offsets": [0, 2**40]}),
        header(x={"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}),
        header(x={"dtype": "Q9", "shape": [16], "data_offsets": [0, 64]}),
        header(x={"dtype": "F32", "shape": [-1], "data_offsets": [0, 64]}),
    ],
)
def test_lying_safetensors_give_one_line(checkpoint: Path, tmp_path: Path, data: bytes) -> None:
    require_one_line(copied(checkpoint, tmp_path, model=data), "cannot read weights|layers and")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "..", ".", "a/b.safetensors", "", 7, None])
def test_an_index_names_no_file_outside_the_folder(checkpoint: Path, tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    copied(checkpoint, folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"transformer.wte.weight": name}}))
    require_one_line(folder, "lacks the weight file")


FUZZ = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=3)
CUT = st.one_of(st.none(), st.floats(0, 1))


def damaged(data: bytes, flips: list[tuple[float, int]], cut: float | None, reach: int) -> bytes:
    """The data with bits of its first `reach` bytes flipped, and cut short."""
    changed = bytearray(data)
    for place, bit in flips:
        changed[int(place * min(reach, len(data)))] ^= 1 << bit
    return bytes(changed if cut is None else changed[: int(cut * len(data))])


def require_success_or_one_line(path: Path) -> None:
    """Importing gives a model or ends in one line, soon."""
    begun = time.process_time()
    try:
        import_model(path)
    except TypebarError as error:
        assert "\n" not in str(error)
    assert time.process_time() - begun < SECONDS


@FUZZ
@given(flips=FLIPS, cut=CUT, file=st.sampled_from(["config", "model"]))
def test_fuzzed_checkpoints(
    checkpoint: Path, tmp_path: Path, flips: list[tuple[float, int]], cut: float | None, file: str
) -> None:
    name = {"config": "config.json", "model": "model.safetensors"}[file]
    data = damaged((checkpoint / name).read_bytes(), flips, cut, 1500)
    require_success_or_one_line(copied(checkpoint, tmp_path, **{file: data}))


@FUZZ
@given(flips=FLIPS, cut=CUT)
def test_fuzzed_gguf_files(small_gguf: Path, tmp_path: Path, flips: list[tuple[float, int]], cut: float | None) -> None:
    path = tmp_path / "fuzzed.gguf"
    path.write_bytes(damaged(small_gguf.read_bytes(), flips, cut, 2500))
    require_success_or_one_line(path)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(flips=FLIPS, cut=CUT)
def test_fuzzed_gguf_headers(
    small_gguf: Path, tmp_path: Path, flips: list[tuple[float, int]], cut: float | None
) -> None:
    path = tmp_path / "fuzzed.gguf"
    path.write_bytes(damaged(small_gguf.read_bytes(), flips, cut, 2500))
    try:
        read_header(path, SIZES)
    except TypebarError as error:
        assert "\n" not in str(error)
