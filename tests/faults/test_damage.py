"""What the fault schedules taught, one by one: each of these failed before its fix. And a flipped byte is found."""

import math
import os
import random
import sys
from contextlib import closing
from pathlib import Path

import pytest

from megatron_evolve.artefacts import load_yaml_checked, save_yaml
from megatron_evolve.budget import Account, Spend
from megatron_evolve.candidate import candidate
from megatron_evolve.constitution import Budgets
from megatron_evolve.document import load_yaml
from megatron_evolve.eval.looks import Look, Looks
from megatron_evolve.jobs import Ground, Run, drive, next_attempt
from megatron_evolve.launch import rundir
from megatron_evolve.launch.job import Job, JobOutcome, OutcomeKind
from megatron_evolve.launch.local import LocalLauncher
from megatron_evolve.ledger import Ledger, read_ledger
from megatron_evolve.retries import Retries
from tests.faults.cluster import Cluster, FakeLauncher, Troubles
from tests.faults.files import FaultyFiles, Killed
from tests.faults.invented import DEFAULT, SUBSTRATE, Invented, origin
from tests.faults.schedules import artefacts, drawn_campaign, start, undisturbed, world

STORY = 4  # two rounds and all their looks

# A file that the controller reads on when it comes back after the first round's evidence, by its pattern.
READ_AGAIN = (
    "ledger.jsonl",
    "campaign/rounds/1/policy.yaml",
    "campaign/rounds/1/evidence.json",
    "campaign/rounds/1/*/runs/*/dev/scores.parquet",
    "campaign/rounds/1/*/runs/*/external-b/scores.parquet",
    "campaign/rounds/1/*/runs/*/dev/scores.json",
)


def look(name: str) -> Look:
    return Look(candidates=(name,), runs=("1/a/2",), purpose="judge", split="dev-b", round=1, item_set="x", items=9)


def power_cut(files: FaultyFiles) -> None:
    """The machine goes dark before anything else is secured."""
    files.plan = {len(files.steps): "power_cut"}
    with pytest.raises(Killed):
        (Path(files.root) / "another").touch()
        os.close(os.open(Path(files.root) / "another", os.O_RDWR | os.O_CREAT))
    files.start({})


def test_a_power_cut_takes_no_event(tmp_path: Path) -> None:
    """The first event's file had no name that a power cut leaves: its folder was never fsynced."""
    with FaultyFiles(tmp_path) as files:
        with closing(Ledger(tmp_path)) as ledger:
            ledger.append("kind", "1", {})
        power_cut(files)
    assert [event.key for event in read_ledger(tmp_path / "ledger.jsonl")] == ["1"]


def test_an_event_that_a_resumed_controller_read_survives_a_power_cut(tmp_path: Path) -> None:
    """It was written by a controller that died before its fsync; the next one built on it without one."""
    with FaultyFiles(tmp_path) as files:
        with closing(Ledger(tmp_path)) as ledger:
            ledger.append("kind", "1", {})
            files.plan = {len(files.steps): "kill_after"}
            with pytest.raises(Killed):
                ledger.append("kind", "2", {})
        files.start({})
        with closing(Ledger(tmp_path)) as ledger:
            assert ledger.has("kind", "2")
        power_cut(files)
    assert [event.key for event in read_ledger(tmp_path / "ledger.jsonl")] == ["1", "2"]


def test_a_look_that_was_read_as_paid_survives_a_power_cut(tmp_path: Path) -> None:
    """Killed between writing the account's first line and securing it: the next controller took the look as paid."""
    path = tmp_path / "looks.jsonl"
    with FaultyFiles(tmp_path) as files:
        for step in range(8):
            files.start({step: "kill_after"})
            try:
                Looks(path, external_budget=1).pay(look(str(step)))
            except Killed:
                files.start({})
            paid = Looks(path, external_budget=1)
            paid.pay(look(str(step)))
            power_cut(files)
            assert Looks(path, external_budget=1).paid(candidate=str(step), round_number=1, split="dev-b"), step


def paused(root: Path) -> tuple[Invented, FaultyFiles, Cluster]:
    """A campaign that was killed just before it entered the evidence of round 1."""
    told = Invented(root, drawn_campaign(STORY), origin())
    files = FaultyFiles(told.folder.root)
    cluster = Cluster(random.Random(STORY), files, Troubles())
    with world(files, cluster):
        whole = undisturbed(STORY).steps
        step = whole.index("rename rounds/N/evidence.json")
        ended = start(told, files, cluster, {step + 1: "kill_before"})
    assert ended == "killed"
    assert told.folder.evidence(1).exists()
    return told, files, cluster


def refusal(told: Invented, files: FaultyFiles, cluster: Cluster) -> str:
    """What the controller says when it will not go on."""
    with world(files, cluster):
        try:
            ended = start(told, files, cluster, {})
        except ValueError as error:
            return str(error)
    assert ended.startswith("failed"), ended
    return ended


