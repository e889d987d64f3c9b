"""An ONNX graph as a torch module: what torch.export traces, and what names its parameters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import defs

from typebar.compiler.frontend.onnx.files import OnnxFile, read_file
from typebar.compiler.frontend.onnx.graph import Graph, ProblemsError, inlined, read_names, structure
from typebar.compiler.frontend.onnx.inputs import Inputs, find_inputs, find_output
from typebar.compiler.frontend.onnx.labels import labels
from typebar.compiler.frontend.onnx.reader import GraphReader
from typebar.compiler.frontend.onnx.values import Weight, show
from typebar.compiler.frontend.torch_import import Exported, export
from typebar.compiler.problems import LoweringError
from typebar.isa.errors import TypebarError

_ROUNDS = 8
_REHEARSED = ((7, 5), (11, 13))
"""Lengths of the text and of the source text at which a graph is run before it is traced."""
_OLDEST = 7
_TOLERANCE = 1e-3


class OnnxModule(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """A graph as a module of token ids [1, T] and perhaps a memory [1, S, D]; parameters have no values here.

    Raises TypebarError, and LoweringError with everything in the graph that is wrong or unsupported.
    """

    def __init__(self, path: Path, encoder: bool = False) -> None:
        """Read the file and check the graph; no operation is run yet."""
        super().__init__()
        self.encoder = encoder
        self.reader, self.inputs = _opened(path, encoder)
        self.output = self.reader.graph.outputs[0]
        self._slots: dict[str, Weight] = {}
        for name, stored in self.reader.graph.tensors.items():
            weight = self.reader._initialiser(name, stored)
            if isinstance(weight, Weight):
                self._register(weight)

    def _register(self, weight: Weight) -> None:
        slot = f"t{len(self._slots)}"
        self._slots[slot] = weight
        self.register_buffer(slot, torch.empty(weight.shape, dtype=weight.dtype, device="meta"))

    def named_weights(self) -> dict[str, Weight]:
        """The parameters by the names that the graph gives them."""
        return {self.reader.public(weight): weight for weight in self._slots.values()}

    def forward(self, input_ids: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [1, T, V]; of an encoder its states [1, T, D]."""
        self.reader.device = input_ids.device
        parameters = {weight.name: getattr(self, slot) for slot, weight in self._slots.items()}
        given = self.inputs.values(input_ids, memory)
        result = self.reader.run(given, input_ids.shape[1], parameters)
        if self.reader.problems:
            raise LoweringError(self.reader.problems)
        if isinstance(result, torch.Tensor) and result.ndim == 2:
            result = result[None]
        if not isinstance(result, torch.Tensor) or result.ndim != 3 or not result.is_floating_point():
            shape = show(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
            wanted = "states [1, T, D]" if self.encoder else "logits [1, T, V]"
            raise TypebarError(f"output {self.output!r} is {shape}, not {wanted}; export the model again")
        return result

    def settle(self) -> bool:
        """Register the parameters that the last run found missing; returns whether there were any."""
        known = {weight.name for weight in self._slots.values()}
        missing = {w.name: w for w in self.reader.wanted if w.name not in known}
        for weight in missing.values():
            self._register(weight)
        return bool(missing)

    def _rehearse(self) -> None:
        """Run the graph at two lengths, which is far quicker than tracing it, and register what both want.

        Raises LoweringError with what is wrong at either length.
        """
        wanted = []
        for length, source in _REHEARSED:
            ids = torch.zeros(1, self.inputs.static or length, dtype=torch.int64, device="meta")
            memory = None
            if self.inputs.takes_memory:
                memory = torch.zeros(1, source, self.inputs.memory_width(), device="meta")
            with torch.no_grad():
                self(ids, memory)
            wanted.append(dict.fromkeys(self.reader.wanted))
        for weight in wanted[0]:
            if weight in wanted[1] and weight.name not in {w.name for w in self._slots.values()}:
                self._register(weight)

    def _check_prefix(self, exported: Exported) -> None:
        """Run what a graph of fixed length was generalised to on a shorter text: the logits must be those of the start.

        Raises TypebarError if they are not: the length then stands in the graph in a way that cannot be generalised.
        """
        length = self.inputs.static
        if length is None:
            return
        real = self.real_parameters()
        ids = torch.arange(length)[None] % 7 + 1
        shorter = max(1, length // 2)
        sources = exported.program.graph_signature.inputs_to_buffers
        flat = [real[name.removeprefix("model.")] for name in sources.values()]
        try:
            with torch.no_grad():
                whole = torch.func.functional_call(self, real, (ids,))
                part = _OnProcessor(exported.program.graph_module).run(*flat, ids[:, :shorter])[0]
            same = torch.allclose(whole[:, :shorter], part, _TOLERANCE, _TOLERANCE)
        except RuntimeError:  # shapes that do not go together at another length
            same = False
        if not same:
            raise TypebarError(
                f"the graph was exported for {length} tokens and gives other logits for fewer; "
                "export it with a dynamic sequence axis"
            )

    def real_parameters(self) -> dict[str, torch.Tensor]:
        """Every parameter with its values, by the module's own names for them: for running the module."""
        made = {}
        for slot, weight in self._slots.items():
            values = np.array(self.reader.values_of(weight))
            made[slot] = torch.from_numpy(values).to(weight.dtype)
        return made

    def exported(self) -> Exported:
        """The module as torch.export has it, with the parameters' own names; raises as the class says."""
        self._rehearse()
        for _ in range(_ROUNDS):
            made = export(self, memory=self.inputs.memory_width() if self.inputs.takes_memory else None)
            if not self.settle():
                self._check_prefix(made)
                aliases = {slot: self.reader.public(weight) for slot, weight in self._slots.items()}
                return replace(made, aliases=aliases)
        raise TypebarError("the graph asks for other parameters at every reading; export the model again")


class _OnProcessor(torch.fx.Interpreter):  # type: ignore[misc]  # torch is not typed here
    """Runs a program that was traced on the meta device on real tensors."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same call, on the processor."""
        moved = {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs
        return super().call_function(target, args, moved)


def _opened(path: Path, encoder: bool) -> tuple[GraphReader, Inputs]:
    """The reader of a file's graph and the roles of its inputs."""
    file = read_file(path)
    file = OnnxFile(path, inlined(file.model))
    graph = file.model.graph
    _check_operator_sets(file)
    output = find_output(graph, encoder)
    try:
        body = structure(graph, [output], [], path.parent)
    except ProblemsError as error:
        raise LoweringError(error.problems) from error
    used = {name for node in body.nodes for name in read_names(node)}
    inputs, problems = find_inputs(graph, used, set(body.tensors))
    if problems:
        raise LoweringError(problems)
    if encoder and inputs.takes_memory:
        raise TypebarError(f"{path} takes an encoder's result; it is no encoder, give it as the decoder")
    if inputs.static is not None and (encoder or inputs.takes_memory):
        raise TypebarError(f"{path} takes texts of {inputs.static} tokens only; export it with dynamic axes")
    names = {name: name for name in body.tensors if name in used}
    tensors = {name: stored for name, stored in body.tensors.items() if name in used}
    body = Graph(body.nodes, tensors, body.outputs)
    return GraphReader(file, body, labels(body.nodes, names), inputs.static), inputs


def _check_operator_sets(file: OnnxFile) -> None:
    newest = defs.onnx_opset_version()
    versions = [o.version for o in file.model.opset_import if o.domain in ("", "ai.onnx")]
    if not versions or not _OLDEST <= versions[0] <= newest:
        found = versions[0] if versions else "none"
        raise TypebarError(f"{file.path} has operator set {found}; sets {_OLDEST} to {newest} are read, export it anew")
