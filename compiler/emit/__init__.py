"""Emission: a program with registers and memory places becomes instructions."""

from typebar.compiler.emit.step import ENTRIES, emit

__all__ = ["ENTRIES", "emit"]
