"""Line 7 over random shapes and machines: bytes to the byte, time never below physics, causes that sum to the total.

The expected bytes are worked out here from the shape, not from the compiler's layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from typebar.compiler.driver import Compiled, build
from typebar.compiler.frontend import DerivedSource, FrontendModel, ShapeSource
from typebar.compiler.pipeline import parse
from typebar.isa.instructions import Format
from typebar.isa.machine import Machine
from typebar.sim.timing import run_timing

E = 2
"""Bytes of an fp16 or bf16 element."""


@dataclass(frozen=True)
class Shape:
    heads: int
    head_dim: int
    layers: int
    inner: int
    vocab: int
    context: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


def step_text(s: Shape) -> str:
    """A GPT-2 step of a shape, with separate q, k and v weights."""
    d, v, f = (f"tensor<{size}xf32>" for size in (s.width, s.vocab, s.inner))

    def linear(out: str, x: str, name: str, source: str, target: str) -> str:
        weights = f'weight = @"h.{{}}.{name}.w", bias = @"h.{{}}.{name}.b", layout = "in_out"'
        return f"{out} = tb.linear({x}) {{{weights}}} : ({source}) -> {target}"

    heads = f"heads = {s.heads}, kv_heads = {s.heads}, head_dim = {s.head_dim}, scale = 0.25 : f32"
    lines = [
        "builtin.module {",
        f"tb.step attributes {{vocab = {s.vocab}, context = {s.context}}} {{",
        "^bb0(%token: index, %position: index):",
        f"%e = tb.embedding(%token) {{weight = @wte, offset = 0}} : (index) -> {d}",
        f"%r = tb.repeat(%e) attributes {{count = {s.layers}, start = 0}} {{",
        f"^bb1(%x: {d}):",
        f'%a = tb.layer_norm(%x) {{weight = @"h.{{}}.n", bias = @"h.{{}}.nb", eps = 1.0e-5 : f32}} : ({d}) -> {d}',
        *(linear(f"%{part}", "%a", part, d, d) for part in "qkv"),
        f'%t = tb.attention(%q, %k, %v) {{{heads}, mask = "causal"}} : ({d}, {d}, {d}) -> {d}',
        linear("%p", "%t", "p", d, d),
        f"%y = tb.add(%p, %x) : ({d}, {d}) -> {d}",
        linear("%f", "%y", "f", d, f),
        f'%g = tb.activation(%f) {{kind = "gelu_tanh"}} : ({f}) -> {f}',
        linear("%o", "%g", "o", f, d),
        f"%z = tb.add(%y, %o) : ({d}, {d}) -> {d}",
        f"tb.yield(%z) : {d}",
        f"}} : ({d}) -> {d}",
        f'%l = tb.linear(%r) {{weight = @wte, layout = "out_in"}} : ({d}) -> {v}',
        f"tb.return(%l) : {v}",
        "}",
        "}",
    ]
    return "\n".join(lines)


def source_shapes(s: Shape) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"wte": (s.vocab, s.width)}
    matrices = {part: (s.width, s.width) for part in "qkvp"} | {"f": (s.width, s.inner), "o": (s.inner, s.width)}
    for i in range(s.layers):
        shapes |= {f"h.{i}.n": (s.width,), f"h.{i}.nb": (s.width,)}
        for name, (rows, columns) in matrices.items():
            shapes |= {f"h.{i}.{name}.w": (rows, columns), f"h.{i}.{name}.b": (columns,)}
    return shapes


def compiled(s: Shape, machine: Machine, devices: int) -> Compiled:
    config: Mapping[str, Any] = {"context": s.context, "vocab": s.vocab, "eos_token_id": None}
    model = FrontendModel(
        parse(step_text(s)), DerivedSource(ShapeSource(source_shapes(s))), None, dict(config), "random"
    )
    return build(model, machine, devices, Format.FP16)


def ceil(value: int, step: int) -> int:
    return -(-value // step) * step


def expected_bytes(s: Shape, m: Machine, devices: int, passes: int, heads_run: int) -> tuple[int, int]:
    """Bytes that one device fetches of weights and of K and V."""
    lanes, row = m.matrix.lanes, m.row_bytes
    granule = max(1, row // (lanes * E))
    align, block = m.vector.align, m.matrix.columns * m.matrix.interleave
    pad = ceil(s.head_dim, align)
    local_heads = ceil(s.heads, devices) // devices
    attended = s.heads * pad if pad != s.head_dim else s.width

    def share(columns: int) -> int:
        return ceil(ceil(columns, align) // align, devices) // devices * align

    def packed(k: int, columns: int) -> int:
        return ceil(k, lanes) * ceil(columns, granule) * E

    layer = packed(s.width, 3 * local_heads * pad) + packed(attended, share(s.width))
    layer += packed(s.width, share(s.inner)) + packed(s.inner, share(s.width))
    weights = passes * s.layers * layer + heads_run * packed(s.width, share(s.vocab))
    caches = 0
    for length in range(1, passes + 1):
        chunks = ceil(s.head_dim, lanes) // lanes
        for first in range(0, length, m.attention_block):
            part = min(m.attention_block, length - first)
            caches += sum(chunks * ceil(min(block, part - b) * lanes * E, row) for b in range(0, part, block))
            caches += ceil(part, lanes) // lanes * ceil(s.head_dim * lanes * E, row)
    return weights, caches * s.layers * local_heads


shapes = st.builds(
    Shape,
    heads=st.integers(1, 6),
    head_dim=st.integers(1, 32),
    layers=st.integers(1, 3),
    inner=st.integers(1, 300),
    vocab=st.integers(2, 700),
    context=st.integers(4, 150),
)
machines = st.fixed_dictionaries(
    {
        "matrix.lanes": st.sampled_from([8, 16, 32]),
        "matrix.columns": st.sampled_from([4, 8]),
        "matrix.rows": st.sampled_from([1, 2]),
        "matrix.interleave": st.sampled_from([8, 16]),
        "matrix.fifo_port_bytes": st.sampled_from([512, 1024]),
        "vector.align": st.sampled_from([4, 8, 16]),
        "vector.lanes": st.sampled_from([2, 4]),
        "matrix.vectors": st.sampled_from([1, 4]),
        "hbm.channels": st.sampled_from([2, 4]),
        "hbm.latency": st.sampled_from([5, 60]),
        "hbm.rows_per_write_slot": st.sampled_from([1, 7]),
        "hbm.fifo_bytes": st.sampled_from([4096, 65536]),
        "control.queue_depth": st.sampled_from([1, 8]),
        "control.run_ahead": st.sampled_from([True, False]),
        "attention_block": st.sampled_from([128, 256]),
    }
).filter(lambda changes: changes["matrix.lanes"] % changes["vector.align"] == 0)


def look(s: Shape, changes: Mapping[str, object], devices: int, data: st.DataObject) -> None:
    """Bytes, time and causes of a program, in closed form or bounded."""
    machine = Machine.load("tiny").override({key: str(value).lower() for key, value in changes.items()})
    made = compiled(s, machine, devices)
    prompt = 1  # longer ones go through in blocks, which read weights less often: test_prompt_blocks
    new = data.draw(st.integers(1, s.context - prompt))
    io = np.zeros((devices, made.memory.io.bytes // 4), np.int32)
    io[:, :4] = [0, prompt, new, -1]
    result = run_timing(made.program, machine, devices, io)
    passes = prompt + new - 1
    weights, caches = expected_bytes(s, machine, devices, passes, new)
    parameters = s.layers * (4 * s.width**2 + 2 * s.width * s.inner) + s.width * s.vocab
    assert made.memory.accounting["weight_bytes"] == parameters * E
    assert made.memory.accounting["kv_bytes_per_position"] == s.layers * 2 * s.width * E
    peak = machine.matrix.lanes * machine.matrix.columns * machine.matrix.rows
    for device, counters in enumerate(result.counters):
        assert counters.weights_fetched_bytes == weights
        assert counters.kv_fetched_bytes == caches
        local_heads = ceil(s.heads, devices) // devices
        lanes, row = machine.matrix.lanes, machine.row_bytes
        stored = passes * s.layers * local_heads
        assert counters.kv_useful_written_bytes == stored * 2 * s.head_dim * E
        k_rows = ceil(s.head_dim, lanes) // lanes
        v_rows = min(s.head_dim, ceil(s.head_dim * lanes * E, row) // row)
        assert counters.kv_written_bytes == stored * (k_rows + v_rows) * row
        assert result.total_cycles * machine.ddr.bytes_per_cycle >= counters.ddr_bytes
        moved = weights + caches + counters.kv_written_bytes
        assert result.total_cycles * machine.row_bytes >= moved
        assert result.total_cycles * peak >= counters.macs
        for unit, causes in result.causes[device].items():
            assert sum(causes.values()) == result.total_cycles, unit
    total_weights = sum(counters.weights_fetched_bytes for counters in result.counters)
    model_bytes = (parameters * passes - s.width * s.vocab * (prompt - 1)) * E
    assert total_weights >= model_bytes, "padding is never negative"


ANY = given(shapes, machines, st.integers(1, 4), st.data())
FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(FEW, max_examples=200)


@FEW
@ANY
def test_bytes_time_and_causes(s: Shape, changes: Mapping[str, object], devices: int, data: st.DataObject) -> None:
    look(s, changes, devices, data)


@pytest.mark.long
@MANY
@ANY
def test_bytes_time_and_causes_of_many(
    s: Shape, changes: Mapping[str, object], devices: int, data: st.DataObject
) -> None:
    look(s, changes, devices, data)
