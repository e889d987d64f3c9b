"""From torch.nn.Module to `tb.graph`: torch.export with a dynamic length, then one `tb.aten` per call."""

from __future__ import annotations

import inspect
import io
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from xdsl.dialects.builtin import (
    DYNAMIC_INDEX,
    ArrayAttr,
    FloatAttr,
    IndexType,
    IntegerAttr,
    StringAttr,
    TensorType,
    UnitAttr,
    f64,
    i64,
)
from xdsl.ir import Attribute, Block, Region, SSAValue

from typebar.compiler import ir
from typebar.compiler.aten import DTYPES, SIZE_OPERATORS
from typebar.compiler.problems import MODULE, LoweringError, Problem
from typebar.isa.errors import TypebarError

_EXAMPLE_LENGTH = 7
_EXAMPLE_SOURCE = 5
_DROPPED_KEYWORDS = frozenset(("device", "layout", "memory_format", "pin_memory", "non_blocking", "copy"))


@dataclass(frozen=True)
class Exported:
    """What torch.export gave, in terms of the user's names.

    `aliases` maps every parameter name to the one name that stands for its tensor; `constants` holds tensors that the
    module made while running, by the names the graph gives them; `limit` is the greatest length the module accepts.
    """

    program: torch.export.ExportedProgram
    aliases: dict[str, str]
    constants: dict[str, torch.Tensor]
    limit: int | None


