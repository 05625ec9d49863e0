"""Where a campaign stands this moment: its document is whole in every state, and reading it leaves no trace."""

import json
import os
import shutil
import time
from collections import deque
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_evolve import standing as module
from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.cli import app
from megatron_evolve.launch.rundir import Lock, LockHeld, Queued
from megatron_evolve.ledger import Event, Ledger, read_ledger
from megatron_evolve.schema import describe
from megatron_evolve.standing import Standing, standing
from megatron_evolve.status import status
from megatron_evolve.tally import Tally
from tests.megatron_evolve.campaign_folder import build_campaign, build_empty
from tests.megatron_evolve.moment import candidates, hold, me, nobody, put_job, stranger

KINDS = {
    "empty": build_empty,
    "open": lambda root: build_campaign(root, judged=1, closed=False),
    "closed": lambda root: build_campaign(root, judged=1, closed=True),
    "without target": lambda root: build_campaign(root, judged=1, closed=True, external=False),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("standing")
    return {name: build(root / name.replace(" ", "-")) for name, build in KINDS.items()}


@pytest.fixture
def campaign(made: dict[str, Path], tmp_path: Path) -> Path:
    """An open campaign in its second round, to be changed."""
    return Path(shutil.copytree(made["open"], tmp_path / "campaign"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_document_is_as_its_schema_says(made: dict[str, Path], kind: str) -> None:
    document = json.loads(json.dumps(standing(made[kind])))
    Standing.parse(document, where="status --json")
    fixed = {name: one for name, one in status(made[kind]).items() if name not in ("state", "budget")}
    assert document.items() >= fixed.items()
    ended = CliRunner().invoke(app, ["status", str(made[kind]), "--json"])
    again = json.loads(ended.stdout)
    assert again["budget"].keys() == document["budget"].keys()
    assert {**again, "budget": None} == {**document, "budget": None}, "but for the wall time, which goes on"
    assert CliRunner().invoke(app, ["status", str(made[kind])]).exit_code == 0


def test_the_schema_command_tells_every_field() -> None:
    told = describe("status")
    for name in Standing.model_fields:
        assert f"\n{name}" in told, name
    for path in (
        "jobs.now[].waits_for",
        "rounds[].candidates[].runs[].outcome",
        "survey.subfamilies.NAME.accuracy",
        "closing.final.gain.mean",
    ):
        assert f"\n{path}  " in told, path
    untold = [line for line in told.splitlines() if "  any" in line or "View" in line]
    assert not untold, "records and lists of records are descended into"


@pytest.mark.parametrize(
    ("holder", "last", "expected"),
    [(None, None, "stopped"), (me, None, "running"), (nobody, None, "stopped"), (nobody, "paused", "paused")],
    ids=["never started", "alive", "dead", "paused by itself"],
)
def test_the_state_is_the_controller_s(campaign: Path, holder, last: str | None, expected: str) -> None:
    if holder:
        hold(campaign, holder())
    if last:
        ledger = Ledger(campaign)
        ledger.append(last, "1", {"why": "three nodes in a row could not be reached"})
        ledger.close()
    found = standing(campaign)
    assert found["state"] == expected
    told = CliRunner().invoke(app, ["watch", str(campaign), "--once"]).stdout
    assert ("three nodes in a row" in told) == (expected == "paused")
    assert (found["progress"]["seconds_left"] is not None) == (expected == "running")
    assert found["stop_asked"] is False
    (campaign / "stop").touch()
    assert standing(campaign)["stop_asked"] is True


def test_before_it_is_opened(made: dict[str, Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(made["empty"], tmp_path / "campaign"))
    assert standing(root)["state"] == "stopped"
    hold(root, me())
    assert standing(root)["state"] == "preparing"


def test_a_controller_elsewhere_lives_while_something_is_written(campaign: Path, monkeypatch) -> None:
    hold(campaign, stranger())
    found = standing(campaign)
    assert (found["state"], found["controller"]["alive"]) == ("running", None)
    now = module.time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 2 * module.QUIET_S)
    assert standing(campaign)["state"] == "stopped"


def test_jobs_as_their_files_say(campaign: Path) -> None:
    name, *_ = candidates(campaign, 2)
    hold(campaign, me())
    dead = nobody()
    put_job(campaign, f"2/{name}/1/train", supervisor=me(), progress=(30, 120))
    put_job(campaign, f"2/{name}/2/train", supervisor=dead, progress=(5, 120))
    put_job(campaign, f"2/{name}/3/train")
    put_job(campaign, f"2/{name}/4/dev", supervisor=me(), outcome={"kind": "finished"})
    put_job(campaign, f"2/{name}/5/train", supervisor=dead, attempt=1)
    put_job(campaign, f"2/{name}/5/train", supervisor=me(), progress=(1, 2), attempt=2)
    put_job(campaign, f"2/{name}/6/train", supervisor=stranger())
    ended = next(event.key for event in read_ledger(campaign / "ledger.jsonl") if event.key.startswith(f"2/{name}/"))
    put_job(campaign, ended, supervisor=me(), progress=(1, 120))
    (campaign / "rounds/2" / name / "runs/7/train/attempts/1").mkdir(parents=True)  # being made
    (campaign / "rounds/2/a-file").touch()
    jobs = standing(campaign)["jobs"]
    found = {job["seed"]: (job["state"], job["step"], job["steps"], job["attempt"]) for job in jobs["now"]}
    assert found == {
        1: ("running", 30, 120, 1),
        2: ("gone", 5, 120, 1),
        3: ("waiting", None, None, 1),
        4: ("ended", None, None, 1),
        5: ("running", 1, 2, 2),
        6: ("running", None, None, 1),
    }
    assert (jobs["running"], jobs["waiting"]) == (3, 1)
    assert all(0 <= job["told_seconds_ago"] < 60 for job in jobs["now"] if job["step"] is not None)


def test_why_a_scheduler_has_not_started_a_job(campaign: Path) -> None:
    """Its last word, as long as that is newer than the attempt's own: a job that is put back waits again."""
    name, *_ = candidates(campaign, 2)
    hold(campaign, me())
    full = Queued("job-1", "Pending", "", "Unschedulable, 0/4 nodes are available: 4 Insufficient [nvidia.com/gpu].")
    put_job(campaign, f"2/{name}/1/train", queued=full)
    put_job(campaign, f"2/{name}/2/train", queued=full)
    put_job(campaign, f"2/{name}/3/train", queued=replace(full, state="PENDING", reason="JobHeldUser"))
    put_job(campaign, f"2/{name}/4/train", queued=replace(full, state="RUNNING", reason=""), supervisor=stranger())
    put_job(campaign, f"2/{name}/5/train", queued=replace(full, reason="BeginTime"), supervisor=stranger())
    begun = put_job(campaign, f"2/{name}/6/train", queued=full, supervisor=stranger(), progress=(3, 9))
    put_job(campaign, f"2/{name}/7/train", queued=full, outcome={"kind": "lost"})
    (put_job(campaign, f"2/{name}/8/train") / "queue.json").write_text('{"job": ')
    later = time.time() + 60
    os.utime(begun / "supervisor.json", (later, later))
    os.utime(campaign / f"rounds/2/{name}/runs/5/train/attempts/1/queue.json", (later, later))
    found = standing(campaign)
    assert {job["seed"]: (job["state"], job["waits_for"]) for job in found["jobs"]["now"]} == {
        1: ("waiting", full.reason),
        2: ("waiting", full.reason),
        3: ("waiting", "JobHeldUser"),
        4: ("running", None),
        5: ("waiting", "BeginTime"),
        6: ("running", None),
        7: ("ended", None),
        8: ("waiting", None),
    }
    for command in (["status", str(campaign)], ["watch", str(campaign), "--once"]):
        told = " ".join(CliRunner().invoke(app, command).stdout.split())
        assert "2 waiting: Unschedulable, 0/4 nodes are available: 4 Insufficient" in told, command
        assert "1 waiting: JobHeldUser" in told or command[0] == "watch"


NOTHING = (
    b"",
    b'{"step": 3, "ste',
    b"\xff",
    b"[]",
    b'{"step": 3}',
    b'{"step": "x", "steps": 9, "at": 0}',
    b'{"step": 1, "steps": 0, "at": 0}',
    b'{"step": 1, "steps": 1e999, "at": 0}',
)


@pytest.mark.parametrize("content", NOTHING)
def test_progress_that_says_nothing_is_not_known(campaign: Path, content: bytes) -> None:
    name, *_ = candidates(campaign, 2)
    put_job(campaign, f"2/{name}/1/train", supervisor=me(), progress=content)
    (job,) = standing(campaign)["jobs"]["now"]
    assert (job["state"], job["step"], job["steps"]) == ("running", None, None)


def test_a_job_that_counts_wrong_is_held_to_its_bounds(campaign: Path) -> None:
    name, *_ = candidates(campaign, 2)
    put_job(campaign, f"2/{name}/1/train", supervisor=me(), progress=(130, 120))
    (job,) = standing(campaign)["jobs"]["now"]
    assert (job["step"], job["steps"]) == (120, 120)


def test_looking_leaves_no_trace_and_takes_no_lock(campaign: Path) -> None:
    def traces() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in campaign.rglob("*")}

    with Lock(campaign / "controller.lock"):
        before = traces()
        found = standing(campaign)
        assert (found["state"], found["controller"]["pid"]) == ("running", os.getpid())
        assert traces() == before
        with pytest.raises(LockHeld):
            Lock(campaign / "controller.lock").acquire()
    Lock(campaign / "controller.lock").acquire().release()


def event(number: int, at_s: float, kind: str, key: str = "", **data) -> Event:
    moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=at_s)
    return Event(number=number, time=moment.isoformat(), kind=kind, key=key, data=data, previous="", hash="")


def test_the_time_left_leaves_pauses_out() -> None:
    """Two rounds of three runs of 10 s, one after another; a night between the second and the third."""
    end = {"outcome": "finished", "reason": "", "cpu_seconds": 9.0, "seconds": 10.0, "attempts": 1}
    events = [
        event(0, 0, "campaign-opened", plan={"rounds": 2, "runs_per_round": 3, "external_looks": 0}),
        event(1, 0, "round-opened", "1"),
        event(2, 10, "ended", "1/a/1/train", end=end),
        event(3, 20, "ended", "1/a/2/train", end=end),
        event(4, 40_020, "ended", "1/b/1/train", end=end),
    ]
    tally = Tally.of(events)
    assert tally.seconds_left() == pytest.approx(30)
    assert tally.seconds_left(running=0.5) == pytest.approx(25)
    tally.add(event(5, 40_020, "round-closed", "1"))
    assert (tally.runs_left, tally.seconds_left()) == (3, pytest.approx(30))
    assert Tally.of(events[:2]).seconds_left() is None
    tally.add(event(6, 40_020, "round-opened", "2"))
    tally.add(event(7, 40_020, "ended", "2/c/1/train", end=end))
    tally.add(event(8, 40_020, "ended", "2/c/2/train", end=end))
    assert tally.runs_left == 1
    tally.add(event(9, 40_020, "round-closed", "2"))
    assert tally.seconds_left() is None


def test_what_the_tally_holds_does_not_grow_with_the_rounds() -> None:
    end = {"outcome": "lost", "reason": "gone", "cpu_seconds": 9.0, "seconds": 10.0, "attempts": 1}
    tally = Tally.of([event(0, 0, "campaign-opened", plan={"rounds": 99, "runs_per_round": 3, "external_looks": 0})])
    for number in range(1, 60):
        tally.add(event(0, number, "round-opened", str(number)))
        tally.add(event(0, number, "proposed", f"{number}/1/0", candidate=f"c{number}", axis="lr"))
        tally.add(event(0, number, "ended", f"{number}/c{number}/1/train", end=end))
        tally.add(event(0, number, "evidence", str(number)))
    held = [len(value) for value in vars(tally).values() if isinstance(value, dict | set | deque)]
    assert max(held) <= 5
    assert tally.outcomes == {"lost": 59}


def test_the_folder_of_a_campaign_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no campaign"):
        standing(tmp_path)
    assert CampaignFolder(tmp_path).root.exists() and not list(tmp_path.iterdir())
