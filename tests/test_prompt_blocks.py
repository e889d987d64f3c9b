"""Prompts in blocks of tokens: the bits of one token at a time, weights read once for each group of tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from families import FAMILIES, VOCAB, Family, random_model
from numpy.typing import NDArray

from typebar.compiler import device_ir, driver
from typebar.compiler.emit.head import DESCRIPTOR_WORDS
from typebar.compiler.frontend import load_model
from typebar.compiler.memory import program_of
from typebar.compiler.passes.allocate import AllocatePass
from typebar.compiler.rows import Layout, needed, tokens_of
from typebar.compiler.schedule import Turns, schedule
from typebar.host.driver import DeviceEngine
from typebar.host.simulator import SimulatedDevice
from typebar.isa.image import Image
from typebar.isa.instructions import Format
from typebar.isa.machine import Machine
from typebar.sim.timing import run_timing

TINY = Machine.load("tiny")
SHORT_BLOCKS = TINY.override({"matrix.interleave": "4", "attention_block": "16"})
"""Attention over several blocks of positions, most of them cut by a block of tokens."""
CONTEXT, MODULE_CONTEXT = 56, 48
SOURCE = {"source_context": 16, "decoder_start_token_id": 0}
FEW = [FAMILIES[i] for i in (0, 5, 8)]


def compiled(family: Family, machine: Machine, devices: int) -> driver.Compiled:
    config = {"context": context_of(family)} | (SOURCE if family.encoder else {})
    return driver.build(load_model(random_model(family), config), machine, devices, Format.FP16)


def context_of(family: Family) -> int:
    """Positions that a family's model takes."""
    return MODULE_CONTEXT if family.name.endswith("module") else CONTEXT


class Texts:
    """An image on the functional simulator, fed in any pieces."""

    def __init__(self, family: Family, machine: Machine, devices: int, path: Path) -> None:
        made = compiled(family, machine, devices)
        driver.write(made, path)
        self.rows, self.groups = (made.memory.accounting[name] for name in ("prompt_rows", "prompt_groups"))
        self.engine = DeviceEngine(Image.open(path), SimulatedDevice(machine, devices), "sim")
        rng = np.random.default_rng(5)
        self.context = context_of(family)
        self.tokens = rng.integers(3, VOCAB, self.context).tolist()
        self.source = rng.integers(3, VOCAB, 11).tolist() if family.encoder else None

    def logits(self, *pieces: int) -> list[NDArray[np.float32]]:
        """The logits after each piece of the text, given in one call."""
        self.engine.reset()
        if self.source is not None:
            self.engine.encode(self.source)
        ends = np.cumsum(pieces).tolist()
        return [self.engine.logits(self.tokens[end - size : end]) for size, end in zip(pieces, ends, strict=True)]


CASES = [(family, SHORT_BLOCKS) for family in FAMILIES] + [(family, TINY) for family in FEW]


@pytest.mark.parametrize(("family", "machine"), CASES, ids=lambda item: item.name)
def test_blocks_give_the_bits_of_single_tokens(family: Family, machine: Machine, tmp_path: Path) -> None:
    found = []
    for devices in (1, 3):
        texts = Texts(family, machine, devices, tmp_path / f"{devices}.safetensors")
        block = texts.rows * texts.groups
        assert 2 <= texts.rows <= machine.matrix.vectors and 3 * block + 1 <= CONTEXT
        single = texts.logits(*[1] * texts.context)
        lengths = {1, 2, texts.rows, texts.rows + 1, block - 1, block, block + 1, 2 * block + texts.rows, 3 * block + 1}
        for length in sorted(lengths & set(range(1, texts.context))):
            rest = min(7, texts.context - length)
            first, second = texts.logits(length, rest)
            assert np.array_equal(first, single[length - 1]), (devices, length)
            assert np.array_equal(second, single[length + rest - 1]), (devices, length, rest)
        found.append(single)
    assert np.array_equal(found[0], found[1])


