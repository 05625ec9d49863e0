"""A campaign that its machine fails pauses, one whose budget is spent ends; both say so, and nothing is lost."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_evolve.audit import verify_campaign
from tests.megatron_evolve.tiny import Ground, command, events

pytestmark = pytest.mark.slow

STARTUP = str(Path(__file__).parent / "startup")


def attempts(folder: Path) -> list[Path]:
    return sorted(folder.glob("rounds/*/*/runs/*/*/attempts/*"))


def test_five_failures_in_a_row_pause_it_and_the_same_command_goes_on(
    ground: Ground, variant: Callable[..., Path], tmp_path: Path
) -> None:
    """No job can move as fast as this site wants, so each hangs; on a site with patience the campaign goes on."""
    for name, seconds in (("hasty", 0.001), ("patient", 900.0)):
        site = {"schema": "site/1", "stall_seconds": seconds, "start_seconds": seconds}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(site))
    folder, file = tmp_path / "campaign", variant(launch__cores=1)
    paused = ground.run(folder, "--site", str(tmp_path / "hasty.yaml"), file=file)
    assert paused.returncode == 69, paused.stderr
    told = " ".join(paused.stderr.split())
    assert "paused: 5 infrastructure failures in a row, last: 1/" in told
    assert (
        "hung (told no progress in 0 s since its start though it lived, and was stopped); mend that, then run" in told
    )
    assert "CPU-hours: " in paused.stdout and "if every job ran to its time limit, no budget" in paused.stdout
    status = json.loads(command("status", folder, "--json").stdout)
    assert (status["state"], status["paused"][:27]) == ("paused", "5 infrastructure failures i")
    assert [event for event in events(folder) if event["kind"] == "ended"] == [], "nothing was given up"
    failed = {path.parent.parent: int(path.name) for path in attempts(folder)}
    first_scored = "os.rename */rounds/1/*/dev/attempts/1/job.json"
    env = {"first": STARTUP, "TEST_KILL_AT": first_scored}
    stopped = ground.run(folder, "--site", str(tmp_path / "patient.yaml"), file=file, **env)
    assert stopped.returncode < 0, stopped.stderr
    kinds = [event["kind"] for event in events(folder)]
    assert kinds.count("resumed") == 1 and "ended" in kinds
    status = json.loads(command("status", folder, "--json").stdout)
    assert (status["state"], status["paused"]) == ("stopped", None), "it was killed, and pauses no more"
    end = next(event for event in events(folder) if event["kind"] == "ended")
    number, name, seed, stage = end["key"].split("/")
    run = folder / "rounds" / number / name / "runs" / seed / stage
    assert end["data"]["end"]["outcome"] == "finished"
    assert end["data"]["end"]["attempts"] == failed.get(run, 0) + 1, "its failures are kept, and were forgiven"


def test_a_spent_budget_ends_the_campaign_after_its_round(
    ground: Ground, variant: Callable[..., Path], tmp_path: Path
) -> None:
    """A job may take 70 s of a processor, and 74 are there: after a run or two none is safe to start."""
    folder = tmp_path / "campaign"
    rules = {"constitution__limits": {"max_steps": 20, "run_seconds": 60}}
    file = variant(**rules, constitution__budgets={"cpu_hours": 74 / 3600})
    done = ground.run(folder, "--json", file=file)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    found = answer["closing"]["finding"]
    assert answer["state"] == "closed" and answer["closing"]["final"] is None
    assert "budget spent after 1 of 2 rounds: 0.0" in found and "of 0.02056 CPU-hours are used" in found
    known = events(folder)
    (spent,) = [event for event in known if event["kind"] == "budget-spent"]
    charged = sum(event["data"]["end"]["cpu_seconds"] for event in known if event["kind"] == "ended")
    assert 4 < charged <= 74 and spent["data"]["cpu_hours"]["used"] == pytest.approx(charged / 3600, abs=1e-6)
    assert verify_campaign(folder)["ok"]
    page = (folder / "report.html").read_text()
    assert "budget spent" in page and "budget of CPU-hours" in page
    before = attempts(folder)
    assert ground.run(folder, file=file).returncode == 0
    assert attempts(folder) == before and events(folder) == known, "the same command starts nothing more"


def test_a_budget_below_one_job_is_refused_before_anything_starts(
    ground: Ground, variant: Callable[..., Path], tmp_path: Path
) -> None:
    file = variant(constitution__budgets={"cpu_hours": 0.4})
    refused = ground.run(tmp_path / "campaign", file=file)
    assert refused.returncode == 1
    told = "has a budget of 0.4 CPU-hours, and one training job may take 0.5028 until it is killed"
    assert told in refused.stderr and not (tmp_path / "campaign").exists()
