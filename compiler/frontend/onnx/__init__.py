"""Read ONNX models: the files, the graph, its operators, and what the graph leaves out."""

from __future__ import annotations

from typebar.compiler.frontend.onnx.importer import OnnxSource, find_onnx, import_onnx, missing_half

__all__ = ["OnnxSource", "find_onnx", "import_onnx", "missing_half"]
