"""The interpreter of steps: each operation against its formula written out, in float64 and other types."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch

from typebar.compiler.interpreter import StepInterpreter
from typebar.isa.errors import TypebarError

D, HEADS, KV, SIZE, CONTEXT = 24, 4, 2, 6, 9
TOKENS = [3, 17, 0, 9, 22, 5, 11, 23, 1]
VEC, HALF = f"tensor<{D}xf32>", f"tensor<{KV * SIZE}xf32>"
Tensors = Mapping[str, torch.Tensor]


def tensors(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random tensors, and `wte` besides."""
    made = torch.Generator().manual_seed(len(shapes))
    return {n: torch.randn(s, generator=made, dtype=torch.float64) for n, s in {"wte": (D, D), **shapes}.items()}


def step_text(body: str, encoder: str | None = None) -> str:
    """A module whose step embeds its token as %x, runs `body` and returns %y; an encoder likewise."""
    table = f"%x = tb.embedding(%t) {{weight = @wte, offset = 0}} : (index) -> {VEC}"
    parts = []
    if encoder is not None:
        parts.append(
            f"tb.encoder attributes {{vocab = {D}, context = {CONTEXT}}} {{\n^bb0(%t: index, %p: index):\n"
            f"{table}\n{encoder}\ntb.return(%y) : {VEC}\n}}"
        )
    memory = f", %m: {VEC}" if encoder is not None else ""
    parts.append(
        f"tb.step attributes {{vocab = {D}, context = {CONTEXT}}} {{\n^bb0(%t: index, %p: index{memory}):\n"
        f"{table}\n{body}\ntb.return(%y) : {VEC}\n}}"
    )
    return "builtin.module {\n" + "\n".join(parts) + "\n}"


