"""Leakage: an item trained on is found, others are not; nano says why it is exempt."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_evolve.eval.leakage import check, instance_of, withheld
from megatron_evolve.eval.suite import CsvSuite, GeneratedSuite, Item, draw, read_csv
from megatron_evolve.substrate.digest import digest_file
from megatron_evolve.substrate.packing import instance_hash
from megatron_evolve.substrate.puzzles import families
from megatron_evolve.substrate.puzzles.row import Row

REAL_ROWS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "challenge" / "train_open.csv"


def items_of(difficulty: str) -> list[Item]:
    shares = {name: {"weight": 1} for name in families.FAMILIES}
    suite = GeneratedSuite(difficulty=difficulty, families=shares, items_per_family={"dev-b": 8}, seed=3)
    return draw(suite, split="dev-b", round_number=1, secret="a secret of tests")


def training_rows(count: int) -> list[Row]:
    rng = random.Random(5)
    return [
        families.draw(name, rng, difficulty="challenge", cue_rate=0.0)
        for name in families.FAMILIES
        for _ in range(count)
    ]


def instances_of(rows: list[Row]) -> list[str]:
    return [row.instance for row in rows]


def test_an_item_that_was_trained_on_is_found():
    items = items_of("challenge")
    for item in items:
        found = check([*instances_of(training_rows(2)), instance_of(item)], [item], difficulty="challenge")
        assert found.leaked_items == (item.id,)
        assert found.leaked_rows == 1
        assert found.exempt is None


def test_independent_rows_do_not_collide():
    found = check(instances_of(training_rows(20)), items_of("challenge"), difficulty="challenge")
    assert found.leaked_items == ()
    assert found.rows == 20 * len(families.FAMILIES)
    assert found.items == 8 * len(families.FAMILIES)


def test_nano_is_exempt_and_says_why():
    items = items_of("nano")
    found = check([item.prompt for item in items], items, difficulty="nano")
    assert found.leaked_items == ()
    assert "nano is exempt" in found.exempt


def test_withheld_hashes_tell_rows_from_items_without_showing_them():
    items = items_of("challenge")
    hashes = withheld(items)
    trained_on = [replace(row, instance=instance_of(item)) for row, item in zip(training_rows(8), items, strict=True)]
    assert all(instance_hash(row) in hashes for row in trained_on), "what packing leaves out"
    assert not any(instance_hash(row) in hashes for row in training_rows(5))
    assert not any(item.prompt in text or item.answer == text for text in hashes for item in items)


def test_an_unrecognised_prompt_is_its_own_instance():
    item = Item(id="1", prompt="what is love?", answer="42", family="other", subfamily="other")
    assert check(["what is love?"], [item], difficulty="challenge").leaked_items == ("1",)


def test_generated_rows_against_the_real_ones():
    if not REAL_ROWS.is_file():
        pytest.skip(f"the challenge's rows are not at {REAL_ROWS}")
    items = read_csv(CsvSuite(path=str(REAL_ROWS), sha256=digest_file(REAL_ROWS), items={"external-b": 1}))
    assert len({instance_of(item) for item in items}) == len(items)
    found = check(instances_of(training_rows(50)), items, difficulty="challenge")
    assert found.leaked_rows <= 3
