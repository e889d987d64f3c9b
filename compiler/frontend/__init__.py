"""Bring a model in: from a checkpoint directory, a torch module or the name of a shape to one token's step."""

from __future__ import annotations

from typebar.compiler.frontend.assembly import FrontendModel
from typebar.compiler.frontend.models import SHAPES, import_model, load_model, no_model
from typebar.compiler.frontend.weights import CheckpointSource, DerivedSource, ModuleSource, ShapeSource, WeightSource

__all__ = [
    "SHAPES",
    "CheckpointSource",
    "DerivedSource",
    "FrontendModel",
    "ModuleSource",
    "ShapeSource",
    "WeightSource",
    "import_model",
    "load_model",
    "no_model",
]
