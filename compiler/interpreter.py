"""An executable specification of `tb.step`: it runs one token at a time in torch, in any floating-point type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block, BlockArgument, Operation, SSAValue

from typebar.compiler import ir
from typebar.compiler.interpreter_ops import (
    CrossAttention,
    Function,
    SourceAttention,
    StepAttention,
    WeightLookup,
    Weights,
    function_of,
)
from typebar.compiler.pipeline import parse
from typebar.isa.errors import TypebarError

Probe = Callable[[str, torch.Tensor], None]
"""Called with a value's name and the value itself, as it is computed."""

Trace = Callable[[Operation, int, torch.Tensor], None]
"""Called with an operation, the pass of its loop that it belongs to (0 outside loops) and the value it computed."""


class _Phase(IntEnum):
    """What a value depends on: nothing but weights; the source text at most; the token."""

    WEIGHTS = 0
    SOURCE = 1
    TOKEN = 2


@dataclass(frozen=True)
class _Instruction:
    """One operation of one layer: where its operands lie, what it does, where its result goes."""

    inputs: tuple[int, ...]
    run: Function
    output: int


class _Row:
    """The operations of all layers of a block in a row, by the phase in which they run.

    The block's arguments have the slots 0, 1, ...; `arguments` are their phases. `begin` makes the function of an
    attention operation. The probe's names start with `prefix`; `last` is what it calls the block's result.
    """

    def __init__(
        self,
        block: Block,
        arguments: Sequence[_Phase],
        weights: Weights,
        begin: Callable[[Operation], Function],
        probe: Probe | None,
        names: tuple[str, str],
        trace: Trace | None,
    ) -> None:
        self._weights, self._begin, self._probe, self._trace = weights, begin, probe, trace
        self._prefix, last = names
        self._phases = list(arguments)
        self._programs: dict[_Phase, list[_Instruction]] = {phase: [] for phase in _Phase}
        self._layers = 0
        slots: dict[SSAValue, int] = {argument: slot for slot, argument in enumerate(block.args)}
        self._result = self._lay_out(block, slots, (0, 0))[0]
        self._watch(last, self._result)
        self._values: list[object] = [None] * len(self._phases)
        self.run(_Phase.WEIGHTS, {})

    def run(self, phase: _Phase, given: dict[int, object]) -> torch.Tensor | None:
        """Run one phase with the arguments in the slots `given`; returns the block's result, if it is there yet."""
        values = self._values
        for slot, value in given.items():
            values[slot] = value
        with torch.inference_mode():
            for instruction in self._programs[phase]:
                values[instruction.output] = instruction.run(*[values[i] for i in instruction.inputs])
        result = values[self._result]
        return result if isinstance(result, torch.Tensor) else None

    def _lay_out(self, block: Block, slots: dict[SSAValue, int], layer: tuple[int, int]) -> list[int]:
        """Append a block's instructions; returns the slots of what it returns or yields."""
        for op in block.ops:
            if isinstance(op, ir.ReturnOp | ir.YieldOp):
                return [slots[v] for v in op.values]
            if isinstance(op, ir.RepeatOp):
                slots.update(zip(op.outs, self._lay_out_layers(op, slots), strict=True))
                continue
            self._weights.layer = layer
            slots[op.results[0]] = self._append(op, tuple(slots[v] for v in op.operands))
        raise TypebarError("a block of the step has no end; verify the module")

    def _lay_out_layers(self, op: ir.RepeatOp, slots: dict[SSAValue, int]) -> list[int]:
        carried = [slots[v] for v in op.inits]
        last = op.body.block.last_op
        assert isinstance(last, ir.YieldOp)
        changed = [i for i, v in enumerate(last.values) if not isinstance(v, BlockArgument)]
        if self._layers == 0 and changed:
            self._watch("embedding", carried[changed[0]])
        start = op.start.value.data
        for number in range(op.count.value.data):
            inner = slots | dict(zip(op.body.block.args, carried, strict=True))
            carried = self._lay_out(op.body.block, inner, (start, number))
            name = max(start + number, self._layers)
            self._layers = name + 1
            if changed:
                self._watch(f"layer {name}", carried[changed[0]])
        return carried

    def _append(self, op: Operation, inputs: tuple[int, ...]) -> int:
        phase = max((self._phases[slot] for slot in inputs), default=_Phase.WEIGHTS)
        if isinstance(op, ir.CrossAttentionOp):
            if any(self._phases[slot] != _Phase.SOURCE for slot in inputs[1:]):
                raise TypebarError("k and v of tb.cross_attention must come from the memory alone; verify the module")
            phase = _Phase.TOKEN
        attends = isinstance(op, ir.AttentionOp | ir.CrossAttentionOp)
        function = self._begin(op) if attends else function_of(op, self._weights)
        if self._trace is not None:
            function = _traced(function, op, self._weights.layer[1], self._trace)
        self._phases.append(phase)
        slot = len(self._phases) - 1
        self._programs[phase].append(_Instruction(inputs, function, slot))
        return slot

    def _watch(self, name: str, slot: int) -> None:
        """Show the probe a value whenever it is computed."""
        probe = self._probe
        if probe is None:
            return
        called = self._prefix + name

        def show(value: torch.Tensor) -> torch.Tensor:
            probe(called, value)
            return value

        self._phases.append(self._phases[slot])
        self._programs[self._phases[slot]].append(_Instruction((slot,), show, len(self._phases) - 1))


