"""Typebar in Python: `compile` a model to an image, `load` it and generate, `simulate` its time.

>>> typebar.compile("folio", "folio.safetensors", devices=4)
>>> print(typebar.load("folio.safetensors").generate("It was", max_new_tokens=32).text)
>>> print(typebar.simulate("gpt2-xl", devices=4).to_json()["decode"])
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from typebar.host import generation
from typebar.host.caching import Caching, Text
from typebar.host.chat import Messages, chat_prompt
from typebar.host.engine import Engine
from typebar.host.facts import image_facts
from typebar.host.page import report
from typebar.host.planning import Planning
from typebar.host.report import SimulationReport, simulate
from typebar.host.sampling import Sampler, SamplingSettings, as_integer
from typebar.host.select import Candidate, candidates
from typebar.host.streamer import Listener, Streamer
from typebar.host.tokenizer import TextStream, TextTokenizer
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image, Manifest
from typebar.isa.machine import Machine

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CompiledImage(os.PathLike[str]):
    """An image that `compile` wrote; usable wherever a path is."""

    path: Path
    manifest: Manifest = field(repr=False)

    def __fspath__(self) -> str:
        """The path of the file."""
        return str(self.path)


def compile(
    model: str | os.PathLike[str] | torch.nn.Module,
    out: str | os.PathLike[str],
    machine: str | os.PathLike[str] | Machine = "u280",
    devices: int = 4,
    weights: str = "fp16",
    progress: Callable[[int, int], None] | None = None,
    config: Mapping[str, Any] | None = None,
    tokenizer_json: bytes | str | None = None,
    plan: str | None = None,
    split: str | None = None,
    phase: str | None = None,
    kv: str | None = None,
    calibrate: Text | None = None,
) -> CompiledImage:
    """Compile a model for a ring of devices and write the image; the file appears complete or not at all.

    Args:
        model: a checkpoint directory, an .onnx or .gguf file, a directory with encoder.onnx and decoder.onnx, a shipped
            or installed model's name, or a module from token ids [1, T] to logits [1, T, V].
        out: the image to create or replace; not one of the model's own files.
        machine: a shipped machine's name, a .toml file, or a machine.
        devices: devices on the ring, 1 to 64.
        weights: format of weights, K and V in memory, fp16 or bf16; or int8, with a float32 scale for each column of
            a matrix, and embeddings, K and V in fp16.
        progress: called with bytes written and in total.
        config: what the model does not say: context, source_context, eos_token_id (one, several, or -1 for none),
            decoder_start_token_id, name.
        tokenizer_json: contents of a tokenizer.json, for modules; a directory brings its own.
        plan: how matrices go to the devices: by `columns` and heads; as an analytical `model` finds fastest; or, of the
            model's best plans, as the timing simulator does (`simulate`). Default: columns, or the model if `split` or
            `phase` is given.
        split: what plans may do: `exact` (default) keeps the order of all additions, so that no plan changes a bit, nor
            does the number of devices; `fastest` may also split rows, whose partial sums are added in order of ranks.
        phase: what plans are fast for: `decode` (default) or `prefill`. An image has one plan for both.
        kv: format of K and V, if not that of embeddings: int8, with a scale for each channel.
        calibrate: for int8 K and V, a file of text like what the image is to run, or token ids of texts (each no longer
            than the context): torch runs the model over it, token by token, to find the scales. A few thousand will do.

    Raises:
        TypebarError: in one line, for anything that the caller can mend.
    """
    from typebar.compiler import driver
    from typebar.compiler.frontend import load_model

    target = machine if isinstance(machine, Machine) else Machine.load(os.fspath(machine))
    fmt = driver.weights_format(weights)
    driver.check_devices(devices)
    planning, caching = Planning(plan, split, phase), Caching(kv, calibrate)
    path = Path(out)
    given, config = model_source(model, config)
    if isinstance(given, Path):
        _check_output(path, given)
    source = load_model(given, config)
    if isinstance(tokenizer_json, str):
        tokenizer_json = tokenizer_json.encode("utf-8", "surrogatepass")  # the tokenizer then refuses what is not UTF-8
    if tokenizer_json is not None:
        source = replace(source, tokenizer_json=tokenizer_json)
    if source.tokenizer_json is not None:
        TextTokenizer(source.tokenizer_json)
    source = caching.of(source)
    made = driver.build(source, target, devices, fmt, planning.plan(source, target, devices, fmt))
    return CompiledImage(path, driver.write(made, path, progress))


def model_source(
    model: str | os.PathLike[str] | torch.nn.Module, config: Mapping[str, Any] | None
) -> tuple[Path | torch.nn.Module, Mapping[str, Any] | None]:
    """What the frontend loads for what a user calls a model: a path, also of a model by name, or the module itself.

    The configuration comes back with the facts that the files of a model by name do not tell.

    Raises:
        TypebarError: there is no such model, or it is not installed.
    """
    if not isinstance(model, str | os.PathLike):
        return model, config
    from typebar.compiler.frontend import SHAPES, no_model
    from typebar.models import find, shipped
    from typebar.models.real import find_real, real_models

    name = os.fspath(model)
    if Path(name).exists():
        return Path(name), config
    if name in SHAPES:
        raise TypebarError(f"{name!r} is a shape without weights: simulate it, or compile a checkpoint directory")
    if any(known.name == name for known in shipped()):
        return find(name).path, config
    if any(known.name == name for known in real_models()):
        real = find_real(name)
        return real.path(), {**real.facts, **(config or {})}
    names = [*(known.name for known in shipped()), *(known.name for known in real_models())]
    raise TypebarError(no_model(name, names))


def _check_output(out: Path, source: Path) -> None:
    """Refuse to replace a model's own file; an image made earlier may lie beside them and be replaced."""
    try:
        files = [source] if source.is_file() else source.iterdir()
        if not any(file.is_file() and file.samefile(out) for file in files):
            return
    except (OSError, ValueError):  # there is no such output yet, or reading or writing will say what is wrong
        return
    try:
        Image.open(out, verify=False).close()
    except TypebarError:
        raise TypebarError(f"{str(out)!r} is a file of the model itself: give the image another name") from None


