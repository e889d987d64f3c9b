"""The small trained models that ship with Typebar, found by name without importing torch."""

import json
from dataclasses import dataclass
from pathlib import Path

from typebar.isa.errors import TypebarError

CARD = "card.json"


@dataclass(frozen=True)
class ShippedModel:
    """A Hugging Face checkpoint directory and what its card says about it."""

    name: str
    path: Path
    parameters: int
    description: str
    licence: str
    held_out_nats_per_byte: float
    """Cross-entropy on works the model never saw, in nats per byte of text."""


def shipped() -> list[ShippedModel]:
    """The shipped models, the largest first."""
    cards = [path for path in Path(__file__).parent.glob(f"*/{CARD}")]
    models = [_read(card) for card in cards]
    return sorted(models, key=lambda model: (-model.parameters, model.name))


def find(name: str) -> ShippedModel:
    """The shipped model called `name`.

    Raises TypebarError, naming the models there are, when there is none of that name.
    """
    models = shipped()
    for model in models:
        if model.name == name:
            return model
    known = ", ".join(model.name for model in models)
    raise TypebarError(f"no shipped model is called {name!r}; there are: {known}")


def _read(card: Path) -> ShippedModel:
    """The model whose card is the file `card`; the directory's name is the model's."""
    facts = json.loads(card.read_text(encoding="utf-8"))
    return ShippedModel(
        name=card.parent.name,
        path=card.parent,
        parameters=int(facts["parameters"]),
        description=str(facts["description"]),
        licence=str(facts["licence"]),
        held_out_nats_per_byte=float(facts["held_out_nats_per_byte"]),
    )
