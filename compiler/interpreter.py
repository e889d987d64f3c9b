"""An executable specification of `tb.step`: it runs one token at a time in torch, in any floating-point type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from xdsl.dialects.builtin import ModuleOp, SymbolRefAttr
from xdsl.ir import Block, Operation, SSAValue

from typebar.compiler import ir
from typebar.compiler.passes.activations import FUNCTIONS
from typebar.compiler.pipeline import parse
from typebar.isa.errors import TypebarError

WeightLookup = Callable[[str], torch.Tensor]
"""Gives a parameter's values by its name; called once for every name."""

_FIRST_CAPACITY = 128


@dataclass(frozen=True)
class _Instruction:
    """One operation of one layer: where its operands lie, what it does, where its result goes."""

    inputs: tuple[int, ...]
    run: Callable[..., torch.Tensor]
    output: int


class _Attention:
    """One attention operation of one layer, with its cache [kv_heads, positions, head_dim], which grows as needed."""

    def __init__(self, op: ir.AttentionOp, context: int, dtype: torch.dtype, device: torch.device) -> None:
        self.kv_heads, self.size = op.kv_heads.value.data, op.head_dim.value.data
        self.group = op.heads.value.data // self.kv_heads
        self.scale = op.scale.value.data
        self.window = op.window.value.data if op.window is not None else context
        self.context = context
        shape = (2, self.kv_heads, min(_FIRST_CAPACITY, context), self.size)
        self.cache = torch.zeros(shape, dtype=dtype, device=device)
        self.position = 0

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """softmax(scale * q K^T) V over the positions up to this one, within the window."""
        end = self.position + 1
        if end > self.cache.shape[2]:
            self._grow(end)
        self.cache[0, :, self.position] = k.view(self.kv_heads, self.size)
        self.cache[1, :, self.position] = v.view(self.kv_heads, self.size)
        keys, values = self.cache[:, :, max(0, end - self.window) : end]
        scores = q.view(self.kv_heads, self.group, self.size) @ keys.transpose(1, 2) * self.scale
        return (torch.softmax(scores, dim=-1) @ values).reshape(-1)

    def _grow(self, needed: int) -> None:
        kept = self.cache
        capacity = min(self.context, max(needed, 2 * kept.shape[2]))
        self.cache = kept.new_zeros((2, self.kv_heads, capacity, self.size))
        self.cache[:, :, : kept.shape[2]] = kept


