"""Carry an ONNX graph out with torch operations: what torch.export then traces is an ordinary module."""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping, Sequence

import numpy as np
import onnx
import torch
from onnx import AttributeProto, NodeProto

from typebar.compiler.frontend.onnx import ops_attention, ops_logic, ops_math, ops_nn, ops_quantised, ops_shape
from typebar.compiler.frontend.onnx.calls import RULES, Call, Norm
from typebar.compiler.frontend.onnx.files import OnnxFile, StoredTensor, stored_tensor
from typebar.compiler.frontend.onnx.fold import fold
from typebar.compiler.frontend.onnx.graph import Graph, ProblemsError, domain_of, node_label, structure
from typebar.compiler.frontend.onnx.values import (
    Absent,
    RefusalError,
    Size,
    Value,
    Weight,
    require_possible,
    same,
    torch_dtype,
)
from typebar.compiler.problems import Problem
from typebar.isa.errors import TypebarError

__all__ = ["GraphReader", "ops_attention", "ops_logic", "ops_math", "ops_nn", "ops_quantised", "ops_shape"]

_LARGEST_CONSTANT = 1 << 24
_CONTROL = ("If", "Loop", "Scan")
_BY_VALUE = ("NonZero", "Unique", "TopK", "Compress", "NonMaxSuppression", "OneHot", "SequenceAt", "StringNormalizer")
_REASONS = (RuntimeError, TypeError, ValueError, IndexError, ArithmeticError, AssertionError, NotImplementedError)


