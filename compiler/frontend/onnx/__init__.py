"""Read ONNX models: the files, the graph, its operators, and what the graph leaves out."""

from __future__ import annotations
