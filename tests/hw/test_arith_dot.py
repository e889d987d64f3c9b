# amaranth: UnusedElaboratable=no
"""The aligned dot product against the golden chunk sum, bit for bit, for several lanes and latencies."""

from __future__ import annotations

import re

import numpy as np
import pytest
from amaranth.back import verilog
from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from numpy.typing import NDArray

from typebar.hw.arith.convert import OPERAND, WEIGHT
from typebar.hw.arith.dot import DotProduct, cuts
from typebar.hw.matrix.geometry import Geometry
from typebar.hw.replicate import Shared
from typebar.isa.errors import TypebarError
from typebar.isa.machine import Machine
from typebar.isa.numerics import Format, bits_of, chunk_sum, decode, encode, from_bits, is_nan, to_operand
from typebar.tests.hw.arith_bench import Bench, operand_bits, survivors, weight_bits

U32Array = NDArray[np.uint32]
F32Array = NDArray[np.float32]

LANES = Machine.load("tiny").matrix.lanes
ROWS = 100
"""Operand vectors of each side in a block: every one of one side meets every one of the other."""
KINDS = 8


def operands(rng: np.random.Generator, count: int, lanes: int, mirrored: bool) -> F32Array:
    """Operands [count, lanes]: every exponent, near ones, cancelling pairs, zeros, extremes, few NaN.

    Lanes come in pairs: of one side's vectors (`mirrored`) some have opposite pairs, of the other's some have equal
    ones, so that sums cancel, wholly or but for a last bit.
    """
    bits = rng.integers(0, 1 << 32, (count, lanes), dtype=np.uint32)
    low = np.choose(rng.integers(0, KINDS, (count, 1)), [77, 120, 126, 100, 77, 240, 77, 126])
    high = np.choose(rng.integers(0, KINDS, (count, 1)), [254, 130, 127, 140, 90, 254, 254, 127])
    low, high = np.minimum(low, high), np.maximum(low, high)
    exponent = rng.integers(low, high + 1, (count, lanes)).astype(np.uint32)
    bits = bits & 0x807FE000 | exponent << 23
    pair = np.repeat(bits[:, ::2], 2, axis=1)[:, :lanes]
    sign = np.where(np.arange(lanes) % 2 == 1, 0x80000000 if mirrored else 0, 0).astype(np.uint32)
    paired = rng.integers(0, 2, (count, 1)) == 1
    last = rng.integers(0, 8, (count, lanes)) == 0
    bits = np.where(paired, pair ^ sign ^ (last.astype(np.uint32) << 13), bits)
    bits = np.where(rng.integers(0, 6, (count, lanes)) == 0, 0, bits)
    bits[::17] = np.where(rng.integers(0, 2, (len(bits[::17]), lanes)) == 0, 0x7F7FE000, 0xFF7FE000)
    bits[3::31] = 0x3FFFE000
    bits[5::29] = 0
    nan = rng.integers(0, 40 * lanes, (count, lanes)) == 0
    values = from_bits(np.where(nan, 0x7FC00000, bits))
    assert np.array_equal(bits_of(to_operand(values)[0]), bits_of(values))
    return values


def packed(fields: U32Array, width: int, rng: np.random.Generator) -> U32Array:
    """Operands or weights [n, lanes] as a port's words [n, words], `width` bits a lane; of zeros two bits count."""
    noise = rng.integers(0, 1 << width - 2, fields.shape, dtype=np.uint32)
    fields = np.where(fields >> width - 2 & 1, fields, noise)
    bits = (fields[:, :, None] >> np.arange(width, dtype=np.uint32)) & 1
    flat = bits.reshape(len(fields), -1).astype(np.uint8)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    return np.packbits(flat, axis=1, bitorder="little").view(np.uint32)


