"""Numeral rows: Roman numerals recomputed the other way round, by reading them."""

import random

import pytest

from megatron_evolve.substrate.puzzles import numeral
from megatron_evolve.substrate.puzzles.families import draw

LETTERS = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}


def read_roman(text: str) -> int:
    """A numeral's value: a letter before a larger one counts against it."""
    values = [LETTERS[letter] for letter in text]
    return sum(-v if v < max(values[i:]) else v for i, v in enumerate(values))


def test_every_numeral_reads_back_and_is_canonical():
    numerals = [numeral.roman(n) for n in range(1, 400)]
    assert [read_roman(text) for text in numerals] == list(range(1, 400))
    for bad in ("IIII", "VV", "XXXX", "LL", "CCCC", "VX", "IL", "IC"):
        assert not any(bad in text for text in numerals)


@pytest.mark.parametrize("difficulty", ["nano", "challenge"])
def test_answer_and_trace_follow_from_the_number(difficulty):
    rng = random.Random(1)
    for _ in range(300):
        row = draw("numeral", rng, difficulty=difficulty)
        assert read_roman(row.answer) == row.rule["n"]
        assert f" {row.rule['n']}" in row.prompt.splitlines()[-1]
        assert row.traces["short-trace"].replace(",", "") == row.answer
        examples = [line.split(" -> ") for line in row.prompt.splitlines() if " -> " in line]
        assert all(read_roman(right) == int(left) for left, right in examples)
        assert len(examples) == 2 if difficulty == "nano" else 3 <= len(examples) <= 5


def test_ranges_are_reached():
    rng = random.Random(2)
    challenge = {draw("numeral", rng, difficulty="challenge").rule["n"] for _ in range(2000)}
    assert challenge == set(range(1, 101))
    nano = {draw("numeral", rng, difficulty="nano").rule["n"] for _ in range(6000)}
    assert nano == set(range(1, 400))


def test_a_cue_is_refused():
    with pytest.raises(ValueError, match=r"cue_rate of numeral must be 0, got 0\.5"):
        draw("numeral", random.Random(0), difficulty="nano", cue_rate=0.5)
