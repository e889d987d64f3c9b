"""Runs an image on any `Device`: places it in memory, writes descriptors, launches, reads tokens and logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from typebar.compiler.emit.head import DESCRIPTOR_WORDS, STORE_LOGITS
from typebar.host.device import Bytes, Device
from typebar.host.engine import Engine, OnToken
from typebar.host.facts import image_facts
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image
from typebar.isa.image_plan import PACKED_REGIONS
from typebar.isa.instructions import Region
from typebar.isa.machine import LINE_BYTES
from typebar.isa.numerics import NumericFlag
from typebar.isa.registers import Register

_FLAG_TEXT = {
    NumericFlag.OPERAND_OVERFLOW: "an operand of the matrix unit overflowed",
    NumericFlag.STORE_SATURATED: "a value stored to memory saturated",
    NumericFlag.ARGMAX_NAN: "a logit was NaN",
}
_WORD = 4


class DeviceEngine(Engine):
    """An image's program on a ring of devices, driven through their memory and registers."""

    def __init__(self, image: Image, device: Device, kind: str) -> None:
        """Load program and weights; KV and IO start as zeros.

        Raises:
            TypebarError: the image is for another number of devices.
            DeviceError: the device fails.
        """
        manifest = image.manifest
        if device.ranks != manifest.devices:
            raise TypebarError(f"the image is for {manifest.devices} devices and {device.name} has {device.ranks}")
        self.kind, self.name = kind, device.name
        facts = image_facts(image)
        self._device, self._io, self._entry, self._vocab = device, facts.io, facts.entry, facts.vocab
        self._encoder = facts.encoder
        self._source, self._encoded = 0, False
        self._flags: dict[NumericFlag, str] = {}
        device.load(image.program)
        for rank in range(device.ranks):
            for region in Region:
                if region in PACKED_REGIONS:
                    contents = image.region(rank, region)
                    device.allocate(rank, region, contents.size, contents)
                else:
                    device.allocate(rank, region, manifest.regions[region])

    def reset(self) -> None:
        """Forget every token; the cache needs no clearing, for positions not yet written are never read."""
        super().reset()
        self._source, self._encoded = 0, False
        self._device.reset()

    def encode(self, source: Sequence[int]) -> None:
        """Write the source text; the next launch begins with it, and later ones find its K and V in memory."""
        if self._encoder is None:
            return super().encode(source)
        given, place = _bytes(np.asarray(source, "<i4")), self._io.source_line * LINE_BYTES
        for rank in range(self._device.ranks):
            self._device.write(rank, Region.IO, place, given)
        self._source, self._encoded = len(source), False

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Feed `tokens` in one launch and read every rank's part of the last step's logits."""
        self._start(tokens, 1, None, STORE_LOGITS)
        self._device.wait()
        self._finish(len(tokens))
        return self._read_logits()

    def greedy(self, tokens: Sequence[int], count: int, end: int | None, on_token: OnToken) -> None:
        """Generate in one launch; the device chooses the tokens, the host only watches them arrive."""
        first, seen = self.position + len(tokens), 0

        def poll() -> None:
            nonlocal seen
            ready = self._words(0, self._io.descriptor_line, DESCRIPTOR_WORDS["generated"], 1)[0]
            if seen < ready <= count:
                fresh = self._words(0, self._io.tokens_line, first + seen, ready - seen)
                for token in fresh:
                    seen += 1
                    on_token(int(token))

        self._start(tokens, count, end, 0)
        self._device.wait(poll)
        poll()
        self._finish(len(tokens) + seen - 1)

    def flags(self) -> list[str]:
        """Numeric flags with the first instruction that raised each."""
        return [self._flags[flag] for flag in sorted(self._flags)]

    def _start(self, tokens: Sequence[int], count: int, end: int | None, flags: int) -> None:
        if self._encoder is not None and not self._source:
            raise TypebarError("the model has an encoder and no source text yet: call encode first")
        values = {
            "start": self.position,
            "count": len(tokens),
            "new": count,
            "eos": -1 if end is None else end,
            "flags": flags,
            "source": self._source,
            "generated": 0,
            "encoded": 0,
        }
        descriptor = np.zeros(max(DESCRIPTOR_WORDS.values()) + 1, "<i4")
        for name, value in values.items():
            descriptor[DESCRIPTOR_WORDS[name]] = value
        given = _bytes(np.asarray(tokens, "<i4"))
        place = self._io.tokens_line * LINE_BYTES + self.position * _WORD
        for rank in range(self._device.ranks):
            self._device.write(rank, Region.IO, place, given)
            self._device.write(rank, Region.IO, self._io.descriptor_line * LINE_BYTES, _bytes(descriptor))
        fresh = self._encoder is not None and not self._encoded
        self._device.launch(self._encoder.entry if fresh and self._encoder is not None else self._entry)

    def _finish(self, fed: int) -> None:
        self.position += fed
        self._encoded = self._source > 0
        for rank in range(self._device.ranks):
            raised = self._device.register(rank, Register.FLAGS)
            for flag in NumericFlag:
                if flag & raised and flag not in self._flags:
                    pc = self._device.register(rank, Register.FLAG_PC + int(flag).bit_length() - 1)
                    self._flags[flag] = f"{_FLAG_TEXT[flag]} (instruction {pc} of device {rank})"

    def _read_logits(self) -> NDArray[np.float32]:
        each = self._io.logits_per_device
        parts = [self._words(rank, self._io.logits_line, 0, each) for rank in range(self._device.ranks)]
        return np.concatenate(parts).view(np.float32)[: self._vocab]

    def _words(self, rank: int, line: int, first: int, count: int) -> NDArray[np.int32]:
        """Words of a rank's IO region from word `first` after a line on."""
        data = self._device.read(rank, Region.IO, line * LINE_BYTES + first * _WORD, int(count) * _WORD)
        return data.view("<i4").astype(np.int32, copy=False)


def _bytes(words: NDArray[np.int32]) -> Bytes:
    return np.ascontiguousarray(words).view(np.uint8)