def test_every_length_gives_the_bits_of_single_tokens(tmp_path: Path) -> None:
    texts = Texts(FAMILIES[8], SHORT_BLOCKS, 3, tmp_path / "image.safetensors")
    single = texts.logits(*[1] * CONTEXT)
    for length in range(1, 3 * texts.rows * texts.groups + 2):
        assert np.array_equal(texts.logits(length)[0], single[length - 1]), length


@pytest.mark.parametrize("devices", [1, 3])
def test_weights_are_read_once_for_each_group(devices: int) -> None:
    """What the tail reads, here the logits' matrix alone, is read once."""
    made = compiled(FAMILIES[0], TINY, devices)
    accounts = made.memory.accounting
    rows = accounts["prompt_rows"]
    assert accounts["tail_bytes"] == accounts["head_bytes"]

    def fetched(count: int) -> int:
        io = np.zeros((devices, made.memory.io.bytes // 4), np.int32)
        for name, value in {"count": count, "new": 1, "eos": -1}.items():
            io[:, DESCRIPTOR_WORDS[name]] = value
        result = run_timing(made.program, TINY, devices, io, entry=made.program.labels["main"])
        return sum(item.weights_useful_bytes for item in result.counters)

    one, two = fetched(1), fetched(2)
    assert one == two == fetched(rows)
    layers = fetched(rows + 1) - one
    assert 0 < layers < one
    for count in range(1, 3 * rows * accounts["prompt_groups"] + 1):
        assert fetched(count) == one + (-(-count // rows) - 1) * layers, count


@pytest.mark.parametrize("devices", [1, 3])
def test_groups_go_through_a_layer_apart_and_in_order(devices: int) -> None:
    """Each does each operation once a turn; the second sees the first one's K and V, and finishes after the loop."""
    model = load_model(random_model(FAMILIES[0]), {"context": CONTEXT})
    module, machine = model.module.clone(), TINY
    for step in driver.back_passes(machine, devices, shape=model.weights.shape):
        step.apply(device_ir.context(), module)
    program = program_of(module)
    tokens = tokens_of(program)
    assert tokens is not None and tokens.groups == 2 and program.rows_step is not None
    limits = AllocatePass.of(machine).limits(program, int(program.rows_step.value.data))
    turns = [item for item in schedule(needed(program), Layout.of(program, limits, tokens)) if isinstance(item, Turns)]
    assert len(turns) == 1
    (turn,) = turns
    body = [op for op in turn.loop.body.block.ops if op.results]
    places = {(part.op, part.group): number for number, part in enumerate(turn.turn)}
    assert len(places) == len(turn.turn) and {op for op, _ in places} == set(body)
    late = {part.op for part in turn.turn if part.late}
    assert late and [part.op for part in turn.rest] == [part.op for part in turn.turn if part.late]
    for op in body:
        if (op, 1) not in places:
            continue
        assert op in late or places[op, 1] > places[op, 0]
        makers = [value.owner for value in op.operands if (value.owner, 1) in places]
        for maker in makers:
            assert (places[maker, 1] < places[op, 1]) == ((maker in late) == (op in late))
            assert places[maker, 0] < places[op, 0]


def test_machines_without_rows_or_room_go_token_by_token() -> None:
    family = FAMILIES[0]
    blocks = compiled(family, TINY, 2)
    plain = compiled(family, TINY.override({"matrix.vectors": "1"}), 2)
    assert "prompt" in blocks.program.labels and "prompt" not in plain.program.labels
    assert plain.memory.accounting["prompt_rows"] == plain.memory.accounting["prompt_groups"] == 1
    room = {"control.program_bytes": str(64 * (len(blocks.program) - 1))}
    small = compiled(family, TINY.override(room), 2)
    assert small.program.ops == plain.program.ops and small.memory.accounting["prompt_rows"] == 1


def test_comments_name_the_rows() -> None:
    made = compiled(FAMILIES[8], TINY, 1)
    comments = list(made.program.comments.values())
    assert any(text.startswith("rows of matrix model.layers.{}.self_attn.q_proj") for text in comments)
    assert any(text.startswith("matrix model.layers.{}.self_attn.q_proj") for text in comments)
