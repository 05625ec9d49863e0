"""The target's file: one that changed or went pauses the campaign before a look is paid, and mended it goes on."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.candidate import candidate
from megatron_evolve.contest.surface import ORIGIN
from megatron_evolve.desk import ENDED, STOPPED, Desk, Stopped
from megatron_evolve.drift import ask_origin
from megatron_evolve.jobs import StageEnd
from megatron_evolve.loop import pauses
from megatron_evolve.meta import initial_policy
from megatron_evolve.retries import Paused
from megatron_evolve.rounds import RoundRuns, ask_external
from megatron_evolve.substrate.settings import write_all
from megatron_evolve.trial import FIRST_TRIAL_ROUND, Trial, run_both
from tests.megatron_evolve.test_closing import Answering, desk_with


class Crashing(Answering):
    """A desk whose anchor answered dev and whose jobs on the target all crash."""

    def facts(self, number: int) -> SimpleNamespace:
        return SimpleNamespace(has_anchor=True)

    def drive(self, stages, after=lambda end: (), ground=None):
        for run, stage in stages:
            end = StageEnd(run, stage, "crashed", "its engine fell over", cpu_seconds=1.0, seconds=1.0, attempts=1)
            self.record(end, self.ground)
            yield end


class Stopping(Crashing):
    """One that is asked to stop while they do."""

    def drive(self, stages, after=lambda end: (), ground=None):
        asked = list(stages)
        yield from super().drive(asked, after, ground)
        if asked:
            raise Stopped(STOPPED)


@dataclass(frozen=True)
class Drifting(Desk):
    """A desk whose jobs finish and leave nothing, in a round whose anchor was scored on the splits named."""

    answered: tuple[str, ...] = ()

    def facts(self, number: int) -> SimpleNamespace:
        return SimpleNamespace(
            anchor="a", has_anchor=True, scored=lambda name, split: [name] * (split in self.answered)
        )

    def drive(self, stages, after=lambda end: (), ground=None):
        for run, stage in stages:
            end = StageEnd(run, stage, "finished", "", 1.0, 1.0, 1)
            facts = {name: getattr(end, name) for name in ENDED}
            self.ledger.append("ended", f"{run.key}/{stage}", {"end": facts, "files": {}})
            yield end


@pytest.fixture
def scored(tmp_path: Path) -> RoundRuns:
    """Round 1 with two runs of its anchor, answered on dev."""
    made = desk_with(tmp_path, 8, 0)
    desk = Crashing(**{**vars(made), "suites": {"items": {"external-a": 2, "external-b": 2}}})
    runs = RoundRuns(desk, initial_policy(ORIGIN, {}, desk.campaign.constitution).replace(round=1))
    for run in runs.add(runs.anchor, 2):
        runs.ends[run.key, "dev"] = StageEnd(run, "dev", "finished", "", 1.0, 1.0, 1)
    return runs


@pytest.mark.parametrize("name", ["away.csv", "t.csv"])
def test_a_file_that_went_or_changed_pauses_before_a_look_is_paid(scored: RoundRuns, tmp_path: Path, name: str) -> None:
    table = tmp_path / "t.csv"
    kept = table.read_bytes()
    table.rename(tmp_path / name)
    if table.exists():
        table.write_bytes(kept + b"r40,question 40,40\n")
    with pytest.raises(Paused, match=r"before a look was paid, expected .*restore") as told:
        ask_external(scored, "external-a")
    assert scored.desk.looks.spent == 0 and len(scored.desk.ledger) == 0 and "\n" not in str(told.value)
    table.write_bytes(kept)
    with pytest.raises(Paused, match="crashed"):
        ask_external(scored, "external-a")
    assert scored.desk.looks.spent == 1, "restored, the same question is paid and put"


ALL_CRASHED = "all 2 jobs that scored external-a crashed, the first with: its engine fell over"


def started_again(before: RoundRuns) -> RoundRuns:
    """The round as the next controller finds it."""
    again = RoundRuns(before.desk, before.policy)
    for run in again.add(again.anchor, 2):
        again.ends[run.key, "dev"] = before.ends[run.key, "dev"]
    return again


def test_a_stage_of_which_every_job_crashed_pauses_once_and_then_the_round_goes_on(scored: RoundRuns) -> None:
    with pytest.raises(Paused, match=ALL_CRASHED), pauses(scored.desk.ledger):
        ask_external(scored, "external-a")
    again = started_again(scored)
    ask_external(again, "external-a")
    assert scored.desk.looks.spent == 1 and not again.scored("external-a")
    ask_external(again, "external-b")
    assert scored.desk.looks.spent == 1, "a verdict reads runs with both halves, and the anchor has none"


def test_a_stop_while_the_jobs_crash_does_not_lose_the_pause(scored: RoundRuns) -> None:
    """The controller that was stopped saw them crash; the next one saw no job end and paid the other half."""
    scored.desk = Stopping(**vars(scored.desk))
    with pytest.raises(Stopped):
        ask_external(scored, "external-a")
    again = started_again(scored)
    with pytest.raises(Paused, match=ALL_CRASHED), pauses(scored.desk.ledger):
        ask_external(again, "external-a")
    assert scored.desk.looks.spent == 1
    ask_external(started_again(scored), "external-a")


def test_a_controller_that_dies_before_it_enters_the_pause_leaves_it_to_the_next(scored: RoundRuns) -> None:
    """Whatever it entered last: a pause by another name stands for no pause of this stage."""
    ledger = scored.desk.ledger
    with pytest.raises(Paused, match=ALL_CRASHED):
        ask_external(scored, "external-a")  # and no `paused` is entered
    with pytest.raises(Paused), pauses(ledger):
        raise Paused("the disk is full", {})
    with pytest.raises(Paused, match=ALL_CRASHED), pauses(ledger):
        ask_external(started_again(scored), "external-a")
    assert [event.data["once"] for event in ledger.of_kind("paused")] == ["", "1/external-a"]
    ask_external(started_again(scored), "external-a")
    assert scored.desk.looks.spent == 1


class OnlyAnchors(Crashing):
    """A desk on which the target's first half is answered for the anchor alone, and its second for whoever asks."""

    def drive(self, stages, after=lambda end: (), ground=None):
        for run, stage in stages:
            fails = stage == "external-a" and run.candidate.settings != ORIGIN
            yield StageEnd(run, stage, "crashed" if fails else "finished", "", 1.0, 1.0, 1)


