"""The registry: names, determinism, parsing, and the published rows where they are at hand."""

import csv
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_evolve.substrate.puzzles.families import FAMILIES, FRAMES, draw, instance_of, parse, styles_of
from megatron_evolve.substrate.puzzles.row import DIFFICULTIES, completion_text, prompt_text, question_text
from megatron_evolve.substrate.tokenizer import challenge_tokenizer

CHECKOUT = Path(__file__).resolve().parents[2]
PUBLISHED = CHECKOUT.parent / "shared" / "data" / "challenge" / "train_open.csv"

PROGRAM = """
import hashlib, json, random
from dataclasses import astuple
from megatron_evolve.substrate.puzzles.families import FAMILIES, draw
sha = hashlib.sha256()
for difficulty in ("nano", "challenge"):
    for family in FAMILIES:
        rng = random.Random(7)
        for i in range(100):
            rate = 0.0 if family == "numeral" else i / 99
            sha.update(json.dumps(astuple(draw(family, rng, difficulty=difficulty, cue_rate=rate))).encode())
print(sha.hexdigest())
"""


def test_the_same_seed_gives_the_same_rows_in_every_process():
    digests = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(CHECKOUT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_families_have_their_fixed_order():
    assert FAMILIES == ("numeral", "gravity", "unit_conversion", "cipher", "bit_manipulation", "equation")


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_whole(family, difficulty):
    rng = random.Random(1)
    for _ in range(50):
        row = draw(family, rng, difficulty=difficulty)
        assert (row.family, row.difficulty) == (family, difficulty)
        assert tuple(row.traces) == styles_of(family, difficulty)
        assert json.loads(json.dumps(row.rule)) == row.rule
        assert prompt_text(row).endswith("\nA ")
        assert completion_text(row, "answer") == f"\\boxed{{{row.answer}}}"
        if "short-trace" in row.traces:
            assert completion_text(row, "short-trace") == row.traces["short-trace"] + f"\\boxed{{{row.answer}}}"
        with pytest.raises(ValueError, match="style of a"):
            completion_text(row, "long-trace")


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_challenge_prompts_parse_back(family):
    rng = random.Random(2)
    for _ in range(100):
        row = draw(family, rng, difficulty="challenge")
        parsed = parse(row.prompt)
        assert (parsed.family, parsed.subfamily) == (row.family, row.subfamily)
        assert FRAMES[family].render(parsed.examples, parsed.query) == row.prompt
        assert instance_of(row.prompt, row.answer) == row.instance
        for broken in (row.prompt + "\n", row.prompt + " ", row.prompt.replace("\n", "\r\n"), " " + row.prompt):
            with pytest.raises(ValueError, match="expected a challenge prompt"):
                parse(broken)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_is_the_same_in_whatever_order_its_examples_stand(family):
    """And another one, or one with another answer, is not."""
    rng = random.Random(4)
    seen = set()
    for _ in range(100):
        row = draw(family, rng, difficulty="challenge")
        parsed = parse(row.prompt)
        for _ in range(6):
            shuffled = rng.sample(parsed.examples, len(parsed.examples))
            assert instance_of(FRAMES[family].render(shuffled, parsed.query), row.answer) == row.instance
        seen.add(row.instance)
        fewer = FRAMES[family].render(parsed.examples[1:], parsed.query)
        asks_only = family == "cipher"  # its instance is the asked sentence and its answer
        assert (instance_of(fewer, row.answer) == row.instance) == asks_only
        assert (instance_of(row.prompt, row.answer + "0") == row.instance) == (family == "numeral")
    assert len(seen) == 100


def test_instances_of_many_rows_are_distinct():
    for difficulty in DIFFICULTIES:
        rng = random.Random(3)
        rows = [draw("bit_manipulation", rng, difficulty=difficulty) for _ in range(300)]
        assert len({row.instance for row in rows}) == len({row.prompt for row in rows})


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"family must be one of numeral, .*got 'unit'"):
        draw("unit", random.Random(0), difficulty="nano")
    with pytest.raises(ValueError, match="difficulty must be one of nano, challenge; got 'hard'"):
        draw("numeral", random.Random(0), difficulty="hard")
    with pytest.raises(ValueError, match="difficulty must be one of nano, challenge; got 'hard'"):
        question_text("", "hard")
    with pytest.raises(ValueError, match="family"):
        styles_of("unit", "nano")


@pytest.mark.skipif(
    not PUBLISHED.is_file(), reason=f"the published rows are not at {PUBLISHED}: they are never copied here"
)
def test_every_published_row_is_what_the_renderer_writes():
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4670
    tokenizer = challenge_tokenizer()
    instances = set()
    for row in rows:
        parsed = parse(row["prompt"])
        assert (parsed.family, parsed.subfamily) == (row["family"], row["subfamily"])
        assert FRAMES[parsed.family].render(parsed.examples, parsed.query) == row["prompt"]
        text = question_text(row["prompt"], "challenge") + f"\\boxed{{{row['answer']}}}"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        instances.add(hashlib.sha256(instance_of(row["prompt"], row["answer"]).encode()).digest())
    assert len(instances) == len(rows)
