"""Tokenizers of real checkpoints: files that transformers and this package read alike."""

import json
import random
from pathlib import Path

import pytest

from megatron_evolve.substrate.checkpoint_tokenizer import CheckpointTokenizer, exported, read_tokenizer
from megatron_evolve.substrate.puzzles import families
from megatron_evolve.substrate.puzzles.row import completion_text, prompt_text
from megatron_evolve.substrate.tokenizer import challenge_tokenizer, nano_tokenizer


def texts_of(difficulty: str) -> list[str]:
    """Prompts and completions of every family and style."""
    rng = random.Random(1)
    rows = [families.draw(family, rng, difficulty=difficulty) for family in families.FAMILIES for _ in range(6)]
    return [prompt_text(row) for row in rows] + [completion_text(row, style) for row in rows for style in row.traces]


def write(folder: Path, documents: dict) -> Path:
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(("difficulty", "pieces"), [("nano", nano_tokenizer()), ("challenge", challenge_tokenizer())])
def test_the_pieces_as_a_fast_tokenizer_are_the_same_tokens(difficulty, pieces, tmp_path):
    from transformers import AutoTokenizer

    write(tmp_path, exported(pieces))
    fast, theirs = CheckpointTokenizer.read(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (fast.vocab_size, fast.eos_id, fast.pad_id) == (pieces.vocab_size, pieces.eos_id, pieces.pad_id)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (pieces.eos_id, pieces.pad_id)
    for text in texts_of(difficulty):
        ids = pieces.encode(text)
        assert fast.encode(text) == theirs(text)["input_ids"] == ids
        assert fast.decode([*ids, pieces.eos_id, *ids]) == theirs.decode(ids) == text
        asked = theirs.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        assert asked == text


@pytest.mark.parametrize("pieces", [nano_tokenizer(), challenge_tokenizer()], ids=["nano", "challenge"])
def test_any_text_of_the_pieces_is_cut_alike_even_one_that_looks_special(pieces, tmp_path):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(write(tmp_path, exported(pieces)))
    rng = random.Random(5)
    single = [piece for piece in pieces.pieces if len(piece) == 1]
    for case in range(1000):
        text = "".join(rng.choice(pieces.pieces if case % 2 else single) for _ in range(rng.randint(1, 120)))
        assert theirs(text)["input_ids"] == pieces.encode(text)
        ids = [rng.randrange(2, pieces.vocab_size) for _ in range(60)]
        assert theirs.decode(ids) == pieces.decode(ids)
    if set("<eos>pad") <= set(single):
        assert theirs("say <eos> or <pad>")["input_ids"] == pieces.encode("say <eos> or <pad>")


def test_a_text_outside_the_pieces_is_an_error_there_too(tmp_path):
    fast = CheckpointTokenizer.read(write(tmp_path, exported(nano_tokenizer())))
    with pytest.raises(Exception, match="UNK"):
        fast.encode("ü")


def test_either_kind_is_opened_by_what_it_is(tmp_path):
    pieces = nano_tokenizer()
    (tmp_path / "tokenizer.json").write_text(pieces.to_json())
    assert read_tokenizer(tmp_path) == pieces
    assert isinstance(read_tokenizer(write(tmp_path, exported(pieces))), CheckpointTokenizer)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="it is missing"):
        read_tokenizer(tmp_path)


def test_a_token_may_be_an_object_and_padding_may_be_absent(tmp_path):
    documents = exported(nano_tokenizer())
    documents["tokenizer_config.json"] = {"eos_token": {"content": "<eos>"}}
    fast = CheckpointTokenizer.read(write(tmp_path, documents))
    assert fast.eos_id == fast.pad_id == nano_tokenizer().eos_id


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ([], "expected a JSON object; got a list"),
        ({"eos_token": 5}, "expected eos_token as a text; got 5"),
        ({"eos_token": "<eos>", "pad_token": {"content": 1}}, "expected pad_token as a text; got 1"),
    ],
)
def test_damaged_settings_are_told_with_their_file(settings, sentence, tmp_path):
    write(tmp_path, exported(nano_tokenizer()) | {"tokenizer_config.json": settings})
    with pytest.raises(ValueError, match=f"tokenizer_config.json: {sentence}: copy it again"):
        CheckpointTokenizer.read(tmp_path)