@pytest.mark.parametrize("pattern", READ_AGAIN)
def test_a_flipped_byte_is_found_and_its_file_named(pattern: str, tmp_path: Path) -> None:
    told, files, cluster = paused(tmp_path)
    if pattern.endswith("evidence.json"):  # it is made again, unless its event is there
        with closing(Ledger(told.folder.root)) as ledger:
            ledger.append("evidence", "1", {"digest": "0" * 64})
    path = sorted(tmp_path.rglob(pattern.removeprefix("campaign/")))[0]
    whole, rng = path.read_bytes(), random.Random(pattern)
    for _ in range(3):
        place = rng.randrange(len(whole) - 1)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert path.name in refusal(told, files, cluster)
    path.write_bytes(whole)
    if pattern.endswith("evidence.json"):
        return
    with world(files, cluster):
        assert start(told, files, cluster, {}) == "closed"
    assert artefacts(told) == artefacts(undisturbed(STORY).told)


def test_a_name_like_a_number_is_read_back_as_a_name(tmp_path: Path) -> None:
    """One candidate id in 300: its dead end made the policy unreadable, and the campaign could not go on."""
    value = {"candidate": "3206713938e6", "lr": 1e-05, "names": ["12e5", "1e5x", "0x1f", "no", "1_000"]}
    digest = save_yaml(tmp_path / "policy.yaml", value)
    assert load_yaml_checked(tmp_path / "policy.yaml", digest) == value
    assert load_yaml(tmp_path / "policy.yaml") == value


def test_attempts_that_were_called_off_are_no_losses(tmp_path: Path) -> None:
    """Two drains while a job waited, then one lost node: the job was given up, as if it had been lost three times."""
    told = Invented(tmp_path, drawn_campaign(STORY), origin())
    cluster = Cluster(random.Random(0), FaultyFiles(tmp_path), Troubles(lost=1.0), own_failures=0, most_losses=1)
    ground = Ground(told.folder, tmp_path / "substrate", tmp_path / "judge", 60.0)
    run = Run(1, candidate(SUBSTRATE, DEFAULT), 5)
    job = ground.job(run, "train")
    for attempt in (1, 2):
        rundir.prepare_attempt(job, attempt)
        outcome = JobOutcome.unmeasured(job.key, attempt, OutcomeKind.CANCELLED, "h", "was cancelled before it began")
        rundir.write_outcome(job.run_dir, outcome)
    with world(FaultyFiles(tmp_path / "unwatched"), cluster):
        # Asked to stop, it gave a lost job up for good: that is for the next start, which tries again.
        asked = lambda: bool(cluster.losses)  # noqa: E731
        assert list(drive(ground, FakeLauncher(cluster), [(run, "train")], lambda end: (), asked)) == []
        (end,) = drive(ground, FakeLauncher(cluster), [(run, "train")], lambda end: ())
    assert (end.outcome, end.attempts) == ("finished", 4)


def test_what_still_runs_is_set_aside_before_anything_else_starts(tmp_path: Path) -> None:
    """A controller that came back started a job beside one of before, though both at their worst were over budget."""
    told = Invented(tmp_path, drawn_campaign(STORY), origin())
    cluster = Cluster(random.Random(0), FaultyFiles(tmp_path), own_failures=0)
    ground = Ground(told.folder, tmp_path / "substrate", tmp_path / "judge", 60.0)
    new, old = (Run(1, candidate(SUBSTRATE, DEFAULT), seed) for seed in (5, 6))
    job = ground.job(old, "train")
    rundir.prepare_attempt(job, 1)
    cluster.begin(job, 1)
    cluster.budget = Spend(math.inf, 100.0, 0.0)  # one at its worst takes 70, and at most 20 in fact
    account = Account(Budgets(cpu_hours=100 / 3600))
    with world(FaultyFiles(tmp_path / "unwatched"), cluster):
        stages = [(new, "train"), (old, "train")]
        ends = list(drive(ground, FakeLauncher(cluster), stages, lambda end: (), account=account))
    assert [(end.run, end.outcome) for end in ends] == [(old, "finished"), (new, "finished")]
    assert cluster.exceeded == []


def test_a_damaged_outcome_does_not_stop_the_campaign(tmp_path: Path) -> None:
    """`next_attempt` fell over a file that the launcher puts aside by itself."""
    job = Job("key", (sys.executable, "-c", "pass"), tmp_path / "run", 60.0, "done")
    folder = rundir.prepare_attempt(job, 1)
    rundir.write_json(folder / rundir.SUPERVISOR_FILE, {"pid": 1, "start_ticks": 1, "boot_id": "b", "host": "h"})
    outcome = JobOutcome.unmeasured("key", 1, OutcomeKind.FINISHED, "h", "drawn")
    rundir.write_outcome(job.run_dir, outcome)
    (folder / rundir.OUTCOME_FILE).write_bytes(b'{"half')
    assert next_attempt(job, Retries()) == 1
    with LocalLauncher(1, tmp_path) as launcher:
        launcher.submit(job, next_attempt(job, Retries()))
        assert launcher.poll(["key"])["key"].kind is OutcomeKind.LOST
