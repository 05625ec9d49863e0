"""The argument of a round, told from the campaign's folder alone: whole sentences, and nothing of weight left out."""

from pathlib import Path

import pytest

from megatron_evolve.audit import explain_round, verify_campaign
from megatron_evolve.ledger import LEDGER, read_ledger
from tests.megatron_evolve.campaign_folder import build_campaign


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign whose store is not there: the ledger names folders that nobody has."""
    return build_campaign(tmp_path_factory.mktemp("told") / "campaign")


def test_a_round_is_explained_without_the_store_and_only_once_it_is_closed(told: Path) -> None:
    assert explain_round(told, 1).startswith("Round 1 searched in mode stabilise for the dev score")
    with pytest.raises(ValueError, match="round 9 is not closed yet"):
        explain_round(told, 9)


def test_verify_says_what_it_cannot_make_again_without_the_store(told: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found, events = verify_campaign(told), len(read_ledger(told / LEDGER))
    assert (found["ok"], found["events"], found["replayed_decisions"]) == (False, events, 0)
    broken = found["first_broken"]
    assert (broken["where"], broken["expected"].split(",")[0]) == ("substrate", "the frozen substrate")
    assert f"the chain of {events} events holds" in broken["got"] and "evidence, policy or ending" in broken["got"]