class _Scalars(TorchFunctionMode):  # type: ignore[misc]  # torch is not typed here
    """Keeps the values of scalars that a model makes: on the meta device, which has none, they are made on the CPU."""

    def __torch_function__(
        self, function: Callable[..., object], types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> object:
        kwargs = dict(kwargs or {})
        scalar = function is torch.tensor and args and isinstance(args[0], bool | int | float)
        if scalar and torch.device(kwargs.get("device") or "cpu").type == "meta":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


Function = Callable[..., object]
"""What of a model is exported: a function of the model and its inputs, which returns a tensor."""


class _Call(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """A function of a model, as a module whose parameters are the model's."""

    def __init__(self, model: torch.nn.Module, function: Function) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, input_ids: torch.Tensor, memory: torch.Tensor | None = None) -> object:
        """The function's tensor for token ids [1, T] and perhaps a memory [1, S, D]."""
        return self.function(self.model, input_ids, *(() if memory is None else (memory,)))


def logits(model: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """A model's logits [1, T, V]; raises TypebarError if it returns none."""
    cached = "use_cache" in inspect.signature(model.forward).parameters
    return logits_in(model(*inputs, **({"use_cache": False} if cached else {})))


def logits_in(out: object) -> torch.Tensor:
    """The logits in a model's result; raises TypebarError if there are none."""
    found = out if isinstance(out, torch.Tensor) else getattr(out, "logits", None)
    if not isinstance(found, torch.Tensor):
        raise TypebarError(f"a model must return logits [1, T, V] or an object with .logits, not {type(out).__name__}")
    return found


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Sets every sub-module to evaluation, and back to what it was."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch from printing tracebacks and graphs of errors that `export` reports in one line."""

    def drop(record: logging.LogRecord) -> bool:
        return False

    loggers = [v for k, v in list(logging.root.manager.loggerDict.items()) if f"{k}.".startswith("torch.")]
    handlers = {h for logger in loggers if isinstance(logger, logging.Logger) for h in logger.handlers}
    for handler in handlers:
        handler.addFilter(drop)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(drop)


def export(
    model: torch.nn.Module, function: Function = logits, memory: int | None = None, context: object = None
) -> Exported:
    """Export a function of `model` and token ids [1, T], for any T; raises TypebarError if torch cannot.

    With `memory` it takes a second tensor, float32 [1, S, memory] for any S. With a short `context` it is
    traced at fewer tokens, since a table that ends at the traced length would tie the graph to it.
    """
    length = max(2, min(_EXAMPLE_LENGTH, context - 1)) if isinstance(context, int) else _EXAMPLE_LENGTH
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    aliases = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    inputs = [torch.zeros(1, length, dtype=torch.int64, device=device)]
    if memory is not None:
        inputs.append(torch.zeros(1, _EXAMPLE_SOURCE, memory, device=device))
    wrapped = _Call(model, function)
    dynamic = tuple({1: torch.export.Dim.DYNAMIC} for _ in inputs)
    try:
        with _evaluation_mode(model), torch.no_grad(), _quiet(), _Scalars():
            program = torch.export.export(wrapped, tuple(inputs), dynamic_shapes=dynamic, strict=False)
    except TypebarError:
        raise
    except Exception as error:  # torch.export raises whatever the model or its own tracing raises
        raise TypebarError(
            f"torch.export cannot trace the model with a dynamic length: {_reason(error)}; "
            "make its forward(input_ids) free of data-dependent Python and of fixed lengths"
        ) from error
    constants = {n.removeprefix("model."): t for n, t in program.constants.items() if isinstance(t, torch.Tensor)}
    return Exported(program, aliases, constants, _limit(program))


def _reason(error: Exception) -> str:
    """The line of torch's message that says what happened: the first of its list, if it has one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = next((line[2:] for line in lines if line.startswith("- ")), lines[0])
    return line.split(". If you")[0].split("! For more")[0].rstrip(".")


def _limit(program: torch.export.ExportedProgram) -> int | None:
    """The greatest number of tokens that the model's own checks allow, if they set one."""
    user = program.graph_signature.user_inputs[0]
    ids = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == user)
    size = ids.meta["val"].shape[1]
    allowed = program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
    upper = int(allowed.upper) if allowed is not None and allowed.upper.is_Integer else 0
    return upper if 0 < upper < 2**31 else None


@dataclass
class _Importer:
    """Builds the block of one `tb.graph`."""

    exported: Exported
    block: Block = field(default_factory=Block)
    values: dict[torch.fx.Node, Sequence[SSAValue]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    inputs: list[object] = field(default_factory=list)

    def run(self) -> Block:
        signature = self.exported.program.graph_signature
        sources = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        sources.update(signature.inputs_to_lifted_tensor_constants)
        for node in self.exported.program.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, sources)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output" and not self.problems:
                results = [self.values[n][0] for n in node.args[0] if isinstance(n, torch.fx.Node)]
                self.block.add_op(ir.ReturnOp(*results))
        if self.problems:
            raise LoweringError(self.problems)
        return self.block

    def _placeholder(self, node: torch.fx.Node, sources: dict[str, str]) -> None:
        value = node.meta["val"]
        if node.name not in sources:
            what = "source texts" if self.inputs else "sequences"
            if not isinstance(value.shape[1], torch.SymInt):
                raise TypebarError(
                    f"the model accepts {what} of {value.shape[1]} tokens only; make its forward work for any length"
                )
            self.inputs.append(value.shape[1].node.expr)
            argument = self.block.insert_arg(self._tensor_type(value)[0], len(self.block.args))
            argument.name_hint = "memory" if len(self.inputs) > 1 else "input_ids"
            self.values[node] = [argument]
        elif node.users:
            name = sources[node.name].removeprefix("model.")
            op = ir.ParameterOp(self.exported.aliases.get(name, name), self._tensor_type(value)[0])
            self.block.add_op(op)
            self.values[node] = op.results

    def _call(self, node: torch.fx.Node) -> None:
        target = node.target
        value = node.meta.get("val")
        if getattr(target, "__name__", "") == "getitem" and isinstance(node.args[0], torch.fx.Node):
            index = node.args[1]
            assert isinstance(index, int)
            made = self.values[node.args[0]]
            self.values[node] = [made[index]] if made else []
            return
        if any(not self.values[n] for n in node.all_input_nodes if n in self.values):  # it follows from a refused one
            self.values[node] = []
            return
        if value is None:  # assertions about shapes and types, which hold for every length the graph was made for
            return
        name = self._name(target)
        if name is None:
            called = target if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", target)
            self._refuse(node, f"{called} is no plain torch operation", "write it with torch operations")
            return
        changed = _changed(node)
        if changed is not None and self._is_seen_elsewhere(changed, node):
            self._refuse(node, f"{target} changes a tensor that others look into", "write it without changes in place")
            return
        results = list(value) if isinstance(value, list | tuple) else [value]
        types, notes = zip(*(self._type(r) for r in results), strict=True) if results else ((), ())
        operands: list[SSAValue] = []
        args = [self._encode(a, operands) for a in node.args]
        kwargs = {k: self._encode(a, operands) for k, a in node.kwargs.items() if k not in _DROPPED_KEYWORDS}
        op = ir.AtenOp(name, operands, args, kwargs, types, "; ".join(n for n in notes if n) or None)
        op.attributes["node"] = StringAttr(node.name)
        if path := _module_path(node):
            op.attributes[MODULE] = StringAttr(path)
        self.block.add_op(op)
        self.values[node] = op.results
        if changed is not None:
            self.values[changed] = op.results

    def _refuse(self, node: torch.fx.Node, reason: str, remedy: str) -> None:
        self.problems.append(Problem(node.name, reason, remedy, _module_path(node)))
        self.values[node] = []

    def _is_seen_elsewhere(self, changed: torch.fx.Node, by: torch.fx.Node) -> bool:
        """Whether a later operation reads the storage of `changed` through another view, or it is a parameter."""
        root = changed
        while _is_view(root) and isinstance(root.args[0], torch.fx.Node):
            root = root.args[0]
        views, waiting = {root}, [root]
        while waiting:
            made = [user for user in waiting.pop().users if _is_view(user) and user in self.values]
            waiting += [view for view in made if view not in views]
            views.update(made)
        readers = {user for view in views - {changed} for user in view.users} - views
        later = [r for r in readers if r is not by and r not in self.values]
        return root.op == "placeholder" or any(isinstance(r.meta.get("val"), torch.Tensor) for r in later)

    @staticmethod
    def _name(target: object) -> str | None:
        if isinstance(target, torch._ops.OpOverload):
            name = str(target)
            return name.replace("_.", ".", 1) if target._schema.is_mutable else name
        name = f"sym.{getattr(target, '__name__', '')}"
        return name if name in SIZE_OPERATORS else None

    def _type(self, value: object) -> tuple[Attribute, str]:
        """A result's type, and a note if a size is an expression other than the number of tokens."""
        return self._tensor_type(value) if isinstance(value, torch.Tensor) else (IndexType(), "")

    def _tensor_type(self, value: torch.Tensor) -> tuple[TensorType[Attribute], str]:
        if value.dtype not in DTYPES:
            raise TypebarError(f"the model computes in {value.dtype}; cast it to torch.float32")
        shape, notes = [], []
        for axis, size in enumerate(value.shape):
            shape.append(size if isinstance(size, int) else DYNAMIC_INDEX)
            if not isinstance(size, int) and self.inputs and size.node.expr != self.inputs[0]:
                notes.append(f"axis {axis} is {self._expression(size)}")
        return TensorType(DTYPES[value.dtype], shape), ", ".join(notes)

    def _expression(self, size: torch.SymInt) -> str:
        """A size in terms of T, the number of tokens, and S, that of the source text's positions."""
        text = str(size.node.expr)
        for symbol, name in zip(self.inputs, ("T", "S"), strict=False):
            text = re.sub(rf"\b{symbol}\b", name, text)
        return text

    def _encode(self, argument: object, operands: list[SSAValue]) -> Attribute:
        if isinstance(argument, torch.fx.Node):
            value = self.values[argument][0]
            if value not in operands:
                operands.append(value)
            return ir.operand_reference(operands.index(value))
        if isinstance(argument, list | tuple):
            return ArrayAttr([self._encode(a, operands) for a in argument])
        if isinstance(argument, bool):
            return IntegerAttr.from_bool(argument)
        if isinstance(argument, int):
            return IntegerAttr(argument, i64)
        if isinstance(argument, float):
            return FloatAttr(argument, f64)
        if isinstance(argument, torch.dtype | str):
            return StringAttr(str(argument))
        return UnitAttr()


def _module_path(node: torch.fx.Node) -> str:
    """The path, in the user's model, of the innermost module whose forward made the node; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""  # torch.export invents one for sizes it makes itself
    return path.removeprefix("model").removeprefix(".") if path.split(".")[0] == "model" else ""


def _changed(node: torch.fx.Node) -> torch.fx.Node | None:
    """The value that an operation changes in place, if it does."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    first = node.args[0]
    return first if isinstance(first, torch.fx.Node) else None


def _is_view(node: torch.fx.Node) -> bool:
    """Whether an operation's result is, or may be, its operand's storage."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return any(result.alias_info is not None and not result.alias_info.is_write for result in target._schema.returns)


def to_graph(exported: Exported, context: int, encoder: bool = False) -> ir.GraphOp:
    """The exported program as a `tb.graph`; raises LoweringError for calls that are not torch's own."""
    return ir.GraphOp(context, Region([_Importer(exported).run()]), encoder)
