"""560 schedules of faults on a fake cluster: however a campaign is struck, it ends as the undisturbed one did."""

import random
from pathlib import Path

import pytest

from megatron_evolve.launch.job import OutcomeKind
from megatron_evolve.ledger import read_ledger
from tests.faults.cluster import Cluster, Troubles
from tests.faults.files import DEADLY, FAULTS, Fault, Plan
from tests.faults.schedules import (
    DRAINS,
    OUTAGE,
    SCHEDULES,
    STORIES,
    check,
    plans_of,
    play,
    run_schedule,
    run_spending,
    undisturbed,
)

BLOCK = 28
A_FEW_DRAINS = (563, 569, 571)
A_STORY_WITH_A_REPAIR = 7  # of a candidate that fails when it is confirmed, alone
SPENDING = 48  # schedules whose budget of hours may end them early


@pytest.mark.slow
@pytest.mark.parametrize("block", range(SCHEDULES // BLOCK))
def test_a_struck_campaign_ends_as_the_undisturbed_one(block: int, tmp_path: Path) -> None:
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        run_schedule(seed, tmp_path / str(seed))


def test_a_few_schedules(tmp_path: Path) -> None:
    for seed in range(0, SCHEDULES, SCHEDULES // 8):
        run_schedule(seed, tmp_path / str(seed))


def test_a_drain_that_is_cut_short_takes_no_job(tmp_path: Path) -> None:
    """Killed after it called a job off and before that ended: the next controller took the job as over for good."""
    struck = [place for seed in A_FEW_DRAINS for _, place in run_schedule(seed, tmp_path / str(seed)).struck]
    assert any("attempts/N/cancel" in place for place in struck)


def test_a_drain_begins_nothing_that_was_prepared_and_not_sent(tmp_path: Path) -> None:
    expected = undisturbed(1)
    prepared = next(
        number for number, place in enumerate(expected.steps) if place.endswith("train/attempts/N/job.json")
    )
    plan: Plan = {prepared - 1: "stop_file", prepared: "kill_after"}
    played = play(tmp_path, 1, [plan], Troubles(), random.Random(1))
    assert played.starts == ["killed", "stopped", "closed"]
    check(played, expected)


@pytest.mark.parametrize(("step", "fault"), [("unlink stop", "kill_before"), (None, "terminate")])
def test_a_repair_that_an_order_put_off_is_asked_by_the_next_start(
    step: str | None, fault: Fault, tmp_path: Path
) -> None:
    """All else has ended and the file still stands, since its controller died or may be moved: the round went on."""
    expected = undisturbed(A_STORY_WITH_A_REPAIR)
    asked = max(number for number, place in enumerate(expected.steps) if place == "mkdir rounds/N/workers/N/N")
    failed = max(number for number, place in enumerate(expected.steps[:asked]) if place == "write ledger.jsonl")
    plan: Plan = {failed: "stop_file", failed + 1 if step is None else step: fault}
    played = play(tmp_path, A_STORY_WITH_A_REPAIR, [plan], Troubles(), random.Random(A_STORY_WITH_A_REPAIR))
    assert played.starts[1:] == ["stopped", "closed"] and len(played.struck) == 2
    check(played, expected)


@pytest.mark.slow
def test_drains_that_are_cut_short(tmp_path: Path) -> None:
    for seed in range(SCHEDULES, SCHEDULES + DRAINS):
        run_schedule(seed, tmp_path / str(seed))


@pytest.mark.parametrize("seed", [0, 6])
def test_a_campaign_whose_hours_are_spent_ends_and_adds_up(seed: int, tmp_path: Path) -> None:
    """A candidate that was never begun had no runs to look up (0), and a cut campaign's rounds no number (6)."""
    run_spending(seed, tmp_path)


@pytest.mark.slow
def test_hours_add_up_however_a_campaign_is_struck(tmp_path: Path) -> None:
    spent = 0
    for seed in range(SPENDING):
        played = run_spending(seed, tmp_path / str(seed))
        spent += any(event.kind == "budget-spent" for event in read_ledger(played.told.folder.ledger))
    assert spent > SPENDING // 2, "in most the budget ends the campaign"


def test_an_outage_pauses_a_campaign_and_costs_no_job_its_place(tmp_path: Path) -> None:
    played = play(tmp_path, 0, [], OUTAGE, random.Random(3))
    assert [ended.partition(":")[0] for ended in played.starts] == ["paused", "paused", "closed"]
    check(played, undisturbed(0))
    kinds = [event.kind for event in read_ledger(played.told.folder.ledger)]
    assert kinds[kinds.index("paused") + 1] == "resumed"


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
    assert endings == {*(kind.value for kind in OutcomeKind), "diverged"} - {"cancelled"}, "a drain ends no stage"
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
