"""Vector instructions joined to chains: what joins, and that nothing but the number of passes changes."""

from __future__ import annotations

import random

import numpy as np
import pytest
from functional_bench import Bench

from typebar.compiler.emit.builder import Builder, R, reg
from typebar.isa.instructions import Function, Source
from typebar.isa.program import Program, Value, float_bits

IMMEDIATE, WORD = int(Source.IMMEDIATE), int(Source.WORD)


def vector(name: str, **values: Value) -> tuple[str, dict[str, Value]]:
    return name, {"dst": 64, "a": 64, "n": 40} | values


def names(*ops: tuple[str, dict[str, Value]], chains: bool = True) -> list[str]:
    """What a builder makes of instructions."""
    build = Builder(chains)
    for name, values in ops:
        build.add(name, **values)
    return [op.kind.name for op in build.program().ops]


ADD = vector("vadd", a=128, b=192)
EXP = vector("vunary", function=int(Function.EXP))


@pytest.mark.parametrize(
    "ops",
    [
        (ADD, vector("vsum", dst=300)),
        (ADD, EXP),
        (ADD, EXP, vector("vrmax", dst=300)),
        (vector("vmul", b_from=WORD, b=300), vector("vmul", b=128)),
        (vector("vmul", b_from=WORD, b=300), vector("vmul", a=128, b=64)),  # as good the other way round
        (vector("vmul", b_from=WORD, b=300), vector("vsub", b=128), EXP, vector("vsumsq", dst=300)),
        (vector("vadd", dst=reg(R.T0, 64), a=128, b=192), vector("vsum", dst=300, a=reg(R.T0, 64))),
    ],
)
def test_what_joins(ops: tuple[tuple[str, dict[str, Value]], ...]) -> None:
    assert names(*ops) == ["vchain"]
    assert names(*ops, chains=False) == [name for name, _ in ops]


@pytest.mark.parametrize(
    "second",
    [
        vector("vadd", dst=128, b=192),  # what lies at 64 stays
        vector("vadd", b=192, n=32),
        vector("vadd", b=64),  # what the first writes is both operands
        vector("vadd", b_from=WORD, b=70),
        vector("vadd", b=reg(R.T0)),  # where that lies is not known
        vector("vadd", a=reg(R.T0, 64), b=192),
        vector("vsub", a=128, b=64),
        vector("vadd", a=128, b=192),
        vector("vargmax", dst=300),
    ],
)
def test_what_does_not(second: tuple[str, dict[str, Value]]) -> None:
    first = vector("vmul", b_from=WORD, b=300)
    assert names(first, second) == ["vmul", second[0]]


def test_the_order_of_a_chains_steps_limits_it() -> None:
    multiply = vector("vmul", b_from=IMMEDIATE, imm=float_bits(0.5))
    assert names(EXP, ADD) == ["vunary", "vadd"]
    assert names(EXP, EXP) == ["vunary", "vunary"]
    assert names(ADD, multiply) == ["vadd", "vmul"]
    assert names(vector("vmul", b=128), multiply) == ["vmul", "vmul"]
    assert names(vector("vsum", dst=300), vector("vsum", dst=301)) == ["vsum", "vsum"]
    assert names(multiply, multiply) == ["sli", "vchain"]
    assert names(multiply, multiply, multiply) == ["sli", "vchain", "vmul"]
    assert names(multiply, EXP, EXP) == ["vchain", "vunary"]


def test_labels_and_comments_keep_their_instructions() -> None:
    build = Builder(chains=True)
    build.note("first")
    name, values = vector("vmul", b_from=IMMEDIATE, imm=float_bits(0.5))
    build.add(name, **values)
    build.note("second")
    build.add("vadd", **vector("vadd", b=128)[1])
    build.note("third")
    build.add("vsum", dst=300, a=64, n=40)
    build.label("here")
    build.add(name, **values)
    program = build.program()
    assert [op.kind.name for op in program.ops] == ["sli", "vchain", "vmul"]
    assert (program.comments, program.labels) == ({1: "second", 2: "third"}, {"here": 2})


def random_program(source: random.Random, chains: bool) -> Program:
    """Vector instructions on few places and of few lengths, so that they often read what the one before wrote."""
    build, places = Builder(chains), [64, 64, 64, 128, 192]
    for _ in range(60):
        n = source.choice([1, 8, 8, 40])
        dst, a, b = (source.choice(places) for _ in range(3))
        kind = source.randrange(12)
        immediate = float_bits(source.choice([0.5, 1.0, -2.0, 0.0]))
        if kind < 7:
            name, origin = source.choice(["vadd", "vsub", "vmul", "vmul", "vmax"]), source.choice(list(Source))
            if source.random() < 0.7:
                a = dst
            if origin is Source.WORD and source.random() < 0.5:
                b = 300
            build.add(name, dst=dst, a=a, b=b, n=n, b_from=int(origin), imm=immediate if origin == IMMEDIATE else 0)
        elif kind < 9:
            function = source.choice([Function.EXP, Function.TANH, Function.RSQRT, Function.RELU])
            build.add("vunary", function=int(function), dst=dst, a=dst, n=n)
        elif kind < 11:
            build.add(source.choice(["vsum", "vsumsq", "vrmax"]), dst=source.choice([300, 66, 500]), a=a, n=n)
        elif source.random() < 0.5:
            build.label(build.fresh("label"))
        else:
            build.add("vmov", dst=dst, b=b, n=8 * (n // 8))
    return build.program()


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_chains_change_no_bit(first: int) -> None:
    chains = 0
    for seed in range(first, first + 50):
        results = []
        for flag in (False, True):
            bench, program = Bench(seed, plain=True), random_program(random.Random(seed), flag)
            bench.run(*program.ops)
            results.append(bench.registers.view(np.uint32).copy())
            chains += sum(item.kind.name == "vchain" for item in program.ops)
        assert np.array_equal(*results), f"seed {seed}"
    assert chains > 100
