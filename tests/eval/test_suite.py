"""Suites: fresh, fixed and disjoint draws; every malformed CSV is one sentence; real rows where they are at hand."""

import csv
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_evolve.eval import suite as module
from megatron_evolve.eval.suite import (
    CsvSuite,
    GeneratedSuite,
    csv_suite,
    draw,
    family_weights,
    item_set_digest,
    read_csv,
    rounds_without_reuse,
)
from megatron_evolve.substrate.digest import digest_file

REAL_ROWS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "challenge" / "train_open.csv"
SECRET = "a secret of tests"


def generated(difficulty: str = "nano", **changes) -> GeneratedSuite:
    shares = {"numeral": {"weight": 1}, "cipher": {"weight": 3, "cue_rate": 0.5}}
    sizes = {"dev-a": 5, "dev-b": 7, "external-b": 3, "final": 9}
    return GeneratedSuite(
        **{"difficulty": difficulty, "families": shares, "items_per_family": sizes, "seed": 1} | changes
    )


def take(suite, split: str, round_number: int, secret: str = SECRET):
    return draw(suite, split=split, round_number=round_number, secret=secret)


def write(path: Path, rows: list[list[str]], header=("id", "prompt", "answer", "family", "subfamily")) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def table(tmp_path) -> Path:
    """120 rows in three sub-families of 60, 40 and 20 rows."""
    names = ["plain"] * 60 + ["odd"] * 40 + ["rare"] * 20
    family = {"plain": "one", "odd": "two", "rare": "two"}
    rows = [[f"r{n:03}", f"question {n}", f"{n}", family[name], name] for n, name in enumerate(names)]
    return write(tmp_path / "table.csv", rows)


# --- generated ---


@pytest.mark.parametrize("difficulty", ["nano", "challenge"])
def test_everybody_meets_the_same_items(difficulty):
    first, second = take(generated(difficulty), "dev-b", 3), take(generated(difficulty), "dev-b", 3)
    assert first == second
    assert item_set_digest(first) == item_set_digest(second)
    assert Counter(item.family for item in first) == {"cipher": 7, "numeral": 7}
    assert len({item.id for item in first}) == 14
    assert all(item.prompt and item.answer and item.subfamily for item in first)


@pytest.mark.parametrize("split", ["dev-b", "external-b"])
def test_judging_items_are_fresh_every_round(split):
    digests = {item_set_digest(take(generated(), split, number)) for number in range(6)}
    assert len(digests) == 6


@pytest.mark.parametrize("split", ["dev-a", "final"])
def test_selecting_and_final_items_stay(split):
    assert take(generated(), split, 0) == take(generated(), split, 5)


def test_draws_depend_on_secret_seed_and_split():
    alike = {
        item_set_digest(items)
        for items in (
            take(generated(), "dev-b", 1),
            take(generated(), "dev-b", 1, "another secret of tests"),
            take(generated(seed=2), "dev-b", 1),
            take(generated(items_per_family={"dev-a": 7}), "dev-a", 1),
        )
    }
    assert len(alike) == 4


def test_order_of_families_means_nothing():
    suite = generated()
    turned = generated(families=dict(reversed(suite.families.items())))
    assert turned.digest == suite.digest
    assert take(turned, "dev-b", 1) == take(suite, "dev-b", 1)


def test_weights_of_a_generated_suite():
    suite = generated()
    assert family_weights(suite, take(suite, "dev-a", 0)) == {"cipher": 0.75, "numeral": 0.25}


def test_a_split_that_is_not_declared_is_refused():
    with pytest.raises(ValueError, match=r"expected one of the splits this suite serves .*got 'external-a'"):
        take(generated(), "external-a", 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"families": {"numerals": {"weight": 1}}},
        {"families": {"numeral": {"weight": 0}}},
        {"families": {"cipher": {"weight": 1, "cue_rate": 1.5}}},
        {"families": {"numeral": {"weight": 1, "cue_rate": 0.5}}},
        {"families": {}},
        {"items_per_family": {"dev-a": 0}},
        {"items_per_family": {"open": 3}},
        {"surprise": 1},
    ],
)
def test_malformed_generated_suites_are_refused(changes):
    with pytest.raises(ValidationError):
        generated(**changes)


