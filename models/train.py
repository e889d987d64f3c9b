"""Train the shipped tokenizer and models on the corpus of `typebar.models.corpus`.

    python -m typebar.models.corpus DATA
    python -m typebar.models.train tokenizer --data DATA --out TOKENIZER
    python -m typebar.models.train folio --data DATA --tokenizer TOKENIZER --out OUT --minutes 100

Training runs on the CPU in bfloat16 autocast with float32 master weights. The learning rate follows a
warm-up and a cosine over wall-clock time, so a run always ends at its lowest rate however busy the
machine is; for the same reason two runs never see exactly the same number of steps. OUT always holds the
latest float16 checkpoint.
"""

import argparse
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from typebar.isa.errors import TypebarError
from typebar.models.corpus import Document, documents

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 256
SAMPLE_PROMPT = "KING HENRY:\n"


@dataclass(frozen=True)
class Recipe:
    """Shape and optimiser settings of one model; `batch` is in sequences of CONTEXT tokens."""

    width: int
    layers: int
    heads: int
    batch: int
    peak_rate: float
    dropout: float


RECIPES = {
    "folio": Recipe(width=256, layers=5, heads=4, batch=8, peak_rate=1.5e-3, dropout=0.1),
    "folio-draft": Recipe(width=64, layers=3, heads=2, batch=16, peak_rate=4e-3, dropout=0.0),
}


