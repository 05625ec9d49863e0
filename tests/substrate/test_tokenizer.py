"""The piece tokenizer: joining is decoding, one text has one spelling, the JSON form is canonical."""

import random

import pytest

from megatron_evolve.substrate.puzzles.families import CUED_FAMILIES, FAMILIES, draw
from megatron_evolve.substrate.puzzles.row import completion_text, prompt_text
from megatron_evolve.substrate.tokenizer import PieceTokenizer, challenge_tokenizer, nano_tokenizer

TOKENIZERS = {"nano": nano_tokenizer, "challenge": challenge_tokenizer}


@pytest.mark.parametrize("difficulty", TOKENIZERS)
def test_rows_come_back_exactly(difficulty):
    tokenizer = TOKENIZERS[difficulty]()
    rng = random.Random(1)
    for i in range(2000):
        family = FAMILIES[i % len(FAMILIES)]
        row = draw(family, rng, difficulty=difficulty, cue_rate=0.5 if family in CUED_FAMILIES else 0.0)
        prompt = prompt_text(row)
        ids = tokenizer.encode(prompt)
        assert tokenizer.decode(ids) == prompt
        for style in row.traces:
            completion = completion_text(row, style)
            completion_ids = tokenizer.encode(completion)
            assert tokenizer.decode([*completion_ids, tokenizer.eos_id, tokenizer.pad_id]) == completion
            # The cut between prompt and completion is a cut between pieces, so training and decoding see the same ids.
            assert tokenizer.encode(prompt + completion) == ids + completion_ids


def test_vocabularies_have_their_sizes():
    assert (len(nano_tokenizer().pieces), nano_tokenizer().vocab_size) == (88, 96)
    assert (len(challenge_tokenizer().pieces), challenge_tokenizer().vocab_size) == (227, 240)
    assert (nano_tokenizer().pad_id, nano_tokenizer().eos_id) == (0, 1)


def test_every_nano_piece_is_used():
    tokenizer = nano_tokenizer()
    used = set()
    rng = random.Random(2)
    for i in range(6000):
        row = draw(FAMILIES[i % len(FAMILIES)], rng, difficulty="nano")
        for style in row.traces:
            used.update(tokenizer.encode(prompt_text(row) + completion_text(row, style)))
    assert used == set(range(2, 2 + len(tokenizer.pieces)))


@pytest.mark.parametrize(
    ("family", "difficulty", "prompt_max", "completion_max"),
    [
        ("numeral", "nano", 40, 28),
        ("cipher", "nano", 29, 7),
        ("numeral", "challenge", 60, 22),
        ("cipher", "challenge", 230, 8),
    ],
)
def test_lengths_stay_short(family, difficulty, prompt_max, completion_max):
    """The fixed text costs a few tokens: a lost phrase piece would show as dozens. Completion counts the end token."""
    tokenizer = TOKENIZERS[difficulty]()
    rng = random.Random(3)
    rows = [draw(family, rng, difficulty=difficulty) for _ in range(500)]
    assert max(len(tokenizer.encode(prompt_text(row))) for row in rows) <= prompt_max
    longest = max(len(tokenizer.encode(completion_text(row, style))) for row in rows for style in row.traces)
    assert longest + 1 <= completion_max


def test_longest_piece_wins_and_words_are_whole():
    tokenizer = PieceTokenizer(["ab", "abc", " in", *"abcdin "])
    texts = [tokenizer.decode([token]) for token in tokenizer.encode("abcd in ina")]
    assert texts == ["a", "b", "c", "d", " in", " ", "i", "n", "a"]
    tokenizer = PieceTokenizer(["00", "000", *"01"])
    assert [tokenizer.decode([token]) for token in tokenizer.encode("000010")] == ["000", "0", "1", "0"]


def test_json_form_is_canonical():
    for make in TOKENIZERS.values():
        tokenizer = make()
        again = PieceTokenizer.from_json(tokenizer.to_json())
        assert again == tokenizer
        assert again.to_json() == tokenizer.to_json()
        assert again.digest() == tokenizer.digest()
        assert tokenizer.to_json().isascii()
    assert nano_tokenizer() != challenge_tokenizer()
    assert nano_tokenizer().digest() != challenge_tokenizer().digest()


def test_reserved_ids_show_and_padding_does_not():
    tokenizer = PieceTokenizer(["a", "b"])
    assert tokenizer.vocab_size == 16
    assert tokenizer.decode([0, 2, 15, 3, 1, 2]) == "a<reserved-11>b"


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="got the character 'z'"):
        nano_tokenizer().encode("numeral\nz")
    with pytest.raises(ValueError, match="distinct and not empty"):
        PieceTokenizer(["a", "a"])
    with pytest.raises(ValueError, match="distinct and not empty"):
        PieceTokenizer(["a", ""])
    with pytest.raises(ValueError, match="must be"):
        PieceTokenizer.from_json('{"vocab": []}')
