"""Scores and their Parquet rows."""

import math

import numpy as np
import pytest

from megatron_evolve.eval.score import COLUMNS, ItemRows, Score, SplitScores, read_rows, split_scores, write_rows


def rows(split="dev-b", counts=(("a", "a1", 6), ("a", "a2", 4), ("b", "b1", 20)), seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for family, subfamily, count in counts:
        for position in range(count):
            right = bool(rng.random() < 0.6)
            made.append(
                {
                    "item_id": f"{subfamily}-{position}",
                    "family": family,
                    "subfamily": subfamily,
                    "split": split,
                    "correct": right,
                    "exact": right and position % 3 > 0,
                    "boxed": position % 4 > 0,
                    "truncated": position % 5 == 0,
                    "num_tokens": position,
                    "prediction": f"{position}\x00é" if position % 2 else "",
                }
            )
    return made


def test_weighted_score_against_the_definition():
    made = rows()
    scores = split_scores(ItemRows.of(made), {"a": 3.0, "b": 1.0})
    mean = {f: np.mean([row["correct"] for row in made if row["family"] == f]) for f in "ab"}
    assert scores.overall.mean == pytest.approx(0.75 * mean["a"] + 0.25 * mean["b"])
    variance = 0.75**2 * mean["a"] * (1 - mean["a"]) / 10 + 0.25**2 * mean["b"] * (1 - mean["b"]) / 20
    assert scores.overall.se == pytest.approx(math.sqrt(variance))
    assert scores.overall.n == 30
    assert scores.exact.mean <= scores.overall.mean
    assert scores.families["a"] == Score(mean=mean["a"], se=math.sqrt(mean["a"] * (1 - mean["a"]) / 10), n=10)
    assert {name: list(by) for name, by in scores.subfamilies.items()} == {"a": ["a1", "a2"], "b": ["b1"]}
    assert scores.interval[0] < scores.overall.mean < scores.interval[1]
    assert scores.missing_box_rate == pytest.approx(np.mean([not row["boxed"] for row in made]))
    assert scores.truncation_rate == pytest.approx(np.mean([row["truncated"] for row in made]))


def test_equal_shares_are_the_plain_mean_and_its_wilson_interval():
    made = rows(counts=(("a", "a", 10), ("b", "b", 20)))
    scores = split_scores(ItemRows.of(made), {"a": 10, "b": 20})
    assert scores.overall.mean == pytest.approx(np.mean([row["correct"] for row in made]))
    lopsided = split_scores(ItemRows.of(made), {"a": 20, "b": 1})
    width = [s.interval[1] - s.interval[0] for s in (scores, lopsided)]
    assert width[0] < width[1], "weight on few items costs precision"


def test_no_item_right_has_an_interval_above_zero():
    made = [{**row, "correct": False, "exact": False} for row in rows()]
    scores = split_scores(ItemRows.of(made), {"a": 1, "b": 1})
    assert (scores.overall.mean, scores.overall.se) == (0, 0)
    assert scores.interval[1] > 0.05


def test_dict_both_ways():
    scores = split_scores(ItemRows.of(rows()), {"a": 1, "b": 1})
    assert SplitScores.parse(scores.to_dict(), where="scores") == scores


def test_parquet_both_ways_and_no_gold(tmp_path):
    made = ItemRows.of([*rows("dev-a"), *rows("dev-b", seed=1)])
    write_rows(tmp_path / "scores.parquet", made)
    back = read_rows(tmp_path / "scores.parquet")
    for name in COLUMNS:
        assert getattr(back, name).tolist() == getattr(made, name).tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]
    assert not {"answer", "gold"} & set(COLUMNS)
    assert len(back.of_split("dev-b")) == 30


def test_runs_for_comparison():
    made = ItemRows.of([*rows("external-a"), *rows("external-b", seed=1)])
    both = made.of_run("x", 3, "external-a", "external-b")
    assert both.key == ("x", 3) and both.correct.size == 60
    assert both.item_ids[0] == "external-a/a1-0"
    assert made.of_run("x", 3, "external-b").correct.tolist() == made.of_split("external-b").correct.tolist()
    with pytest.raises(ValueError, match="at least one item"):
        made.of_run("x", 3, "dev-b")


def test_bad_rows_and_files(tmp_path):
    good = rows()[0]
    with pytest.raises(ValueError, match="missing: exact"):
        ItemRows.of([{name: value for name, value in good.items() if name != "exact"}])
    with pytest.raises(ValueError, match="unknown: answer"):
        ItemRows.of([{**good, "answer": "42"}])
    with pytest.raises(ValueError, match="expected bool in column correct"):
        ItemRows.of([{**good, "correct": 0.5}])
    with pytest.raises(ValueError, match="rows of one split"):
        split_scores(ItemRows.of([*rows("dev-a"), *rows("dev-b")]), {"a": 1, "b": 1})
    with pytest.raises(ValueError, match="got none"):
        split_scores(ItemRows.of([]), {"a": 1})
    with pytest.raises(ValueError, match="a weight for every family"):
        split_scores(ItemRows.of(rows()), {"a": 1})
    path = tmp_path / "scores.parquet"
    with pytest.raises(ValueError, match="found no file"):
        read_rows(path)
    write_rows(path, ItemRows.of(rows()))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="no whole Parquet file"):
        read_rows(path)
