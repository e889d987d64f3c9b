"""Measure a checkpoint's held-out loss per byte, and write it down on the model's card.

    python -m typebar.models.evaluate CHECKPOINT --data DATA [--card "what the model is"]

Loss is the cross-entropy of the float16 weights run in float32, summed over every token of every held-out
document and of the end-of-text token after each, divided by the documents' UTF-8 bytes. A document starts
from an end-of-text token; long ones are read in windows of the model's context that overlap by half, each
token scored once, with at least half a context before it (as much as there is at a document's start).
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoTokenizer, GPT2LMHeadModel

from typebar.models import CARD
from typebar.models.corpus import Document, documents

LICENCE = "Apache-2.0 (weights); trained on public-domain texts"


@dataclass(frozen=True)
class HeldOutLoss:
    """Totals over the held-out documents; `nats` is the summed cross-entropy."""

    nats: float
    tokens: int
    bytes: int

    @property
    def nats_per_byte(self) -> float:
        """The loss that does not depend on the tokenizer."""
        return self.nats / self.bytes


def document_nats(model: GPT2LMHeadModel, tokens: torch.Tensor) -> float:
    """Summed cross-entropy in nats of `tokens[1:]` ([length] ids) given what precedes each."""
    context = int(model.config.n_positions)
    total, scored = 0.0, 1
    while scored < len(tokens):
        begin = max(0, scored - context // 2) if len(tokens) > context + 1 else 0
        window = tokens[begin : begin + context + 1]
        with torch.inference_mode():
            logits = model(window[None, :-1], use_cache=False).logits[0]
        first = scored - begin - 1
        total += functional.cross_entropy(logits[first:], window[1 + first :], reduction="sum").item()
        scored = begin + len(window)
    return total


def held_out_loss(checkpoint: Path, found: list[Document], limit: int | None = None) -> HeldOutLoss:
    """The loss of `checkpoint` on the held-out documents among `found`, or the first `limit` of them."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = GPT2LMHeadModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    end = tokenizer.eos_token_id
    nats, tokens, size = 0.0, 0, 0
    for document in [document for document in found if document.held_out][:limit]:
        encoded = tokenizer(document.text, verbose=False)["input_ids"]
        nats += document_nats(model, torch.tensor([end, *encoded, end]))
        tokens += len(encoded) + 1
        size += len(document.text.encode())
    return HeldOutLoss(nats, tokens, size)


def write_card(checkpoint: Path, description: str, loss: HeldOutLoss) -> None:
    """Write the card that `typebar.models.shipped` reads into `checkpoint`."""
    model = GPT2LMHeadModel.from_pretrained(checkpoint)
    facts = {
        "description": description,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "licence": LICENCE,
        "held_out_nats_per_byte": round(loss.nats_per_byte, 4),
        "held_out_bytes": loss.bytes,
        "held_out_tokens": loss.tokens,
    }
    (checkpoint / CARD).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line: measure one checkpoint."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the fetched corpus")
    parser.add_argument("--card", metavar="DESCRIPTION", help="also write the model's card")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loss = held_out_loss(options.checkpoint, documents(options.data))
    print(
        f"{loss.nats_per_byte:.4f} nats/byte, {loss.nats / loss.tokens:.4f} nats/token "
        f"({loss.tokens:,} tokens, {loss.bytes:,} bytes held out)"
    )
    if options.card:
        write_card(options.checkpoint, options.card, loss)


if __name__ == "__main__":
    main()