@dataclass(frozen=True)
class Generation:
    """What `TextModel.generate` made.

    Attributes:
        text: the new text, without the prompt; None if the image has no tokenizer.
        tokens: the new token ids, with the one that ended the text if one did.
        prompt_tokens: the prompt's token ids; with an encoder, the source text's.
        device: `sim`, `rtl` or `torch`: what finished the work.
        device_name: the same in words.
        reasons: why devices were passed over or given up, in order.
        finish_reason: `stop` after the end-of-text token, `length` after max_new_tokens.
        flags: numeric conditions that the device reported, each with its place.
        seed: seed of the sampling, also where none was given; None for greedy decoding.
    """

    text: str | None
    tokens: list[int]
    prompt_tokens: list[int]
    device: str
    device_name: str
    reasons: list[str]
    finish_reason: str
    flags: list[str] = field(default_factory=list)
    seed: int | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)


class TextModel:
    """An open image with something that runs it; also a context manager that closes the image."""

    def __init__(self, image: Image, chain: Sequence[Candidate], reasons: Sequence[str]) -> None:
        """Not for callers: use `load`."""
        self.image = image
        self._facts = image_facts(image)
        self._tokenizer = TextTokenizer(image.tokenizer) if image.tokenizer else None
        self._chain = generation.Chain(image, chain, reasons)

    @property
    def tokenizer(self) -> TextTokenizer:
        """The image's tokenizer.

        Raises:
            TypebarError: it has none.
        """
        if self._tokenizer is None:
            raise TypebarError("the image has no tokenizer: give input_ids, or compile with a tokenizer.json")
        return self._tokenizer

    @property
    def reasons(self) -> list[str]:
        """Why devices were passed over or given up so far."""
        return list(self._chain.reasons)

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        input_ids: Sequence[int] | None = None,
        max_new_tokens: int = 64,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        streamer: Streamer | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> Generation:
        """Continue a prompt, in Hugging Face's vocabulary; with an encoder the prompt is the source text.

        Args:
            prompt: text; or give `messages` or `input_ids`.
            messages: a conversation, each message with role and content, for the image's chat template.
            input_ids: token ids [T].
            max_new_tokens: tokens to generate at most; with the prompt they must fit the model's context.
            do_sample: draw tokens at random; otherwise each is the most likely one (greedy decoding).
            temperature: divides the logits before drawing.
            top_k: draw among the k most likely tokens; None for all.
            top_p: draw among the fewest tokens whose probabilities reach it; None for all.
            seed: equal seeds give equal tokens on devices of equal numerics; None for a fresh one.
            streamer: called with each piece of text as it becomes certain; or a streamer of Hugging Face's, fed tokens.
            eos_token_id: token or tokens that end the text; None for the model's own, -1 for none.

        Raises:
            TypebarError: input that breaks a rule.
            DeviceError: every device failed.
        """
        settings = SamplingSettings(temperature, top_k, top_p, seed)
        if not do_sample and settings != SamplingSettings(seed=seed):
            raise TypebarError("temperature, top_k and top_p act only when sampling: give do_sample, or leave them out")
        given, listener = self._prompt(prompt, messages, input_ids), Listener(streamer)
        encoder, source = self._facts.encoder, None
        if encoder is not None:
            given, source = [encoder.start], given
        count = generation.check_length(self._facts.context, len(given), max_new_tokens)
        sampler = Sampler(settings) if do_sample else None
        request = generation.Request(given, count, self._ends(eos_token_id), sampler, source)
        text = self._run(request, listener)
        engine = self._chain.engine()
        return Generation(
            text=text,
            tokens=request.tokens,
            prompt_tokens=given if source is None else source,
            device=engine.kind,
            device_name=engine.name,
            reasons=self.reasons,
            finish_reason="stop" if request.tokens[-1] in request.ends else "length",
            flags=engine.flags(),
            seed=None if sampler is None else sampler.seed,
        )

    def logits(self, tokens: Sequence[int], source: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Logits [T, vocab] after each of `tokens` [T], fed one after another (teacher-forced).

        With an encoder `source` [S] are the source text's token ids, and `tokens` the decoder's, from its start on.

        Raises:
            TypebarError: no tokens, more than the context, or one outside the vocabulary; a source text missing, or
                given to a model without an encoder.
            DeviceError: every device failed.
        """
        given, encoder = generation.check_tokens(self._facts, tokens), self._facts.encoder
        if (source is None) != (encoder is None):
            raise TypebarError(
                "the model has no encoder: give tokens only" if encoder is None else
                "the model has an encoder: give a source text besides the decoder's tokens"
            )  # fmt: skip
        text = None if source is None or encoder is None else generation.check_tokens(encoder, source)
        rows = np.empty((len(given), self._facts.vocab), np.float32)
        done = 0

        def work(engine: Engine) -> None:
            nonlocal done
            if text is not None:
                engine.encode(text)
            for done, token in enumerate(given):
                rows[done] = engine.logits([token])

        self._chain.attempt(work, lambda: generation.count_of(done, "token"))
        return rows

    def close(self) -> None:
        """Let go of the image's file."""
        self.image.close()

    def __enter__(self) -> TextModel:
        """The model itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    @property
    def has_encoder(self) -> bool:
        """Whether the prompt is a source text, which the new text does not continue."""
        return self._facts.encoder is not None

    def chat_prompt(self, messages: Messages) -> str:
        """The text that the image's chat template makes of a conversation, up to where the answer begins.

        Raises:
            TypebarError: the image has no template, or it refuses the messages.
        """
        return chat_prompt(self._facts, messages)

    def _prompt(self, prompt: str | None, messages: Messages | None, input_ids: Sequence[int] | None) -> list[int]:
        facts = self._facts.encoder or self._facts
        if sum(item is not None for item in (prompt, messages, input_ids)) != 1:
            raise TypebarError("give exactly one of prompt (text), messages (a chat) and input_ids (token ids)")
        if input_ids is not None:
            return generation.check_tokens(facts, input_ids)
        if messages is not None:
            return generation.check_tokens(facts, self.tokenizer.encode(self.chat_prompt(messages), special=False))
        if not isinstance(prompt, str):
            raise TypebarError(f"the prompt must be text, not {type(prompt).__name__}: give token ids as input_ids")
        return generation.check_tokens(facts, self.tokenizer.encode(prompt))

    def _ends(self, token: int | Sequence[int] | None) -> tuple[int, ...]:
        """The tokens that end the text, each once, in order."""
        if token is None:
            return self._facts.ends
        given: Sequence[Any] = token if isinstance(token, Sequence) else [token]
        found = [self._end(item) for item in given]
        return tuple(dict.fromkeys(item for item in found if item is not None))

    def _end(self, token: object) -> int | None:
        plain = as_integer(token)
        if plain is None or not -1 <= plain < self._facts.vocab:
            raise TypebarError(f"eos_token_id must be from 0 to {self._facts.vocab - 1}, or -1 for none, not {token!r}")
        return None if plain == -1 else plain

    def _run(self, request: generation.Request, listener: Listener) -> str | None:
        """Generate, streaming; returns the text."""
        shown = request.prompt if request.source is None else ()
        wanted = self._tokenizer is not None or listener.text is not None
        stream, pieces = TextStream(self.tokenizer, shown) if wanted else None, []

        def show(piece: str) -> None:
            if piece:
                pieces.append(piece)
                if listener.text is not None:
                    listener.text(piece)

        def take(token: int) -> None:
            listener.token(token)
            if stream is not None:
                show(stream.put(token))

        listener.prompt(request.prompt)
        generation.run(self._chain, request, take)
        if stream is not None:
            show(stream.end())
        listener.end()
        return None if stream is None else "".join(pieces)


def load(path: str | os.PathLike[str], device: str | Sequence[str | Candidate] = "auto") -> TextModel:
    """Open an image, check it, and make ready what will run it.

    Args:
        path: the image.
        device: `auto` (hardware, else torch on a GPU, else on the CPU), `sim` (the functional simulator; torch carries
            on if it fails), `rtl` (the hardware's source, compiled and simulated cycle by cycle), `torch` (a GPU, else
            the CPU), or a sequence of the last three, each carrying on for the one before.

    Raises:
        TypebarError: no such device, or anything wrong with the image.
        DeviceError: no device works.
    """
    chain, reasons = candidates(device)
    image = Image.open(Path(path))
    try:
        return TextModel(image, chain, reasons)
    except BaseException:
        image.close()
        raise


__all__ = [
    "CompiledImage",
    "Generation",
    "SimulationReport",
    "TextModel",
    "compile",
    "load",
    "model_source",
    "report",
    "simulate",
]