class StepInterpreter:
    """Runs a step, re-rolled or not, token by token.

    `module` is a module or its text; all arithmetic and all weights are in `dtype` on `device`. Raises TypebarError for
    a module that holds no valid step and for weights whose shapes do not fit it.
    """

    def __init__(
        self,
        module: ModuleOp | str,
        weight_lookup: WeightLookup,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Load every weight once and lay the operations of all layers out in a row."""
        parsed = parse(module) if isinstance(module, str) else module
        step = parsed.body.block.first_op
        if not isinstance(step, ir.StepOp):
            raise TypebarError("the module holds no tb.step; run the passes up to make-incremental first")
        self.vocab, self.context = step.vocab.value.data, step.context.value.data
        self.dtype, self.device = dtype, torch.device(device)
        self._lookup = weight_lookup
        self._weights: dict[str, torch.Tensor] = {}
        self._attentions: list[_Attention] = []
        self._program: list[_Instruction] = []
        self._slots = 2
        self._length = 0
        token, position = step.body.block.args
        results = self._lay_out(step.body.block, {token: 0, position: 1}, 0)
        self._result = results[0]

    def reset(self) -> None:
        """Forget all tokens."""
        self._length = 0

    def step(self, token: int, position: int) -> torch.Tensor:
        """Logits [vocab] after `token` at `position`.

        Positions go up one by one from 0; an earlier position again takes everything after it back. Raises TypebarError
        for tokens and positions out of range.
        """
        if not 0 <= token < self.vocab:
            raise TypebarError(f"token {token} is outside the vocabulary of {self.vocab}")
        if not 0 <= position <= min(self._length, self.context - 1):
            raise TypebarError(
                f"position {position} cannot follow {self._length} tokens in a context of {self.context}; start at 0"
            )
        self._length = position + 1
        for attention in self._attentions:
            attention.position = position
        values: list[torch.Tensor | int] = [0] * self._slots
        values[0], values[1] = token, position
        with torch.inference_mode():
            for instruction in self._program:
                values[instruction.output] = instruction.run(*[values[i] for i in instruction.inputs])
        logits = values[self._result]
        assert isinstance(logits, torch.Tensor)
        return logits

    def _lay_out(self, block: Block, slots: dict[SSAValue, int], layer: int) -> list[int]:
        """Append a block's instructions; returns the slots of what it returns or yields."""
        for op in block.ops:
            if isinstance(op, ir.ReturnOp | ir.YieldOp):
                return [slots[v] for v in op.values]
            if isinstance(op, ir.RepeatOp):
                carried = [slots[v] for v in op.inits]
                for number in range(op.start.value.data, op.start.value.data + op.count.value.data):
                    inner = slots | dict(zip(op.body.block.args, carried, strict=True))
                    carried = self._lay_out(op.body.block, inner, number)
                slots.update(zip(op.outs, carried, strict=True))
                continue
            inputs = tuple(slots[v] for v in op.operands)
            self._program.append(_Instruction(inputs, self._function(op, layer), self._slots))
            slots[op.results[0]] = self._slots
            self._slots += 1
        raise TypebarError("a block of the step has no end; verify the module")

    def _weight(self, reference: SymbolRefAttr | None, layer: int, shape: Sequence[int | None]) -> torch.Tensor | None:
        """A weight by its symbol, loaded once; None stands for any size in `shape`."""
        if reference is None:
            return None
        name = ir.text(reference).replace(ir.LAYER, str(layer))
        if name not in self._weights:
            self._weights[name] = self._lookup(name).to(device=self.device, dtype=self.dtype)
        found = self._weights[name]
        if len(found.shape) != len(shape) or any(s not in (None, f) for s, f in zip(shape, found.shape, strict=True)):
            raise TypebarError(f"weight {name!r} is {list(found.shape)}, the graph needs {list(shape)}")
        return found

    def _function(self, op: Operation, layer: int) -> Callable[..., torch.Tensor]:
        match op:
            case ir.AddOp():
                return lambda a, b: a + b
            case ir.MulOp():
                return lambda a, b: a * b
            case ir.ScaleOp():
                value = op.value.value.data
                return lambda x: x * value
            case ir.SliceOp():
                begin, end = op.start.value.data, op.start.value.data + op.size.value.data
                return lambda x: x[begin:end]
            case ir.ActivationOp():
                return FUNCTIONS[op.kind.data]
            case ir.EmbeddingOp():
                table = self._weight(op.weight, layer, (None, ir.width(op.out)))
                offset = op.offset.value.data
                assert table is not None
                return lambda index: table[index + offset]
            case ir.AttentionOp():
                attention = _Attention(op, self.context, self.dtype, self.device)
                self._attentions.append(attention)
                return attention
            case ir.LinearOp():
                return self._linear(op, layer)
            case ir.LayerNormOp() | ir.RmsNormOp():
                return self._norm(op, layer)
        raise TypebarError(f"{op.name} cannot stand in a step; verify the module")

    def _linear(self, op: ir.LinearOp, layer: int) -> Callable[..., torch.Tensor]:
        shape = (ir.width(op.out), ir.width(op.x))
        stored = self._weight(op.weight, layer, shape if op.layout.data == "out_in" else shape[::-1])
        bias = self._weight(op.bias, layer, (ir.width(op.out),))
        assert stored is not None
        weight = stored if op.layout.data == "out_in" else stored.t()
        return lambda x: functional.linear(x, weight, bias)

    def _norm(self, op: ir.LayerNormOp | ir.RmsNormOp, layer: int) -> Callable[..., torch.Tensor]:
        shape = [ir.width(op.x)]
        weight, eps = self._weight(op.weight, layer, shape), op.eps.value.data
        if isinstance(op, ir.RmsNormOp):
            return lambda x: functional.rms_norm(x, shape, weight, eps)
        bias = self._weight(op.bias, layer, shape)
        return lambda x: functional.layer_norm(x, shape, weight, bias, eps)