def test_an_unknown_family_is_told_the_nearest():
    with pytest.raises(ValueError, match="did you mean numeral"):
        generated(families={"numerals": {"weight": 1}})


# --- CSV ---


def test_pools_are_disjoint_stratified_and_whole(table):
    suite = csv_suite(table, {"external-a": 12, "external-b": 24})
    final, opened = take(suite, "final", 0), take(suite, "open", 0)
    assert Counter(item.subfamily for item in final) == {"plain": 30, "odd": 20, "rare": 10}
    assert Counter(item.subfamily for item in opened) == {"plain": 30, "odd": 20, "rare": 10}
    assert sorted(item.id for item in final + opened) == [f"r{n:03}" for n in range(120)]
    a = {item.id for number in range(9) for item in take(suite, "external-a", number)}
    b = {item.id for number in range(9) for item in take(suite, "external-b", number)}
    assert len(a) == 20
    assert len(b) == 40
    assert not a & b
    assert a | b == {item.id for item in opened}


def test_rounds_walk_through_the_pool(table):
    suite = csv_suite(table, {"external-b": 20})
    assert rounds_without_reuse(suite, "external-b") == 2
    rounds = [{item.id for item in take(suite, "external-b", number)} for number in range(3)]
    assert all(len(ids) == 20 for ids in rounds)
    assert not rounds[0] & rounds[1]
    assert Counter(item.subfamily for item in take(suite, "external-b", 1)) == {"plain": 10, "odd": 7, "rare": 3}
    assert take(suite, "external-b", 1) == take(suite, "external-b", 1)


def test_a_csv_is_known_by_its_bytes_not_by_its_place(table, tmp_path):
    moved = tmp_path / "elsewhere.csv"
    moved.write_bytes(table.read_bytes())
    here, there = csv_suite(table, {"external-b": 6}), csv_suite(moved, {"external-b": 6})
    assert here.digest == there.digest
    assert take(here, "external-b", 1) == take(there, "external-b", 1)


def test_weights_of_a_csv(table):
    suite = csv_suite(table, {"external-b": 60})
    assert family_weights(suite, take(suite, "external-b", 0)) == {"one": 0.5, "two": 0.5}
    weighted = csv_suite(table, {"external-b": 60}, weight={"one": 3, "two": 1})
    assert family_weights(weighted, take(weighted, "external-b", 0)) == {"one": 0.75, "two": 0.25}
    with pytest.raises(ValueError, match="family 'two' is in the file and has no weight"):
        csv_suite(table, {"external-b": 60}, weight={"one": 3})
    with pytest.raises(ValueError, match="family 'three' is weighted and not in the file"):
        csv_suite(table, {"external-b": 60}, weight={"one": 3, "two": 1, "three": 1})


def test_too_many_items_are_refused(table):
    with pytest.raises(ValueError, match=r"expected at most 60 rows a round for external-b .* got 61"):
        csv_suite(table, {"external-b": 61})


def test_a_changed_or_missing_file_is_named(table):
    suite = csv_suite(table, {"external-b": 6})
    table.write_bytes(table.read_bytes().replace(b"question 7", b"question 8", 1))
    with pytest.raises(ValueError, match=r"expected .*table\.csv with sha256"):
        read_csv(suite)
    table.unlink()
    with pytest.raises(ValueError, match="found no file"):
        read_csv(suite)