def run(body: str, weights: Tensors, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The rows that the step gives for TOKENS."""
    runner = StepInterpreter(step_text(body), weights.__getitem__, dtype)
    return torch.stack([runner.step(t, p) for p, t in enumerate(TOKENS)])


def embedded(weights: Tensors) -> torch.Tensor:
    """What %x is for TOKENS."""
    return weights["wte"][TOKENS]


def require_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    """Equal within rounding."""
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("start", "run_", "stride"), [(0, 3, 7), (2, 2, 6), (5, 1, 4), (1, 4, 4)])
def test_a_slice_gathers_runs(start: int, run_: int, stride: int) -> None:
    weights, size = tensors(w=(D, 4 * run_)), 4 * run_
    body = (
        f"%s = tb.slice(%x) {{start = {start}, size = {size}, run = {run_}, stride = {stride}}} : "
        f"({VEC}) -> tensor<{size}xf32>\n"
        f'%y = tb.linear(%s) {{weight = @w, layout = "out_in"}} : (tensor<{size}xf32>) -> {VEC}'
    )
    chosen = [start + i // run_ * stride + i % run_ for i in range(size)]
    require_close(run(body, weights), embedded(weights)[:, chosen] @ weights["w"].T)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("turned", [2, 4, 6])
def test_rotary_turns_pairs(pairing: str, turned: int) -> None:
    angles = torch.rand(CONTEXT, turned // 2, dtype=torch.float64) * 6
    weights = {**tensors(), "c": angles.cos(), "s": angles.sin()}
    body = (
        f"%y = tb.rotary(%x, %p) {{heads = {HEADS}, head_dim = {SIZE}, rotary_dim = {turned}, "
        f'pairing = "{pairing}", cos = @c, sin = @s}} : ({VEC}, index) -> {VEC}'
    )
    expected = embedded(weights).clone().view(-1, HEADS, SIZE)
    for place, row in enumerate(expected):
        for i in range(turned // 2):
            first, second = (i, i + turned // 2) if pairing == "half" else (2 * i, 2 * i + 1)
            turn = torch.view_as_complex(row[:, [first, second]].contiguous()) * torch.polar(
                torch.ones((), dtype=torch.float64), angles[place, i]
            )
            row[:, first], row[:, second] = turn.real, turn.imag
    require_close(run(body, weights), expected.reshape(-1, D))


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_norms_without_a_weight(op: str) -> None:
    weights = tensors()
    x = embedded(weights)
    eps = float(torch.tensor(1e-5))
    centred = x - x.mean(-1, keepdim=True) if op == "layer_norm" else x
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    require_close(run(f"%y = tb.{op}(%x) {{eps = 1.0e-05 : f32}} : ({VEC}) -> {VEC}", weights), expected, 1e-9)


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_a_linear_of_bytes_has_a_scale_for_each_column(layout: str) -> None:
    stored = torch.randint(-128, 128, (D, D), dtype=torch.int8)
    weights = {**tensors(s=(D,), b=(D,)), "w": stored}
    body = f'%y = tb.linear(%x) {{weight = @w, bias = @b, scale = @s, layout = "{layout}"}} : ({VEC}) -> {VEC}'
    matrix = stored.double() if layout == "in_out" else stored.double().T
    require_close(run(body, weights), embedded(weights) @ matrix * weights["s"] + weights["b"])


def test_a_parameter_is_a_vector() -> None:
    weights = tensors(p=(D,))
    body = f"%v = tb.parameter {{source = @p}} : {VEC}\n%y = tb.mul(%x, %v) : ({VEC}, {VEC}) -> {VEC}"
    require_close(run(body, weights), embedded(weights) * weights["p"])


PROJECTIONS = "\n".join(
    f'%{n} = tb.linear(%x) {{weight = @{n}, layout = "in_out"}} : ({VEC}) -> {HALF if n in "kv" else VEC}'
    for n in "qkv"
)
SHAPES = {"q": (D, D), "k": (D, KV * SIZE), "v": (D, KV * SIZE)}
TYPES = f"({VEC}, {HALF}, {HALF}) -> {VEC}"
COUNTS = f"heads = {HEADS}, kv_heads = {KV}, head_dim = {SIZE}, scale = 0.5 : f32"


def attention(
    weights: Tensors,
    queries: torch.Tensor,
    keys: torch.Tensor,
    bias: Callable[[int, int, int], float],
) -> torch.Tensor:
    """Softmax attention, one score at a time; a bias of minus infinity masks."""
    q = (queries @ weights["q"]).view(-1, HEADS, SIZE)
    k, v = ((keys @ weights[n]).view(-1, KV, SIZE) for n in "kv")
    out = torch.zeros_like(q)
    for i in range(len(q)):
        for h in range(HEADS):
            group = h // (HEADS // KV)
            scores = [0.5 * float(q[i, h] @ k[j, group]) + bias(h, i, j) for j in range(len(k))]
            parts = [math.exp(s - max(scores)) for s in scores]
            out[i, h] = sum((p / sum(parts) * v[j, group] for j, p in enumerate(parts)), torch.zeros(SIZE))
    return out.view(-1, D)


def bias_of(kind: str | None, table: torch.Tensor, middle: int) -> Callable[[int, int, int], float]:
    """The bias of head h for positions i and j; `middle` is the index of distance zero."""

    def one(h: int, i: int, j: int) -> float:
        plane = table[h % len(table)]
        match kind:
            case "relative":
                value = plane[i - j if middle == 0 else j - i + middle]
            case "column":
                value = plane[j]
            case "table":
                value = plane[i, j]
            case _:
                return 0.0
        return -math.inf if value <= -1e9 else float(value)

    return one


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("planes", [1, HEADS])
@pytest.mark.parametrize("kind", [None, "relative", "column", "table"])
def test_attention_of_a_step(kind: str | None, planes: int, window: int | None) -> None:
    extents = {"relative": (CONTEXT,), "column": (CONTEXT,), "table": (CONTEXT, CONTEXT), None: ()}[kind]
    weights = tensors(**SHAPES, b=(planes, *extents))
    if kind == "table":
        weights["b"][:, 5, 1:4] = -1e30
    mask = 'mask = "causal"' if window is None else f'mask = "window", window = {window}'
    bias = "" if kind is None else f', bias = @b, bias_kind = "{kind}"'
    body = f"{PROJECTIONS}\n%y = tb.attention(%q, %k, %v) {{{COUNTS}, {mask}{bias}}} : {TYPES}"
    value = bias_of(kind, weights["b"], 0)

    def masked(h: int, i: int, j: int) -> float:
        return value(h, i, j) if i - (window or CONTEXT) < j <= i else -math.inf

    x = embedded(weights)
    require_close(run(body, weights), attention(weights, x, x, masked))


def test_masked_entries_weigh_nothing_in_every_type() -> None:
    weights = tensors(**SHAPES, b=(1, CONTEXT))
    weights["b"][0, 2:] = torch.finfo(torch.float32).min
    body = (
        f"{PROJECTIONS}\n"
        f'%y = tb.attention(%q, %k, %v) {{{COUNTS}, mask = "causal", bias = @b, bias_kind = "relative"}} : {TYPES}'
    )
    changed = {**weights, "wte": weights["wte"].clone()}
    changed["wte"][TOKENS[2]] += 100
    for dtype in (torch.float64, torch.float32, torch.float16):
        first, second = run(body, weights, dtype), run(body, changed, dtype)
        assert torch.isfinite(first).all()
        assert torch.equal(first[5:], second[5:])
        assert not torch.equal(first[3], second[3])


@pytest.mark.parametrize("mask", ["none", "causal", "window"])
@pytest.mark.parametrize("kind", [None, "relative", "column", "table"])
def test_attention_of_an_encoder_and_the_memory(kind: str | None, mask: str) -> None:
    extents = {"relative": (2 * CONTEXT - 1,), "column": (CONTEXT,), "table": (CONTEXT, CONTEXT), None: ()}[kind]
    weights = tensors(**SHAPES, b=(HEADS, *extents))
    bias = "" if kind is None else f', bias = @b, bias_kind = "{kind}"'
    window = ", window = 3" if mask == "window" else ""
    encoder = f'{PROJECTIONS}\n%y = tb.attention(%q, %k, %v) {{{COUNTS}, mask = "{mask}"{window}{bias}}} : {TYPES}'
    runner = StepInterpreter(step_text(ENCODER, encoder), weights.__getitem__, torch.float64)
    value = bias_of(kind, weights["b"], CONTEXT - 1)

    def masked(h: int, i: int, j: int) -> float:
        seen = {"none": True, "causal": j <= i, "window": i - 3 < j <= i}[mask]
        return value(h, i, j) if seen else -math.inf

    for count in (1, 2, 5, CONTEXT):
        x = weights["wte"][TOKENS[:count]]
        require_close(runner.encode(TOKENS[:count]), attention(weights, x, x, masked))


CROSS = "\n".join(
    (
        f'%q = tb.linear(%x) {{weight = @q, layout = "in_out"}} : ({VEC}) -> {VEC}',
        f'%k = tb.linear(%m) {{weight = @k, layout = "in_out"}} : ({VEC}) -> {HALF}',
        f'%v = tb.linear(%m) {{weight = @v, layout = "in_out"}} : ({VEC}) -> {HALF}',
        f"%y = tb.cross_attention(%q, %k, %v) {{{COUNTS}}} : {TYPES}",
    )
)
ENCODER = f"%y = tb.scale(%x) {{value = 2.0 : f32}} : ({VEC}) -> {VEC}"


def test_cross_attention_sees_the_whole_source() -> None:
    weights = tensors(**SHAPES)
    runner = StepInterpreter(step_text(CROSS, ENCODER), weights.__getitem__, torch.float64)
    with pytest.raises(TypebarError, match="call encode"):
        runner.step(0, 0)
    for source in ([4], [8, 8, 2, 19], TOKENS):
        memory = runner.encode(source)
        require_close(memory, 2 * weights["wte"][source])
        found = torch.stack([runner.step(t, p) for p, t in enumerate(TOKENS)])
        require_close(found, attention(weights, embedded(weights), memory, lambda h, i, j: 0.0))
    for wrong, message in (([], "1 to 9"), ([0] * (CONTEXT + 1), "1 to 9"), ([D], "outside the vocabulary")):
        with pytest.raises(TypebarError, match=message):
            runner.encode(wrong)


def test_what_depends_on_the_memory_alone_runs_once_a_source() -> None:
    weights = tensors(**SHAPES)
    seen: list[str] = []
    runner = StepInterpreter(
        step_text(CROSS, ENCODER), weights.__getitem__, torch.float64, probe=lambda name, value: seen.append(name)
    )
    runner.encode([1, 2])
    assert seen == ["encoder memory"]
    runner.step(0, 0)
    assert seen == ["encoder memory", "logits"]
    source = [len(program) for program in runner._step._programs.values()]
    assert source == [0, 2, 4]  # k and v; embedding, q, attention and the probe


def test_keys_of_the_token_are_no_source() -> None:
    weights = tensors(**SHAPES)
    body = CROSS.replace("tb.linear(%m)", "tb.linear(%x)")
    with pytest.raises(TypebarError, match="memory alone"):
        StepInterpreter(step_text(body, ENCODER), weights.__getitem__)


def test_a_step_without_an_encoder_has_nothing_to_encode() -> None:
    runner = StepInterpreter(step_text(ENCODER), tensors().__getitem__)
    assert not runner.has_encoder
    with pytest.raises(TypebarError, match="no encoder"):
        runner.encode([1])


LOOP = f"""
%y = tb.repeat(%x) attributes {{count = 2, start = 1}} {{
^bb1(%c: {VEC}):
  %a = tb.linear(%c) {{weight = @"h.{{2:3}}.w", layout = "in_out"}} : ({VEC}) -> {VEC}
  %b = tb.linear(%a) {{weight = @"h.{{}}.u", layout = "in_out"}} : ({VEC}) -> {VEC}
  tb.yield(%b) : {VEC}
}} : ({VEC}) -> {VEC}
"""


def test_templates_number_layers_and_the_probe_names_them() -> None:
    weights = tensors(**{name: (D, D) for name in ("h.3.w", "h.1.u", "h.5.w", "h.2.u")})
    seen: dict[str, torch.Tensor] = {}
    runner = StepInterpreter(step_text(LOOP), weights.__getitem__, torch.float64, probe=seen.__setitem__)
    logits = runner.step(7, 0)
    first = weights["wte"][7] @ weights["h.3.w"] @ weights["h.1.u"]
    assert list(seen) == ["embedding", "layer 1", "layer 2", "logits"]
    require_close(seen["embedding"], weights["wte"][7])
    require_close(seen["layer 1"], first)
    require_close(logits, first @ weights["h.5.w"] @ weights["h.2.u"])
    assert seen["logits"] is logits


@pytest.mark.parametrize(
    ("change", "message"),
    [({"b": (HEADS - 1, CONTEXT)}, "planes"), ({"b": (1, CONTEXT - 1)}, "needs"), ({"q": (D, 3)}, "needs")],
)
def test_weights_must_fit(change: dict[str, tuple[int, ...]], message: str) -> None:
    weights = tensors(**{**SHAPES, "b": (HEADS, CONTEXT), **change})
    body = (
        f"{PROJECTIONS}\n"
        f'%y = tb.attention(%q, %k, %v) {{{COUNTS}, mask = "causal", bias = @b, bias_kind = "relative"}} : {TYPES}'
    )
    with pytest.raises(TypebarError, match=message):
        run(body, weights)
