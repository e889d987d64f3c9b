"""The compiler's passes by name, over text and over modules; `typebar opt` runs them."""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.parser import Parser
from xdsl.passes import ModulePass
from xdsl.utils.arg_spec import parse_spec
from xdsl.utils.exceptions import ArgSpecParseError, ParseError, VerifyException

from typebar.compiler import device_ir, ir
from typebar.compiler.aten import Define, Lookup
from typebar.compiler.device_source import SourceOp
from typebar.compiler.passes.allocate import AllocatePass
from typebar.compiler.passes.canonicalise import Canonicalise
from typebar.compiler.passes.classify_masks import ClassifyMasks, classify
from typebar.compiler.passes.fuse import FusePass
from typebar.compiler.passes.halve import HalvePass
from typebar.compiler.passes.make_incremental import MakeIncremental, make_incremental
from typebar.compiler.passes.partition import PartitionPass
from typebar.compiler.passes.phases import PhasesPass
from typebar.compiler.passes.quantise import QuantisePass
from typebar.compiler.passes.recognise import Recognise, recognise
from typebar.compiler.passes.reroll import Reroll
from typebar.compiler.passes.scale_caches import ScaleCachesPass
from typebar.compiler.passes.tensors import Tensors
from typebar.compiler.problems import LoweringError
from typebar.compiler.verify import verify
from typebar.isa.errors import TypebarError

_FRONT = (Canonicalise, Recognise, ClassifyMasks, MakeIncremental, Reroll)
_BACK = (PartitionPass, FusePass, HalvePass, PhasesPass, AllocatePass)
PASSES: dict[str, type[ModulePass]] = {made.name: made for made in (*_FRONT, ScaleCachesPass, QuantisePass, *_BACK)}
"""Every pass by its name, in the order in which they lead from a graph to a re-rolled step and on to an allocated
program; `scale-caches` is for int8 K and V, `quantise` for int8 weights, and those of the second half take options,
such as `partition{devices=4}`."""


def parse(text: str) -> ModuleOp:
    """Read a module and check it; raises TypebarError with the place of a syntax error or the rule broken."""
    module = _read(text, ir.context())
    verify(module)
    return module


def _read(text: str, context: Context) -> ModuleOp:
    try:
        return Parser(context, text, "<input>").parse_module()
    except ParseError as error:
        place = error.span.get_location()
        raise TypebarError(f"syntax error at line {place.line}, column {place.col}: {error.msg}") from error
    except (ValueError, VerifyException) as error:
        raise TypebarError(f"syntax error: {str(error).splitlines()[0]}") from error


def run_passes(text: str, passes: Sequence[str]) -> str:
    """The module in `text` after the named passes, as text; raises TypebarError for bad text, a pass
    unknown, or one that finds nothing to work on."""
    chosen = [_pass(name) for name in passes]
    context = device_ir.context()
    module = _read(text, context)
    _check(module)
    for step in chosen:
        _check_subject(step, module)
        step.apply(context, module)
        _check(module)
    return str(module) + "\n"


def _pass(text: str) -> ModulePass:
    """The pass that `name` or `name{option=value ...}` asks for."""
    try:
        spec = parse_spec(text)
        for option, values in spec.parameters.items():
            if any(isinstance(value, int | float) and not isinstance(value, bool) and value < 1 for value in values):
                raise ValueError(f"{option} must be at least 1")
        if spec.name in PASSES:
            return PASSES[spec.name].from_spec(spec)
    except (ValueError, ArgSpecParseError) as error:
        raise TypebarError(f"pass {text!r}: {str(error).splitlines()[-1].strip()}") from error
    raise TypebarError(f"there is no pass {spec.name!r}; the passes are {', '.join(PASSES)}")


def _check_subject(step: ModulePass, module: ModuleOp) -> None:
    """Refuse a pass of the second half that would find nothing to work on."""
    if not isinstance(step, _BACK):
        return
    wanted, before = device_ir.ProgramOp.name, PartitionPass.name
    if isinstance(step, PartitionPass):
        wanted, before = ir.StepOp.name, MakeIncremental.name
    if not any(item.name == wanted for item in module.body.block.ops):
        raise TypebarError(f"pass {step.name!r} needs a {wanted}, and the module has none: run {before!r} first")


def _check(module: ModuleOp) -> None:
    """The rules of the form that the module has: a graph or a step, or a device's program."""
    if not isinstance(module.body.block.first_op, device_ir.ProgramOp | SourceOp):
        verify(module)
        return
    try:
        module.verify()
    except VerifyException as error:
        raise TypebarError(f"invalid module: {str(error).splitlines()[-1].strip()}") from error


def lower(module: ModuleOp, lookup: Lookup | None = None, define: Define | None = None, check: bool = False) -> None:
    """Lead an imported graph to a re-rolled step, in place.

    `lookup` gives the values of buffers that masks are made from; `define` takes the tensors that passes derive from
    the model's; `check` verifies after every pass, not just the last.
    Raises LoweringError with everything that cannot be lowered: masks, positions and operations in one list.
    """
    context = ir.context()
    tensors = Tensors(lookup, define)
    Canonicalise().apply(context, module)
    if check:
        verify(module)
    recognise(module, tensors)
    if check:
        verify(module)
    problems = classify(module, tensors)
    refused = {p.node for p in problems}
    problems += [p for p in make_incremental(module, tensors) if p.node not in refused]
    if problems:
        raise LoweringError(problems)
    if check:
        verify(module)
    Reroll().apply(context, module)
    verify(module)
