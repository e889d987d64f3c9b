"""FLAN-T5-small, fine-tuned for titles, as a Hugging Face checkpoint made from its package's int8 ONNX pair.

    python -m typebar.models.flan DIR

The weights are dequantised to float32: (q - zero point) * scale. The exporter's node names are the parameters' module
paths, so every tensor finds its place in transformers' T5ForConditionalGeneration without a table of names.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.numpy import save_file

from typebar.isa.errors import TypebarError
from typebar.models.real import find_real

NAME = "flan-t5-small-titles-int8"
_TRANSPOSED = ("MatMulInteger", "MatMul")
"""Operators that multiply by [inputs, outputs]; torch's Linear stores [outputs, inputs]."""
_SHARED = "shared.weight"
_BOUND_TO = ("Gather", "Mul", *_TRANSPOSED)

Tensor = NDArray[np.float32]


def write_checkpoint(pair: Path, target: Path) -> dict[str, tuple[int, ...]]:
    """Write config.json, model.safetensors and tokenizer.json into `target`; returns the tensors' shapes by name.

    `pair` is a directory with encoder.onnx, decoder.onnx and tokenizer.json.

    Raises:
        TypebarError: a file is missing or its graphs are not those of a T5.
    """
    files = {name: pair / name for name in ("encoder.onnx", "decoder.onnx", "tokenizer.json")}
    for path in files.values():
        if not path.is_file():
            raise TypebarError(f"{str(path)!r} is missing: give the directory of an ONNX encoder-decoder pair")
    encoder, decoder = (_parameters(files[f"{stack}.onnx"], stack) for stack in ("encoder", "decoder"))
    if not np.array_equal(encoder.get(_SHARED, ()), decoder.get(_SHARED, ())):
        raise TypebarError(f"{str(pair)!r}: encoder and decoder have different embeddings, and a T5 shares them")
    tensors = encoder | decoder
    config = _config({name: value.shape for name, value in tensors.items()})
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(files["tokenizer.json"], target / "tokenizer.json")
    return {name: value.shape for name, value in tensors.items()}


def _parameters(path: Path, stack: str) -> dict[str, Tensor]:
    """Parameters of one graph by the names that transformers gives them."""
    graph = onnx.load(path).graph
    stored = {item.name: item for item in graph.initializer}
    found: dict[str, Tensor] = {}
    for node in graph.node:
        if node.op_type not in _BOUND_TO:
            continue
        for name in node.input:
            if name not in stored or name.endswith(("_scale", "_zero_point")):
                continue
            values = _dequantised(name, stored)
            if node.op_type in _TRANSPOSED:
                values = values.T
            found[_parameter_name(node.name, stack)] = np.ascontiguousarray(values)
    return found


def _dequantised(name: str, stored: Mapping[str, onnx.TensorProto]) -> Tensor:
    values: Tensor = numpy_helper.to_array(stored[name])
    if values.dtype == np.float32:
        return values
    base = name.removesuffix("_quantized")
    scale, zero = (numpy_helper.to_array(stored[f"{base}_{part}"]) for part in ("scale", "zero_point"))
    restored: Tensor = (values.astype(np.float32) - zero.astype(np.float32)) * scale
    return restored


def _parameter_name(node: str, stack: str) -> str:
    """/enc/block.0/layer.0/SelfAttention/q/MatMul_quant is encoder.block.0.layer.0.SelfAttention.q.weight."""
    path = [part for part in node.strip("/").split("/")[:-1] if part not in ("m", "enc", stack)]
    if path in (["shared"], ["embed_tokens"]):
        return _SHARED
    return ".".join([*([] if path == ["lm_head"] else [stack]), *path, "weight"])


def _config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    """What the tensors tell of the architecture, and FLAN-T5's constants for what they do not."""
    attention = "encoder.block.0.layer.0.SelfAttention"
    vocab, width = shapes[_SHARED]
    buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
    inner, hidden = shapes[f"{attention}.q.weight"][0], shapes["encoder.block.0.layer.1.DenseReluDense.wo.weight"][1]

    def layers(stack: str) -> int:
        return 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith(f"{stack}.block."))

    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": vocab,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": hidden,
        "num_heads": heads,
        "num_layers": layers("encoder"),
        "num_decoder_layers": layers("decoder"),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.0,
        "tie_word_embeddings": False,
        "n_positions": 512,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "torch_dtype": "float32",
    }


def main() -> None:
    """Command line: write the checkpoint."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    shapes = write_checkpoint(find_real(NAME).path(), options.directory)
    print(f"{options.directory}: {len(shapes)} tensors, {sum(int(np.prod(s)) for s in shapes.values()):,} parameters")


if __name__ == "__main__":
    main()
