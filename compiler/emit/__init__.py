"""Emission: a program with registers and memory places becomes instructions."""

from typebar.compiler.emit.step import emit

__all__ = ["emit"]