def test_the_second_half_is_not_paid_for_an_explorer_that_lacks_the_first(scored: RoundRuns) -> None:
    """Under dev a verdict reads both or none; where external is searched for the second half is judged alone."""
    desk = OnlyAnchors(**vars(scored.desk))
    other = candidate(desk.substrate_digest, write_all(ORIGIN, {"recipe.lr": 1e-3}))
    for objective, paid in (("dev", [scored.anchor.id]), ("external", [scored.anchor.id, other.id])):
        runs = RoundRuns(desk, scored.policy.replace(objective=objective, round=1 if objective == "dev" else 2))
        for run in (*runs.add(runs.anchor, 2), *runs.add(other, 1)):
            runs.ends[run.key, "dev"] = StageEnd(run, "dev", "finished", "", 1.0, 1.0, 1)
        for stage in ("external-a", "external-b"):
            ask_external(runs, stage)
        looks = [one for one in desk.looks.entries if one.round == runs.policy.round]
        assert [one.candidates for one in looks if one.split == "external-a"] == [(scored.anchor.id,), (other.id,)]
        assert [one.candidates[0] for one in looks if one.split == "external-b"] == paid, objective


def test_one_that_crashed_beside_one_that_finished_before_is_a_run_like_any(scored: RoundRuns) -> None:
    """The controller started anew between the two, so this start saw one end, and that a crash."""
    first = scored.runs[scored.anchor.id][0]
    end = StageEnd(first, "external-a", "finished", "", 1.0, 1.0, 1)
    scored.desk.ledger.append("ended", f"{first.key}/external-a", {"end": {n: getattr(end, n) for n in ENDED}})
    ask_external(scored, "external-a")
    assert scored.scored("external-a") == [first]


def drifting(runs: RoundRuns, *answered: str) -> Drifting:
    """The round's desk, where the cumulative estimand is declared and the anchor has these scores."""
    rules, items = runs.desk.campaign.constitution, runs.desk.suites["items"]
    rules = rules.replace(gap=rules.gap.replace(estimands=("selected", "mean", "cumulative")))
    changed = {"campaign": runs.desk.campaign.replace(constitution=rules), "answered": answered}
    return Drifting(**{**vars(runs.desk), **changed, "suites": {"items": {**items, "dev-a": 2, "dev-b": 2}}})


def asked(desk: Desk) -> list[str]:
    return [look.split for look in desk.looks.entries if look.round == 1]


@pytest.mark.parametrize("answered", [(), ("external-a",)])
def test_the_origin_is_not_asked_the_target_where_the_anchor_has_no_score_of_it(scored: RoundRuns, answered) -> None:
    desk = drifting(scored, *answered)
    ask_origin(desk, scored.policy, ())
    assert asked(desk) == ["dev-a", "dev-b"]


def test_a_file_that_went_pauses_before_the_origin_is_paid_for(scored: RoundRuns, tmp_path: Path) -> None:
    desk = drifting(scored, "external-a", "external-b")
    (tmp_path / "t.csv").rename(tmp_path / "away.csv")
    with pytest.raises(Paused, match=r"before a look was paid, expected .*t\.csv, found no file"):
        ask_origin(desk, scored.policy, ())
    assert asked(desk) == ["dev-a", "dev-b"] and desk.looks.spent == 0


def test_a_file_that_went_pauses_a_trial_before_it_pays_for_anything(scored: RoundRuns, tmp_path: Path) -> None:
    desk, root = scored.desk, tmp_path / "tried"
    side = candidate(desk.substrate_digest, ORIGIN)
    record = SimpleNamespace(campaign=desk.campaign)
    trial = Trial(record, None, ORIGIN, side, side, desk.ground, FIRST_TRIAL_ROUND, seeds=1)
    (tmp_path / "t.csv").rename(tmp_path / "away.csv")
    with pytest.raises(Paused, match=r"before a look was paid, expected .*t\.csv, found no file"):
        run_both(trial, root, ask_external=True)
    assert not CampaignFolder(root).looks.exists()