def _traced(function: Function, op: Operation, layer: int, trace: Trace) -> Function:
    def run(*inputs: torch.Tensor) -> torch.Tensor:
        value = function(*inputs)
        trace(op, layer, value)
        return value

    return run


class StepInterpreter:
    """Runs a step, re-rolled or not, token by token, and before it its encoder, if there is one.

    `module` is a module or its text; all arithmetic and all weights are in `dtype` on `device`. `probe` is called for
    every token with "embedding", the vector that the first loop receives; with "layer 3", the vector after that layer
    of a loop; and with "logits". For a source text it is called with "encoder embedding", "encoder layer 3" and
    "encoder memory", rows [S, D]. `trace` is called for every operation. Raises TypebarError for a module that holds no
    valid step and for weights whose shapes do not fit it.
    """

    def __init__(
        self,
        module: ModuleOp | str,
        weight_lookup: WeightLookup,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        probe: Probe | None = None,
        trace: Trace | None = None,
    ) -> None:
        """Load every weight once and lay the operations of all layers out in a row."""
        parsed = parse(module) if isinstance(module, str) else module
        ops = list(parsed.body.block.ops)
        step, first = ops[-1] if ops else None, ops[0] if ops else None
        if not isinstance(step, ir.StepOp):
            raise TypebarError("the module holds no tb.step; run the passes up to make-incremental first")
        self.vocab, self.context = step.vocab.value.data, step.context.value.data
        self.dtype, self.device = dtype, torch.device(device)
        self._weights = Weights(weight_lookup, dtype, self.device)
        self._attentions: list[StepAttention] = []
        self._length = 0
        self._encoder: _Row | None = None
        self._encoded = True
        if isinstance(first, ir.EncoderOp):
            self.source_vocab, self.source_context = first.vocab.value.data, first.context.value.data
            self._encoded = False
            arguments = [_Phase.TOKEN] * 2
            names = ("encoder ", "memory")
            self._encoder = _Row(
                first.body.block, arguments, self._weights, self._source_attention, probe, names, trace
            )
        arguments = [_Phase.TOKEN, _Phase.TOKEN, _Phase.SOURCE][: len(step.body.block.args)]
        names = ("", "logits")
        self._step = _Row(step.body.block, arguments, self._weights, self._attention, probe, names, trace)

    @property
    def has_encoder(self) -> bool:
        """Whether `encode` must come before `step`."""
        return self._encoder is not None

    def reset(self) -> None:
        """Forget all tokens; the source text stays until the next `encode`."""
        self._length = 0

    def encode(self, tokens: Sequence[int]) -> torch.Tensor:
        """Take a source text: compute its memory, and keys and values of every cross-attention; forget all tokens.

        Returns the memory [S, D]. Raises TypebarError for a module without an encoder, for no tokens or too many, and
        for tokens out of range.
        """
        if self._encoder is None:
            raise TypebarError("the module has no encoder; feed its tokens to the step")
        if not 1 <= len(tokens) <= self.source_context:
            raise TypebarError(f"a source text must have 1 to {self.source_context} tokens, not {len(tokens)}")
        for token in tokens:
            _check_token(int(token), self.source_vocab)
        ids = torch.tensor([int(token) for token in tokens], device=self.device)
        memory = self._encoder.run(_Phase.TOKEN, {0: ids, 1: torch.arange(len(tokens), device=self.device)})
        assert memory is not None
        self._step.run(_Phase.SOURCE, {2: memory})
        self._encoded, self._length = True, 0
        return memory

    def step(self, token: int, position: int) -> torch.Tensor:
        """Logits [vocab] after `token` at `position`.

        Positions go up one by one from 0; an earlier position again takes everything after it back. Raises TypebarError
        for tokens and positions out of range, and before `encode` if there is an encoder.
        """
        if not self._encoded:
            raise TypebarError("the model has an encoder: call encode(tokens) with a source text before the first step")
        _check_token(token, self.vocab)
        if not 0 <= position <= min(self._length, self.context - 1):
            raise TypebarError(
                f"position {position} cannot follow {self._length} tokens in a context of {self.context}; start at 0"
            )
        self._length = position + 1
        for attention in self._attentions:
            attention.position = position
        logits = self._step.run(_Phase.TOKEN, {0: token, 1: position})
        assert logits is not None
        return logits

    def _attention(self, op: Operation) -> Function:
        if isinstance(op, ir.CrossAttentionOp):
            return CrossAttention(op)
        assert isinstance(op, ir.AttentionOp)
        attention = StepAttention(op, self._weights, self.context)
        self._attentions.append(attention)
        return attention

    def _source_attention(self, op: Operation) -> Function:
        assert isinstance(op, ir.AttentionOp)
        return SourceAttention(op, self._weights, self.source_context)


def _check_token(token: int, vocab: int) -> None:
    if not 0 <= token < vocab:
        raise TypebarError(f"token {token} is outside the vocabulary of {vocab}")
