"""The torch device: the image's own graph and weights, run in float32 by torch on a GPU or on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from typebar.compiler.interpreter import StepInterpreter
from typebar.compiler.packing import unpack_weights
from typebar.host.device import DeviceError
from typebar.host.engine import Engine, OnToken
from typebar.host.facts import image_facts
from typebar.isa.image import Image


class TorchEngine(Engine):
    """A model in torch float32, from an image alone; it is no register-level device."""

    kind = "torch"

    def __init__(self, image: Image, device: str) -> None:
        """Unpack the weights and move them to `device` (cpu or cuda).

        Raises:
            DeviceError: the GPU fails or has too little memory.
            TypebarError: the image's graph or weights are damaged.
        """
        self.name = f"torch float32 on {device}"
        lookup = unpack_weights(image)
        self._encoder = image_facts(image).encoder
        try:
            self.name = f"torch float32 on {'the CPU' if device == 'cpu' else torch.cuda.get_device_name()}"
            self._step = StepInterpreter(image.graph, lambda name: torch.from_numpy(lookup(name)), device=device)
        except RuntimeError as error:
            raise _failure(self.name, error) from error

    def encode(self, source: Sequence[int]) -> None:
        """Run the encoder over a source text."""
        if self._encoder is None:
            return super().encode(source)
        try:
            self._step.encode([int(token) for token in source])
        except RuntimeError as error:
            raise _failure(self.name, error) from error

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Feed `tokens` one at a time."""
        result: NDArray[np.float32] = self._feed(tokens).cpu().numpy()
        return result

    def greedy(self, tokens: Sequence[int], count: int, end: int | None, on_token: OnToken) -> None:
        """Feed, choose, and feed what was chosen."""
        fed: Sequence[int] = tokens
        for _ in range(count):
            token = int(np.argmax(self.logits(fed)))
            on_token(token)
            if token == end:
                return
            fed = [token]

    def _feed(self, tokens: Sequence[int]) -> torch.Tensor:
        try:
            for token in tokens:
                logits = self._step.step(int(token), self.position)
                self.position += 1
        except RuntimeError as error:
            raise _failure(self.name, error) from error
        return logits


def cuda_absent() -> str | None:
    """Why torch cannot use a GPU, or None if it can."""
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda is not None or torch.version.hip is not None
    return "torch sees no GPU" if built else "this build of torch has no CUDA support"


def _failure(name: str, error: RuntimeError) -> DeviceError:
    return DeviceError(f"{name} failed: {(str(error).splitlines() or [type(error).__name__])[0]}")
