"""From exported functions, weights and facts to a model that the passes take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from xdsl.dialects.builtin import DYNAMIC_INDEX, ModuleOp, TensorType
from xdsl.ir import SSAValue

from typebar.compiler import ir
from typebar.compiler.aten import base_name, depends_on_tokens
from typebar.compiler.frontend.facts import PAIR_CONTEXT, PAIR_FACTS, ends_of, length_of, start_token
from typebar.compiler.frontend.torch_import import Exported, to_graph
from typebar.compiler.frontend.weights import DerivedSource, WeightSource
from typebar.isa.errors import TypebarError


@dataclass(frozen=True)
class FrontendModel:
    """A model, brought in.

    `module` holds the graph as imported, or the re-rolled step once lowered, after its encoder if it has one. `config`
    has at least context, vocab and eos_token_id (a token, a list of several, or None); with an encoder
    is_encoder_decoder, source_context and decoder_start_token_id too; perhaps chat_template. `weights` has the
    parameters, the buffers and the constants that the graph names, and takes those that the passes derive from them.
    """

    module: ModuleOp
    weights: DerivedSource
    tokenizer_json: bytes | None
    config: dict[str, Any]
    name: str

    def lookup(self, name: str) -> np.ndarray:
        """The values of a parameter, a buffer or a derived tensor; raises TypebarError if there are none."""
        return self.weights.load(name)


def assemble(
    name: str,
    source: WeightSource,
    decoder: Exported,
    facts: Mapping[str, Any],
    encoder: Exported | None = None,
    tokenizer: bytes | None = None,
    fallback: int | None = None,
) -> FrontendModel:
    """A model of an exported decoder, and of its encoder if it has one.

    `facts` may have context, source_context, eos_token_id, decoder_start_token_id and anything else worth keeping;
    `fallback` is the context where neither they nor the graph tell it.
    Raises TypebarError for facts that cannot be, and for graphs that return no logits [1, T, V] or memory [1, S, D].
    """
    declared = length_of(facts, "context")
    graph = to_graph(decoder, declared or 1)
    assumed = fallback if encoder is None else PAIR_CONTEXT
    context = declared or _position_rows(graph) or decoder.limit or assumed
    if context is None:
        raise TypebarError("the model has no table of positions that bounds its length; give config={'context': N}")
    graph.properties["context"] = ir.number(context)
    vocab = _result_width(graph)
    if vocab is None:
        raise TypebarError("a model must return logits [1, T, V] with a fixed vocabulary, and nothing else")
    kept = {key: value for key, value in facts.items() if key not in PAIR_FACTS}
    kept |= {"context": context, "vocab": vocab, "eos_token_id": ends_of(facts.get("eos_token_id"), vocab)}
    graphs = [graph]
    if encoder is not None:
        graphs.insert(0, _encoder_graph(encoder, facts, context))
        kept["is_encoder_decoder"] = True
        kept["source_context"] = graphs[0].context.value.data
        kept["decoder_start_token_id"] = start_token(facts, vocab)
    weights = DerivedSource(source)
    for exported in (encoder, decoder):
        if exported is not None:
            _define_constants(weights, exported)
    return FrontendModel(ModuleOp([*graphs]), weights, tokenizer, kept, name)


def memory_width(encoder: Exported) -> int:
    """D of an encoder that returns a memory [1, S, D]; raises TypebarError for one that returns anything else."""
    outputs = next(n for n in encoder.program.graph.nodes if n.op == "output").args[0]
    value = outputs[0].meta["val"] if len(outputs) == 1 else None
    if value is None or value.ndim != 3 or not isinstance(value.shape[2], int) or not value.is_floating_point():
        raise TypebarError("an encoder must return a memory [1, S, D] with a fixed width, and nothing else")
    return int(value.shape[2])


def _encoder_graph(encoder: Exported, facts: Mapping[str, Any], context: int) -> ir.GraphOp:
    declared = length_of(facts, "source_context")
    graph = to_graph(encoder, declared or 1, encoder=True)
    graph.properties["context"] = ir.number(declared or _position_rows(graph) or encoder.limit or context)
    return graph


def _define_constants(weights: DerivedSource, exported: Exported) -> None:
    for name, tensor in exported.constants.items():
        if not tensor.is_meta:
            array = tensor.detach().cpu().numpy()
            weights.define(exported.aliases.get(name, name), array.shape, lambda array=array: array)  # type: ignore[misc]


def _result_width(graph: ir.GraphOp) -> int | None:
    last = graph.body.block.last_op
    assert isinstance(last, ir.ReturnOp)
    size = ir.width(last.values[0]) if len(last.values) == 1 else DYNAMIC_INDEX
    return None if size == DYNAMIC_INDEX else size


def _position_rows(graph: ir.GraphOp) -> int | None:
    """The rows of the smallest table that is looked up by position."""
    known: dict[Any, bool] = {}
    rows = []
    for op in graph.body.block.ops:
        if not isinstance(op, ir.AtenOp) or base_name(op) not in ("embedding", "slice"):
            continue
        table = op.inputs[0]
        if any(_by_pairs(v) for v in op.inputs[1:]):
            continue
        positions = not any(depends_on_tokens(v, known) for v in op.inputs)
        if positions and isinstance(table.owner, ir.ParameterOp) and isinstance(table.type, TensorType):
            shape = table.type.get_shape()
            if len(shape) == 2:
                rows.append(shape[0])
    return min(rows) if rows else None


def _by_pairs(index: SSAValue) -> bool:
    """Whether an index has more than one long axis: it is then made of pairs of positions, such as distances."""
    return isinstance(index.type, TensorType) and sum(size != 1 for size in index.type.get_shape()) > 1
