"""Few looks left while external is the objective: its A half still ranks, and the leader is still judged."""

import random
from pathlib import Path

import pytest

from megatron_evolve.evidence import Evidence
from megatron_evolve.launch.rundir import read_json
from megatron_evolve.ledger import History
from megatron_evolve.rounds import looks_for_ranking
from tests.faults import invented
from tests.faults.cluster import Cluster, Troubles
from tests.faults.files import FaultyFiles
from tests.faults.invented import Invented, campaign, origin
from tests.faults.schedules import start, world


def test_as_many_are_ranked_as_leave_the_anchor_and_the_leader_their_looks() -> None:
    assert [looks_for_ranking(left) for left in (0, 3, 4, 7)] == [0, 0, 1, 4]


def test_the_leader_is_found_and_judged_by_the_last_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranking was taken before any external score was there, so nobody led and nobody was confirmed."""
    plain = invented.initial_policy

    def short_of_looks(*given: object) -> object:
        return plain(*given).replace(objective="external", ask_external="best")

    monkeypatch.setattr(invented, "initial_policy", short_of_looks)
    told = Invented(tmp_path, campaign(3, rounds=1, workers=4, external_looks=5), origin())
    files = FaultyFiles(told.folder.root)
    cluster = Cluster(random.Random(3), files, Troubles(), account=told.folder.looks, own_failures=0.0)
    with world(files, cluster):
        assert start(told, files, cluster, {}) == "closed"
    ranked = History(told.folder.ledger).find("ranked", "1").data["means"]
    evidence = Evidence.parse(read_json(told.folder.evidence(1)), where="evidence")
    assert len(ranked) == 2, "five looks: the anchor's two, two to rank, one for the leader"
    assert evidence.selected == max(ranked, key=ranked.get)
    assert {one.id for one in evidence.candidates if one.external is not None} == {evidence.anchor, evidence.selected}
