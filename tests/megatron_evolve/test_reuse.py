"""Reuse: the round from which a CSV's rows return is the one in which they do, and it is told before and after."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_evolve.campaign import ExternalCsv, find_campaign, load_campaign
from megatron_evolve.estimate import use_words
from megatron_evolve.eval.suite import csv_suite, draw
from megatron_evolve.report.chronicle import read_chronicle
from megatron_evolve.report.figures import Quotes
from megatron_evolve.report.summary import limits
from megatron_evolve.report.tables import rounds
from megatron_evolve.reuse import reuse_words, rounds_anew
from megatron_evolve.status import status
from tests.megatron_evolve.campaign_folder import build_campaign

ITEMS = {"external-a": 12, "external-b": 12}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reuse") / "target.csv"
    kinds = ["plain"] * 100 + ["odd"] * 61 + ["rare"] * 20
    rows = [f"r{n},question {n},answer {n},{kind},{kind}" for n, kind in enumerate(kinds)]
    path.write_text("id,prompt,answer,family,subfamily\n" + "\n".join(rows) + "\n")
    return path


def with_target(path: Path | None):
    campaign = load_campaign(find_campaign("demo"))
    target = ExternalCsv(path=path and str(path), items=ITEMS, sealed=0.5)
    return campaign.replace(judge=campaign.judge.replace(external=target))


@pytest.fixture(scope="module")
def anew(table: Path) -> dict[str, int]:
    return rounds_anew(with_target(table))


def test_rows_return_in_the_round_that_is_told(table: Path, anew: dict[str, int]) -> None:
    suite = csv_suite(table, ITEMS, sealed=0.5)
    assert set(anew) == set(ITEMS)
    for split, number in anew.items():
        asked = {n: {item.id for item in draw(suite, split=split, round_number=n, secret="s")} for n in range(1, 9)}
        again = [n for n in asked if any(asked[n] & asked[before] for before in range(1, n))]
        assert again[0] == number + 1


def test_the_statement_before_the_start_says_it(anew: dict[str, int]) -> None:
    use = {
        "total": dict.fromkeys(("training_runs", "scoring_jobs"), 1),
        "rounds_anew": anew,
        "rounds": 9,
        "warnings": [],
    }
    use["total"] |= {"gpu_hours_limit": None, "cpu_hours_limit": None, "training_gpu_hours_assumed": None}
    told = "\n".join(use_words(use, {}))
    number = anew["external-a"]
    assert f"external-a: the file has new rows for {number} of 9 rounds; from round {number + 1} on rows are" in told
    assert reuse_words(anew, number) == [f"external rows: all {number} rounds ask rows that no earlier round asked"]


def test_no_file_no_statement(tmp_path: Path) -> None:
    assert rounds_anew(with_target(None)) == rounds_anew(load_campaign(find_campaign("demo"))) == {}
    broken = tmp_path / "broken.csv"
    broken.write_text("id,question\n1,2\n")
    with pytest.raises(ValueError, match="add prompt, answer") as told:
        rounds_anew(with_target(broken))
    assert "\n" not in str(told.value)


def test_the_report_says_it_of_the_campaign_and_of_the_round(tmp_path: Path, table: Path) -> None:
    folder = build_campaign(tmp_path / "campaign")
    chronicle, quotes = read_chronicle(folder), Quotes(status(folder))
    assert "asked in an earlier round" not in rounds(chronicle, quotes)
    opened = {**chronicle.opened, "rounds_anew": {"external-a": 1, "external-b": 9}}
    reused = replace(chronicle, opened=opened, campaign=with_target(table))
    told = rounds(reused, quotes)
    assert told.count("Rows of external-a were asked in an earlier round") == len(chronicle.chapters) - 1
    assert "external-a: the file has new rows for 1 of" in limits(reused, quotes)