HEADER = b"id,prompt,answer\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected the columns id, prompt, answer, got none: add id, prompt, answer"),
        (b"id,prompt\n1,x\n", "got id, prompt: add answer"),
        (HEADER, "expected at least one row"),
        (HEADER + b"1,x,y\n2,x,y\n1,z,y\n", "expected every id once, got '1' on lines 2 and 4"),
        (HEADER + b"1,x,\n", "expected a value for answer, the row that ends on line 2 has none"),
        (HEADER + b"1, ,y\n", "expected a value for prompt"),
        (HEADER + b",x,y\n", "expected a value for id"),
        (HEADER + b"1,x\n", "expected as many fields as columns, the row that ends on line 2 differs"),
        (HEADER + b"1,x,y,z\n", "expected as many fields as columns"),
        (HEADER + b"1,\xff\xfe,y\n", "expected UTF-8 text, got byte 0xff"),
        (HEADER + b'1,"x,y\n', "got one that does not parse"),
        (HEADER + b'1,"x"x,y\n', "got one that does not parse"),
    ],
)
def test_a_malformed_csv_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        csv_suite(path, {"external-b": 1})
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_csv_without_a_header_does_not_tell_its_first_row(tmp_path):
    """The row stood in the controller's error, its gold answer with it."""
    path = tmp_path / "bare.csv"
    path.write_bytes(b"7,q,gold\n")
    with pytest.raises(ValueError, match="got none: add id, prompt, answer") as caught:
        csv_suite(path, {"external-b": 1})
    assert "gold" not in str(caught.value)


def test_a_missing_csv_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="found no file"):
        csv_suite(tmp_path / "none.csv", {"external-b": 1})


def test_byte_order_mark_and_blanks_are_forgiven(tmp_path):
    path = tmp_path / "bom.csv"
    path.write_bytes(b"\xef\xbb\xbfid,prompt,answer\n 1 ,what?, 7 \n2,who?,me\n")
    items = read_csv(csv_suite(path, {"external-b": 1}))
    assert [(item.id, item.answer) for item in items] == [("1", "7"), ("2", "me")]
    assert {item.family for item in items} == {module.UNKNOWN_FAMILY}


def test_families_are_recognised_from_the_prompt(tmp_path):
    items = take(generated("challenge"), "dev-b", 1)
    rows = [[item.id, item.prompt, item.answer] for item in items]
    path = write(tmp_path / "bare.csv", [*rows, ["x", "what is love?", "42"]], header=("id", "prompt", "answer"))
    found = {item.id: (item.family, item.subfamily) for item in read_csv(csv_suite(path, {"external-b": 1}))}
    assert found == {item.id: (item.family, item.subfamily) for item in items} | {"x": ("other", "other")}


@given(st.integers(0, 60), st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 20), min_size=1))
def test_allotment_is_whole_and_never_more_than_there_is(total, sizes):
    total = min(total, sum(sizes.values()))
    count = module._allot(total, sizes)
    assert sum(count.values()) == total
    assert all(0 <= count[name] <= size for name, size in sizes.items())
    assert all(abs(count[name] - total * size / max(1, sum(sizes.values()))) < 1 for name, size in sizes.items())


# --- the challenge's rows ---


@pytest.fixture(scope="module")
def real_rows() -> Path:
    if not REAL_ROWS.is_file():
        pytest.skip(f"the challenge's rows are not at {REAL_ROWS}")
    return REAL_ROWS


def test_a_stratified_600_of_the_real_rows(real_rows):
    suite = csv_suite(real_rows, {"external-a": 300, "external-b": 300})
    everything = Counter(item.subfamily for item in read_csv(suite))
    total = sum(everything.values())
    for split in ("external-a", "external-b"):
        drawn = Counter(item.subfamily for item in take(suite, split, 2))
        assert sum(drawn.values()) == 300
        assert all(abs(drawn[name] - 300 * count / total) <= 2 for name, count in everything.items())
    assert len(take(suite, "open", 0)) + len(take(suite, "final", 0)) == total
    assert rounds_without_reuse(suite, "external-a") == 3


def test_the_parser_finds_the_real_rows_families(real_rows, tmp_path):
    told = read_csv(CsvSuite(path=str(real_rows), sha256=digest_file(real_rows), items={"external-b": 1}))
    some = told[::10]
    path = write(tmp_path / "bare.csv", [[i.id, i.prompt, i.answer] for i in some], header=("id", "prompt", "answer"))
    found = read_csv(csv_suite(path, {"external-b": 1}))
    assert [item.family for item in found] == [item.family for item in some]