def block(rng: np.random.Generator, lanes: int) -> tuple[dict[str, U32Array], U32Array]:
    """Inputs of ROWS x ROWS chunks, and the bits of their sums."""
    w, x = operands(rng, ROWS, lanes, mirrored=True), operands(rng, ROWS, lanes, mirrored=False)
    fmt = (Format.FP32, Format.FP16, Format.INT8)[rng.integers(3)]
    if fmt is not Format.FP32:
        # Most of fp16's weights are normal otherwise; of int8 most would be too large.
        w = decode(encode(np.ldexp(w, rng.integers(-20, 0, (ROWS, 1))) if fmt is Format.FP16 else w, fmt)[0], fmt)
    expected = bits_of(chunk_sum(np.ascontiguousarray(w.T), x, fmt)).reshape(-1)
    nan = np.logical_or.outer(is_nan(x).any(axis=1), is_nan(w).any(axis=1)).reshape(-1)
    w_words, x_words = packed(weight_bits(w, fmt), WEIGHT.size, rng), packed(operand_bits(x), OPERAND.size, rng)
    inputs = {"w": np.tile(w_words, (ROWS, 1)), "x": np.repeat(x_words, ROWS, axis=0)}
    return inputs | {"nan": nan.astype(np.uint32)}, expected


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    units = {f"dot{latency}": DotProduct(LANES, latency) for latency in (1, 6, 17)}
    units["broken"] = DotProduct(LANES, cuts(LANES))
    return Bench(units, tmp_path_factory.mktemp("dot"), ("broken",))


@pytest.mark.parametrize("blocks", [20, pytest.param(100, marks=pytest.mark.long)])
def test_tiny(bench: Bench, blocks: int) -> None:
    """200 thousand chunks of the smallest machine, a million in the long run."""
    rng = np.random.default_rng(blocks)
    finite = 0
    for _ in range(blocks):
        inputs, expected = block(rng, LANES)
        for name, outputs in bench.run(**inputs).items():
            assert np.array_equal(outputs["sum"], expected), name
        finite += int(((expected & 0x7FFFFFFF > 0) & (expected & 0x7F800000 < 0x7F800000)).sum())
    assert finite > blocks * ROWS * ROWS // 2


def test_planted_errors_are_caught(bench: Bench) -> None:
    """Inverting any one register bit shows."""
    inputs, _ = block(np.random.default_rng(3), LANES)
    inputs = {name: values[::3] for name, values in inputs.items()}
    assert len(bench.sites["broken"]) > 1000
    assert survivors(bench, "broken", **inputs) == []


@pytest.mark.parametrize("blocks", [2, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize("lanes", [3, pytest.param(64, marks=pytest.mark.long)])
def test_other_lanes(lanes: int, blocks: int, tmp_path: pytest.TempPathFactory) -> None:
    latency = Geometry.of(Machine.load("u280")).dot
    bench = Bench({"dot": DotProduct(lanes, latency)}, tmp_path)
    rng = np.random.default_rng(lanes)
    for _ in range(blocks):
        inputs, expected = block(rng, lanes)
        assert np.array_equal(bench.run(**inputs)["dot"]["sum"], expected)


def test_one_lane_is_refused() -> None:
    with pytest.raises(TypebarError, match="at least 2 lanes"):
        DotProduct(1, 6)


class Row(wiring.Component):
    """Several copies of a shared dot unit, with one side in common."""

    def __init__(self, shared: Shared, copies: int) -> None:
        self.shared, self.copies = shared, copies
        ports = shared.component.signature.members
        width, vector = (len(Signal(ports[name].shape).as_value()) for name in ("w", "x"))
        super().__init__({"w": In(width * copies), "x": In(vector), "nan": In(1), "sums": Out(32 * copies)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for i in range(self.copies):
            m.submodules[f"dot{i}"] = unit = self.shared.replica()
            width = len(self.w) // self.copies
            m.d.comb += [unit.w.eq(self.w[i * width : (i + 1) * width]), unit.x.eq(self.x), unit.nan.eq(self.nan)]
            m.d.comb += self.sums[32 * i : 32 * (i + 1)].eq(unit.sum)
        return m


def test_one_module_serves_many_copies() -> None:
    shared = Shared("shared_dot", DotProduct(LANES, 6))
    text = verilog.convert(Row(shared, 5), name="row", emit_src=False)
    assert len(re.findall(r"^  shared_dot ", text, re.MULTILINE)) == 5
    assert "module shared_dot" not in text
    assert len(re.findall(r"^module shared_dot\(", shared.verilog, re.MULTILINE)) == 1
    assert len(text) < 10_000 < len(shared.verilog)