class GraphReader:
    """Runs a graph's operations on torch tensors, traced or not, and keeps what they need and what went wrong.

    `static` is the number of tokens that the graph was exported for, where it is fixed. `label` gives the name
    of an initialiser's parameter.
    """

    def __init__(self, file: OnnxFile, graph: Graph, label: dict[str, str], static: int | None) -> None:
        """Remember all; nothing is run yet."""
        self.file = file
        self.graph = graph
        self.static = static
        self.device = torch.device("meta")
        self.opset = next((o.version for o in file.model.opset_import if o.domain in ("", "ai.onnx")), 1)
        self.problems: list[Problem] = []
        self.tensors: dict[str, StoredTensor] = dict(graph.tensors)
        self.made: dict[str, tuple[Weight, Callable[[], np.ndarray]]] = {}
        self.parameters: dict[str, torch.Tensor] = {}
        self.label = label
        self.length: Size | None = None
        self._weights: dict[str, Value] = {}
        self._makers: dict[str, Call] = {}
        self._norms: dict[int, Norm] = {}
        self._origins: dict[int, Weight] = {}
        self.wanted: list[Weight] = []

    def run(self, given: dict[str, Value], length: Size, parameters: dict[str, torch.Tensor]) -> Value:
        """The wanted result; `given` are the graph's inputs, `parameters` the tensors registered so far."""
        self.problems, self.length, self.parameters = [], length, parameters
        self._makers, self._norms, self._origins = {}, {}, {}
        self.wanted = []
        values: dict[str, Value] = dict(given)
        self._nodes(self.graph, values)
        return values.get(self.graph.outputs[0])

    def _nodes(self, graph: Graph, values: MutableMapping[str, Value]) -> None:
        for name, stored in graph.tensors.items():
            values[name] = self._initialiser(name, stored)
        for node in graph.nodes:
            results = self._node(node, values)
            values.update((name, r) for name, r in zip(node.output, results, strict=False) if name)

    def _initialiser(self, name: str, stored: StoredTensor) -> Value:
        """Numbers as constants, quantised and floating-point tensors as parameters."""
        if name not in self._weights:
            self.tensors[name] = stored
            count, dtype = math.prod(stored.shape), torch_dtype(stored.dtype)
            constant = dtype in (torch.int64, torch.bool) and count <= _LARGEST_CONSTANT
            self._weights[name] = stored.load() if constant or count == 1 else Weight(name, stored.shape, dtype)
        return self._weights[name]

    def _node(self, node: NodeProto, values: MutableMapping[str, Value]) -> Sequence[Value]:
        """The results of one node; a refusal is noted and its results are absent."""
        nothing = [Absent()] * len(node.output)
        domain, operator = domain_of(node), node.op_type
        known = (domain, operator) in RULES or (not domain and operator in ("Constant", "If"))
        inputs = [values[name] if name else None for name in node.input]
        if any(isinstance(v, Absent) for v in inputs):
            if not known:
                self._refuse(node, *_unknown(domain, operator))
            return nothing
        try:
            if not domain and operator == "Constant":
                return [self._constant(node)]
            if not domain and operator == "Identity" and isinstance(inputs[0], Weight) and "." in node.output[0]:
                return [self._alias(inputs[0], node.output[0])]
            if not domain and operator == "If":
                return self._if(node, inputs, values)
            folded = fold(node, inputs, self.opset) if not domain else None
            if folded is not None:
                return folded
            if not known:
                raise RefusalError(*_unknown(domain, operator))
            call = Call(node, inputs, self.opset, self)
            made = RULES[domain, operator](call)
            results: Sequence[Value] = made if isinstance(made, list) else [made]
            self._remember(call, results)
            return results
        except RefusalError as refusal:
            self._refuse(node, refusal.reason, refusal.remedy)
        except TypebarError:
            raise
        except _REASONS as error:
            self._refuse(node, f"{operator} fails: {_line(error)}", "mend the graph or export it again")
        return nothing

    def _remember(self, call: Call, results: Sequence[Value]) -> None:
        """Note who made what; one that hands on an input is not the maker."""
        for name, result in zip(call.node.output, results, strict=False):
            source = next((i for i, v in enumerate(call.inputs) if v is result and v is not None), None)
            maker = call.maker(source) if source is not None else call
            if maker is not None:
                self._makers[name] = maker

    def _refuse(self, node: NodeProto, reason: str, remedy: str) -> None:
        self.problems.append(Problem(node_label(node), reason, remedy))

    def _constant(self, node: NodeProto) -> Value:
        if len(node.attribute) != 1 or len(node.output) != 1:
            raise RefusalError("a Constant has one value", "export the model again")
        attribute = node.attribute[0]
        name = node.output[0]
        if attribute.name == "value" and attribute.type == AttributeProto.TENSOR:
            stored = stored_tensor(attribute.t, self.file.path.parent)
            return self._initialiser(name, stored)
        kinds = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
        if attribute.name not in kinds:
            raise RefusalError(f"a Constant's {attribute.name!r} is not supported", "store it as a dense tensor")
        return np.asarray(onnx.helper.get_attribute_value(attribute), kinds[attribute.name])

    def _alias(self, weight: Weight, name: str) -> Value:
        """A parameter that an exporter stored once with an equal one, by its own name."""
        made = Weight(name, weight.shape, weight.dtype)
        self.made[name] = (made, lambda: self.values_of(weight))
        return made

    def _if(self, node: NodeProto, inputs: list[Value], values: MutableMapping[str, Value]) -> Sequence[Value]:
        """The branch that a condition known now takes, in place of the node."""
        condition = inputs[0] if inputs else None
        if not isinstance(condition, np.ndarray) or condition.size != 1:
            raise RefusalError("it is control flow that depends on the tokens", "export the model without branches")
        branch = "then_branch" if condition.reshape(-1)[0] else "else_branch"
        graph = next((a.g for a in node.attribute if a.name == branch and a.type == AttributeProto.GRAPH), None)
        if graph is None:
            raise RefusalError(f"it has no {branch}", "export the model again")
        wanted = [v.name for v in graph.output]
        try:
            inner = structure(graph, wanted, values, self.file.path.parent)
        except ProblemsError as error:
            self.problems += error.problems
            return [Absent()] * len(node.output)
        scope = dict(values)
        self._nodes(inner, scope)
        return [scope[name] for name in wanted]

    # What the rules ask for.

    def maker(self, name: str) -> Call | None:
        """The operation that made a value."""
        return self._makers.get(name)

    def norm_of(self, value: Value) -> Norm | None:
        """What is known of a value that a decomposed norm made."""
        return self._norms.get(id(value))

    def note_norm(self, value: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Remember it; returns the value."""
        self._norms[id(value)] = norm
        return value

    def public(self, weight: Weight) -> str:
        """The parameter's name."""
        return self.label.get(weight.name, weight.name)

    def tensor_of(self, weight: Weight) -> torch.Tensor:
        """The parameter; one not registered yet is noted, and in a trace an empty tensor stands for it."""
        found = self.parameters.get(weight.name)
        if found is None and self.device.type != "meta":
            found = torch.from_numpy(np.array(self.values_of(weight))).to(weight.dtype)
        elif found is None:
            self.wanted.append(weight)
            require_possible(weight.shape)
            found = torch.empty(weight.shape, dtype=weight.dtype, device=self.device)
            self.parameters[weight.name] = found
        self._origins[id(found)] = weight
        return found

    def values_of(self, weight: Weight) -> np.ndarray:
        """The weight's values, read or computed now."""
        if weight.name in self.made:
            return self.made[weight.name][1]()
        return self.tensors[weight.name].load()

    def attribute_array(self, attribute: AttributeProto) -> np.ndarray:
        """The tensor in an attribute."""
        return stored_tensor(attribute.t, self.file.path.parent).load()

    def derived(
        self, weight: Weight, suffix: str, shape: Sequence[int], make: Callable[[], np.ndarray], dtype: torch.dtype
    ) -> Weight:
        """A parameter computed from a weight when it is loaded, called by the weight's name and `suffix`."""
        made = Weight(f"{self.public(weight)}.{suffix}", tuple(shape), dtype)
        self.made[made.name] = (made, make)
        return made

    def buffer(self, name: str, values: np.ndarray) -> torch.Tensor:
        """A constant as a tensor; the positions of a graph of fixed length become those of any length."""
        dtype = torch_dtype(values.dtype)
        if values.size == 1:
            number = values.reshape(-1)[0].item()
            return torch.full(values.shape, number, dtype=dtype, device=self.device)
        positions = self.static is not None and dtype == torch.int64 and values.size == self.static
        if positions and np.array_equal(values.reshape(-1), np.arange(values.size)):
            shape = [self.length if s == self.static else s for s in values.shape]
            return torch.arange(self.length, device=self.device).reshape(shape)
        weight = Weight(name, tuple(values.shape), dtype)
        if name not in self.tensors or name in self.made:
            self.made[name] = (weight, lambda: values)
        return self.tensor_of(weight)

    # Graphs exported for one length.

    def generalised(self, source: Sequence[Size], target: Sequence[Size]) -> list[Size]:
        """The target shape of a value, the fixed length replaced by the number of tokens where the value has that."""
        wanted = list(target)
        if self.static is None or self.length is None:
            return wanted
        count = sum(not isinstance(s, int) for s in source) - sum(not isinstance(t, int) for t in target)
        places = [i for i, t in enumerate(wanted) if isinstance(t, int) and t == self.static]
        places.sort(key=lambda i: (not (i < len(source) and not isinstance(source[i], int)), i))
        for place in places[: max(count, 0)]:
            wanted[place] = self.length
        merged = [i for i, t in enumerate(wanted) if isinstance(t, int) and t > 0 and t % self.static == 0]
        if count > len(places) and merged and not any(same(t, -1) for t in wanted):
            wanted[merged[0]] = -1
        return wanted

    def trimmed(self, x: torch.Tensor, shape: Sequence[Size]) -> torch.Tensor:
        """A constant of a graph of fixed length as the first tokens need it, beside a value of `shape`."""
        if self.static is None or self.length is None or isinstance(self.length, int):
            return x
        axes = [
            -axis
            for axis in range(1, min(x.ndim, len(shape)) + 1)
            if same(x.shape[-axis], self.static) and not isinstance(shape[-axis], int)
        ]
        weight = self._origins.get(id(x))
        if axes == [-2] and weight is not None and weight.shape[:-2] == (1,) and same(shape[-3], 1):
            # A table of positions, which the exporter has looked up already, is a table again without its batch axis.
            rows = self.derived(weight, "rows", weight.shape[1:], lambda: self.values_of(weight)[0], weight.dtype)
            x = self.tensor_of(rows)
        for axis in axes:
            x = torch.ops.aten.slice.Tensor(x, x.ndim + axis, 0, self.length)
        return x


def _unknown(domain: str, operator: str) -> tuple[str, str]:
    if not domain and operator in _CONTROL:
        return f"{operator} is control flow", "export the model without loops"
    if not domain and operator in _BY_VALUE:
        return f"the shape of {operator} depends on the tokens' values", "write it with shapes that follow the length"
    full = f"{domain}.{operator}" if domain else operator
    return f"operator {full} is not supported", "write it with standard operators, or export the model without fusing"


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160].rstrip(".") if lines else type(error).__name__
