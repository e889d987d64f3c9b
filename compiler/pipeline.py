"""The compiler's passes by name, over text and over modules; `typebar opt` runs them."""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.dialects.builtin import ModuleOp
from xdsl.parser import Parser
from xdsl.passes import ModulePass
from xdsl.utils.exceptions import ParseError, VerifyException

from typebar.compiler import ir
from typebar.compiler.aten import Lookup
from typebar.compiler.passes.canonicalise import Canonicalise
from typebar.compiler.passes.classify_masks import ClassifyMasks, classify
from typebar.compiler.passes.make_incremental import MakeIncremental, make_incremental
from typebar.compiler.passes.recognise import Recognise
from typebar.compiler.passes.reroll import Reroll
from typebar.compiler.problems import LoweringError
from typebar.compiler.verify import verify
from typebar.isa.errors import TypebarError

PASSES: dict[str, type[ModulePass]] = {
    made.name: made for made in (Canonicalise, Recognise, ClassifyMasks, MakeIncremental, Reroll)
}
"""Every pass of the front half by its name, in the order in which they lead from a graph to a re-rolled step."""


def parse(text: str) -> ModuleOp:
    """Read a module and check it; raises TypebarError with the place of a syntax error or the rule broken."""
    try:
        module = Parser(ir.context(), text, "<input>").parse_module()
    except ParseError as error:
        place = error.span.get_location()
        raise TypebarError(f"syntax error at line {place.line}, column {place.col}: {error.msg}") from error
    except (ValueError, VerifyException) as error:
        raise TypebarError(f"syntax error: {str(error).splitlines()[0]}") from error
    verify(module)
    return module


def run_passes(text: str, passes: Sequence[str]) -> str:
    """The module in `text` after the named passes, as text; raises TypebarError for bad text or an unknown pass."""
    chosen = []
    for name in passes:
        if name not in PASSES:
            raise TypebarError(f"there is no pass {name!r}; the passes are {', '.join(PASSES)}")
        chosen.append(PASSES[name]())
    module = parse(text)
    for step in chosen:
        step.apply(ir.context(), module)
        verify(module)
    return str(module) + "\n"


def lower(module: ModuleOp, lookup: Lookup | None = None, check: bool = False) -> None:
    """Lead an imported graph to a re-rolled step, in place.

    `lookup` gives the values of buffers that masks are made from; `check` verifies after every pass, not just the last.
    Raises LoweringError with everything that cannot be lowered: masks, positions and operations in one list.
    """
    context = ir.context()
    for early in (Canonicalise(), Recognise()):
        early.apply(context, module)
        if check:
            verify(module)
    problems = classify(module, lookup)
    refused = {p.node for p in problems}
    problems += [p for p in make_incremental(module) if p.node not in refused]
    if problems:
        raise LoweringError(problems)
    if check:
        verify(module)
    Reroll().apply(context, module)
    verify(module)
