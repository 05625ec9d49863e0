"""Rows: a CSV that could be frozen and trained under, and never judged on, is refused before anything is made."""

from collections import Counter
from pathlib import Path

import pytest

from megatron_evolve.campaign import SHIPPED, load_campaign
from megatron_evolve.dry_run import dry_run
from megatron_evolve.eval.suite import csv_suite, draw, read_csv
from megatron_evolve.loop import Session, run_campaign
from megatron_evolve.rows import check_families
from megatron_evolve.site import Site

ITEMS = {"external-a": 60, "external-b": 60}


def table(path: Path, rare: int, sub: str = "other") -> Path:
    """Six hundred rows of two families, and a few of a third, in a sub-family of its own or in one they share."""
    kinds = ["a,a" if n % 2 else "b,b" for n in range(600)] + [f"other,{sub}"] * rare
    path.write_text(
        "id,prompt,answer,family,subfamily\n" + "".join(f"r{n},q{n},{n},{k}\n" for n, k in enumerate(kinds))
    )
    return path


@pytest.mark.parametrize("sub", ["other", "a"])
def test_a_family_is_refused_where_some_split_of_some_round_draws_fewer_than_two(tmp_path: Path, sub: str) -> None:
    rounds, refused = 3, set()
    for rare in (0, 1, 6, 40, 90):
        suite = csv_suite(table(tmp_path / "t.csv", rare, sub), ITEMS, sealed=0.5)
        rows = read_csv(suite)
        draws = [
            Counter(item.family for item in draw(suite, split=split, round_number=number, secret="s"))
            for split in (*ITEMS, "final")
            for number in range(rounds + 1)
        ]
        judged = all(drawn[row.family] > 1 for drawn in draws for row in rows)
        try:
            check_families(suite, rows, rounds, "s")
        except ValueError as refusal:
            assert not judged and "'other'" in str(refusal) and f"of {rare} in the file" in str(refusal)
            refused.add(rare)
        else:
            assert judged
    assert {1, 6} <= refused and not {0, 90} & refused


def test_it_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    file = table(tmp_path / "t.csv", 5)
    where = (
        r"expected at least 2 rows of every family in every split, got 1 of family 'other' in external-[ab], of 5 in"
    )
    refused(file, tmp_path, where)
    again = [line.replace(",q5,", ",q7,").replace(",q9,", ",q7 ,") for line in table(file, 0).read_text().splitlines()]
    file.write_text("\n".join(again) + "\n")
    refused(file, tmp_path, r"every prompt once, got 2 row\(s\) .* with ids 'r5' and 'r7': keep one of each")


def refused(file: Path, folder: Path, says: str) -> None:
    campaign = load_campaign(SHIPPED / "challenge-cpu.yaml", external=file)
    target = campaign.judge.external.replace(items=ITEMS)
    campaign = campaign.replace(judge=campaign.judge.replace(external=target))
    session = Session(folder / "run", folder / "store", lambda what, facts: None, lambda: False)
    for start in (lambda: run_campaign(session, campaign), lambda: dry_run(campaign, folder, Site(), folder / "store")):
        with pytest.raises(ValueError, match=says) as told:
            start()
        assert "\n" not in str(told.value) and "q7" not in str(told.value)
    assert list(folder.iterdir()) == [file]
