"""560 schedules of faults on a fake cluster: however a campaign is struck, it ends as the undisturbed one did."""

import random
from pathlib import Path

import pytest

from megatron_evolve.launch.job import OutcomeKind
from megatron_evolve.ledger import read_ledger
from tests.faults.cluster import Cluster, Troubles
from tests.faults.files import DEADLY, FAULTS
from tests.faults.schedules import SCHEDULES, STORIES, plans_of, run_schedule, undisturbed

BLOCK = 28


@pytest.mark.slow
@pytest.mark.parametrize("block", range(SCHEDULES // BLOCK))
def test_a_struck_campaign_ends_as_the_undisturbed_one(block: int, tmp_path: Path) -> None:
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        run_schedule(seed, tmp_path / str(seed))


def test_a_few_schedules(tmp_path: Path) -> None:
    for seed in range(0, SCHEDULES, SCHEDULES // 8):
        run_schedule(seed, tmp_path / str(seed))


@pytest.mark.slow
def test_every_transition_is_struck_by_a_death() -> None:
    """The schedules' first faults kill at every kind of step that any story takes, and every fault occurs."""
    steps, killed_at, faults = set(), set(), set()
    for seed in range(SCHEDULES):
        taken = undisturbed(seed % STORIES).steps
        steps |= set(taken)
        plans = plans_of(seed, taken, random.Random(f"schedule {seed}"))
        for plan in plans:
            ((step, fault),) = plan.items()
            faults.add(fault)
            killed_at |= {taken[step]} if fault in DEADLY else set()
    assert faults == set(FAULTS)
    assert steps - killed_at == set()
    told = {place.rsplit("/", 1)[-1] for place in steps}
    assert {"evidence.json", "policy.yaml", "edits.json", "job.json", "candidate.json"} <= told


@pytest.mark.slow
def test_the_stories_hold_every_ending_and_a_spent_budget() -> None:
    endings, sides, spent = set(), set(), set()
    for story in range(STORIES):
        told = undisturbed(story).told
        events = read_ledger(told.folder.ledger)
        endings |= {event.data["end"]["outcome"] for event in events if event.kind == "ended"}
        sides |= {event.data["same"] for event in events if event.kind == "final"}
        looks = told.folder.looks.read_text().count('"split":"external')
        spent.add(looks == told.campaign.constitution.external_looks)
    assert endings == {*(kind.value for kind in OutcomeKind), "diverged"}
    assert sides == {True, False}, "something was promoted in one story and nothing in another"
    assert True in spent, "in some story the last look was taken"


def test_a_schedule_that_breaks_names_its_seed_and_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness can fail: a cluster that begins an attempt each time it is sent runs jobs twice to a result."""

    def begin(self: Cluster, job: object, number: int) -> None:
        self.begun.discard((job.key, number))
        real(self, job, number)

    real = Cluster.begin
    undisturbed(1)
    monkeypatch.setattr(Cluster, "begin", begin)
    monkeypatch.setattr("tests.faults.schedules.TROUBLES", Troubles(sent_twice=1.0))
    monkeypatch.setattr("tests.faults.schedules.plans_of", lambda seed, steps, rng: [])
    with pytest.raises(AssertionError, match=r"python -m tests.faults.schedules \d+"):
        for seed in range(1, SCHEDULES, STORIES):
            run_schedule(seed, tmp_path / str(seed))
