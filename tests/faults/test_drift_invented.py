"""The cumulative estimand once the standing settings moved: the origin's frozen runs answer the round's items."""

import random
from pathlib import Path

import pytest

from megatron_evolve.eval.looks import Looks
from megatron_evolve.evidence import Evidence
from megatron_evolve.launch.rundir import read_json
from megatron_evolve.ledger import History
from tests.faults.cluster import Cluster, Troubles
from tests.faults.files import FaultyFiles
from tests.faults.invented import Invented, campaign, origin
from tests.faults.schedules import start, world

ESTIMANDS = ("selected", "mean", "cumulative")
SEEDS = range(40)  # of campaigns, until one is as wanted


def played(root: Path, seed: int, workers: int) -> tuple[Invented, list[Evidence]]:
    """A campaign of two rounds with looks for everybody, run to its end, and its evidence."""
    plain = campaign(seed, rounds=2, workers=workers, external_looks=24)
    rules = plain.constitution
    told = Invented(
        root, plain.replace(constitution=rules.replace(gap=rules.gap.replace(estimands=ESTIMANDS))), origin()
    )
    files = FaultyFiles(told.folder.root)
    cluster = Cluster(random.Random(seed), files, Troubles(), account=told.folder.looks, own_failures=0.0)
    with world(files, cluster):
        assert start(told, files, cluster, {}) == "closed"
    return told, [Evidence.parse(read_json(told.folder.evidence(one)), where="evidence") for one in (1, 2)]


@pytest.mark.parametrize("proposed", [False, True], ids=["asked again", "proposed again"])
def test_the_origin_answers_the_rounds_items_once_something_moved(tmp_path: Path, proposed: bool) -> None:
    """By its frozen runs, trained by nobody; by an explorer's, where a worker proposed those very settings again."""
    for seed in SEEDS:
        told, (first, second) = played(tmp_path / str(seed), seed, workers=4 if proposed else 2)
        origin_id, candidates = first.anchor, [one.id for one in second.candidates]
        if second.anchor != origin_id and (origin_id in candidates) == proposed:
            break
    assert second.anchor != origin_id and (origin_id in candidates) == proposed, "one of the campaigns is like that"
    mine = [one for one in first.verdicts if one["estimand"] == "cumulative"]
    assert mine and all("still the origin" in one["reason"] for one in mine)
    cumulative = next(one for one in second.verdicts if one["estimand"] == "cumulative")
    assert cumulative["d_dev"] is not None, cumulative["reason"]
    ended = [key.split("/") for key in History(told.folder.ledger).keys("ended")]
    stages = [(seed, stage) for number, name, seed, stage in ended if (number, name) == ("2", origin_id)]
    if not proposed:
        assert {seed for seed, _ in stages} == {str(one) for one in told.origin.seeds}
        assert {stage for _, stage in stages} == {"dev", "external-a", "external-b"}
        looks = Looks(told.folder.looks, external_budget=24).entries
        paid = {look.split for look in looks if look.candidates == (origin_id,) and look.round == 2}
        assert paid == {"dev-a", "dev-b", "external-a", "external-b"}
    else:
        assert "train" in {stage for _, stage in stages}