def train_tokenizer(texts: list[str], out: Path) -> None:
    """Learn a byte-level BPE of VOCABULARY entries and write it to `out` as a Hugging Face tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    ).save_pretrained(out)


def token_stream(tokenizer: PreTrainedTokenizerFast, found: list[Document]) -> torch.Tensor:
    """All documents as one int64 vector, an end-of-text token before each and after the last."""
    end = tokenizer.eos_token_id
    stream = [end]
    for tokens in tokenizer([document.text for document in found], verbose=False)["input_ids"]:
        stream += [*tokens, end]
    return torch.tensor(stream)


def build(recipe: Recipe) -> GPT2LMHeadModel:
    """A freshly initialised GPT-2 of the recipe's shape, tied head, end of text as its only special token."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        resid_pdrop=recipe.dropout,
        embd_pdrop=recipe.dropout,
        attn_pdrop=0.0,  # anything else rules out the fused attention kernel
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def loss_of(model: GPT2LMHeadModel, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token; `windows` is [sequences, length + 1] of token ids."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(windows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def held_out_loss(model: GPT2LMHeadModel, stream: torch.Tensor) -> float:
    """Nats per token over disjoint windows of `stream`: a quick estimate, `evaluate` measures exactly."""
    model.eval()
    windows = stream[: (len(stream) - 1) // CONTEXT * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)
    with torch.no_grad():
        losses = [loss_of(model, part) * len(part) for part in windows.split(8)]
    model.train()
    return float(sum(losses)) / len(windows)


def sample(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> str:
    """SAMPLE_PROMPT and some eighty sampled tokens, for the log."""
    model.eval()
    prompt = tokenizer(SAMPLE_PROMPT, return_tensors="pt")
    length = min(CONTEXT, 88)
    tokens = model.generate(**prompt, max_length=length, do_sample=True, temperature=0.8, pad_token_id=0)
    model.train()
    return str(tokenizer.decode(tokens[0]))


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a float16 checkpoint directory beside `out`, then put it in place of `out`."""
    partial, previous = out.with_name(out.name + ".partial"), out.with_name(out.name + ".previous")
    shutil.rmtree(partial, ignore_errors=True)
    half = GPT2LMHeadModel(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "model.safetensors").chmod(0o644)  # written readable by its owner alone
    shutil.rmtree(previous, ignore_errors=True)
    if out.exists():
        out.rename(previous)
    partial.rename(out)
    shutil.rmtree(previous, ignore_errors=True)


class Windows:
    """Batches of disjoint windows in random order, cut at another offset every epoch."""

    def __init__(self, stream: torch.Tensor, batch: int) -> None:
        """Cut `stream`, one vector of token ids, into batches of `batch` windows."""
        self.stream, self.batch = stream, batch
        self.left = torch.empty(0, dtype=torch.int64)
        self.epochs = 0

    def next(self) -> torch.Tensor:
        """The next [batch, CONTEXT + 1] token ids."""
        if len(self.left) < self.batch:
            first = int(torch.randint(CONTEXT, ()))
            starts = torch.arange(first, len(self.stream) - CONTEXT - 1, CONTEXT)
            self.left = starts[torch.randperm(len(starts))]
            self.epochs += 1
        starts, self.left = self.left[: self.batch], self.left[self.batch :]
        return self.stream[starts[:, None] + torch.arange(CONTEXT + 1)]


def optimiser(model: GPT2LMHeadModel, rate: float) -> torch.optim.Optimizer:
    """AdamW; matrices decay, biases and norms do not."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)


def rate_at(step: int, done: float, peak: float) -> float:
    """Learning rate: 200 steps of linear warm-up times a cosine from `peak` to 2 % of it, `done` in 0..1."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return peak * cosine * min(1.0, (step + 1) / 200)


def train(name: str, data: Path, tokenizer_path: Path, out: Path, minutes: float) -> None:
    """Train model `name` for `minutes` of wall-clock time, saving and reporting every few of them."""
    recipe = RECIPES[name]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    found = documents(data)
    kept = [document for document in found if document.held_out]
    held_out = token_stream(tokenizer, kept)
    windows = Windows(token_stream(tokenizer, [d for d in found if not d.held_out]), recipe.batch)
    tokens_per_byte = (len(held_out) - 1) / sum(len(document.text.encode()) for document in kept)
    model = build(recipe)
    for block in model.transformer.h:
        block.mlp.act = torch.nn.GELU("tanh")  # the config's gelu_new, in one kernel
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{name}: {parameters:,} parameters, {len(windows.stream):,} tokens an epoch", flush=True)
    adam = optimiser(model, recipe.peak_rate)
    begin, report_every = time.monotonic(), min(300.0, minutes * 60 / 4)
    step, next_report, recent = 0, report_every, 0.0
    model.train()
    while True:
        elapsed = time.monotonic() - begin
        finished = elapsed >= minutes * 60
        if finished or elapsed >= next_report:
            save(model, tokenizer, out)
            kept_loss = held_out_loss(model, held_out)
            print(
                f"{elapsed / 60:.1f} min, step {step}, epoch {windows.epochs}, "
                f"training {recent:.3f} nats/token, "
                f"held out {kept_loss:.3f} nats/token = {kept_loss * tokens_per_byte:.4f} nats/byte\n"
                f"{sample(model, tokenizer)}\n----",
                flush=True,
            )
            next_report += report_every
        if finished:
            return
        for group in adam.param_groups:
            group["lr"] = rate_at(step, elapsed / (minutes * 60), recipe.peak_rate)
        loss = loss_of(model, windows.next())
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        recent = loss.item() if step == 0 else 0.98 * recent + 0.02 * loss.item()
        step += 1


def main() -> None:
    """Command line: train the tokenizer or one of the models."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("what", choices=["tokenizer", *RECIPES])
    parser.add_argument("--data", type=Path, required=True, help="the fetched corpus")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--tokenizer", type=Path, help="trained tokenizer (for models)")
    parser.add_argument("--minutes", type=float, default=100.0, help="wall-clock time to train for")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if options.what == "tokenizer":
        texts = [document.text for document in documents(options.data) if not document.held_out]
        train_tokenizer(texts, options.out)
    elif options.tokenizer is None:
        raise TypebarError("a model needs a trained tokenizer: give --tokenizer DIR")
    else:
        train(options.what, options.data, options.tokenizer, options.out, options.minutes)


if __name__ == "__main__":
    main()
