"""allocate: give every value, and every operation's scratch space, a place in the register file by liveness.

Places start at a hazard segment where everything fits that way, so that unrelated values never wait for one
another. Where segments are too few, what is loaded for one operation shares them, then all that is loaded, and at last
places start at the register alignment. A loop's yielded value takes its argument's place where the argument is
dead by then, so the loop needs no copy. Blocks of a prompt's tokens have places of their own (`allocate_rows`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import SSAValue
from xdsl.passes import ModulePass

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.device_source import SourceOp
from typebar.compiler.passes.allocate_rows import allocate_rows
from typebar.compiler.passes.slots import WAYS, Slot, apart, collect, place, record
from typebar.compiler.scratch import Limits, scratch_of
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import FORMAT_BYTES, Format
from typebar.isa.machine import Machine


class AllocationError(TypebarError):
    """The register file is too small for the program."""


@dataclass(frozen=True)
class AllocatePass(ModulePass):
    """Allocate registers of `words` words in hazard segments of `segment` words.

    A prompt's tokens go through in groups of up to `vectors`; two groups at once where each has `group_rows` or more.
    With `ahead` a layer's first loads may run while the layer before ends, which a machine with barriers prevents.
    """

    name = "allocate"
    words: int = 131072
    segment: int = 2048
    attention_block: int = 1024
    column_block: int = 512
    vectors: int = 16
    group_rows: int = 2
    chains: bool = False
    macs: int = 2048
    lanes: int = 16
    buffer: int = 16384
    ahead: bool = True

    @classmethod
    def of(cls, machine: Machine) -> AllocatePass:
        """The pass for a machine."""
        matrix, vector = machine.matrix, machine.vector
        # The fewest vectors for which the matrix unit holds a 16-bit tile as long as it takes to fetch, a row a cycle.
        tile = matrix.columns * matrix.lanes * FORMAT_BYTES[Format.FP16]
        return cls(
            words=vector.words,
            segment=machine.segment_words,
            attention_block=machine.attention_block,
            column_block=machine.column_block,
            vectors=matrix.vectors,
            group_rows=-(-matrix.rows * tile // machine.row_bytes),
            chains=vector.chains,
            macs=machine.peak_macs,
            lanes=vector.lanes,
            buffer=machine.ring.buffer_words,
            ahead=not machine.control.barriers,
        )

    def limits(self, program: dev.ProgramOp | SourceOp, step: int) -> Limits:
        """What a program of this machine keeps to whose places start at multiples of `step` words."""
        align, context, devices = (int(a.value.data) for a in (program.align, program.context, program.devices))
        return Limits(
            words=self.words,
            align=align,
            step=step,
            attention_block=self.attention_block,
            column_block=self.column_block,
            context=context,
            devices=devices,
            vectors=self.vectors,
            chains=self.chains,
            macs=self.macs,
            lanes=self.lanes,
            buffer=self.buffer,
        )

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Set `at` and `scratch` everywhere, the head's `chunk` and the program's `step`.

        Raises:
            AllocationError: nothing fits, even with the smallest chunk of logits and the tightest packing.
        """
        for program in op.body.block.ops:
            if isinstance(program, dev.ProgramOp | SourceOp):
                self._program(program)

    def _program(self, program: dev.ProgramOp | SourceOp) -> None:
        align = int(program.align.value.data)
        head = program.body.block.last_op
        lowest = 0
        for chunk in _chunks(head.words, self.column_block) if isinstance(head, dev.HeadOp) else (0,):
            for step, together in (*((self.segment, made) for made in WAYS), (align, apart)):
                limits = self.limits(program, step)
                slots = _slots(program, limits, chunk, self.ahead)
                lowest = place(together(slots), limits.step_of)
                if lowest > self.words:
                    continue
                record(slots, "")
                program.step = ir.number(step)
                if isinstance(head, dev.HeadOp) and isinstance(program, dev.ProgramOp):
                    head.chunk = ir.number(chunk)
                    allocate_rows(program, replace(limits, step=self.segment), self.group_rows)
                return
        raise AllocationError(
            f"the program needs {lowest} words of registers and the machine has {self.words}: "
            "use a machine with a larger register file (vector.words) or more devices"
        )


def _slots(program: dev.ProgramOp | SourceOp, limits: Limits, chunk: int, ahead: bool) -> list[Slot]:
    """The slots of a step for one token, `chunk` logits at a time."""

    def words(value: SSAValue) -> int:
        return limits.round(ir.width(value))

    return collect(program.body.block.ops, words, lambda op: scratch_of(op, limits, chunk), ahead)


def _chunks(words: int, column_block: int) -> list[int]:
    """Numbers of logits to try at a time: all, then whole column blocks, halving."""
    sizes = [words]
    blocks = -(-words // column_block)
    while blocks > 1:
        blocks = -(-blocks // 2)
        sizes.append(min(words, blocks * column_block))
    return sizes
