"""Workers and runs that fail: repaired a bounded number of times, every call charged, an ending never a score."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_evolve.audit import verify_campaign
from tests.megatron_evolve.tiny import Ground, environment, events

pytestmark = pytest.mark.slow

STARTUP = str(Path(__file__).parent / "startup")
DATA_BYTES = 1_600_000_000  # a process with the libraries loaded has 0.8 GB
PROPOSED = "os.rename */rounds/1/*/train/*/job.json"  # every worker was asked by then
SMALL = {
    "constitution__rounds": 1,
    "constitution__workers": 2,
    "constitution__external_looks": 0,
    "constitution__repairs": 2,
}

# Loses every number within twenty steps or so: each is larger than the one before, and nothing clips it.
WILD = {
    "recipe.optimizer": "sgd",
    "recipe.beta1": 0.999,
    "recipe.clip_grad": 0,
    "recipe.answer_loss_weight": 10,
    "recipe.schedule": "constant",
    "recipe.warmup_steps": 0,
    "recipe.steps": 40,
}


def proposed(folder: Path) -> list[dict[str, Any]]:
    return [event["data"] for event in events(folder) if event["kind"] == "proposed"]


def ended(folder: Path, stage: str = "train") -> list[dict[str, Any]]:
    """Ends of a stage for what is not the anchor."""
    mine = {one["candidate"] for one in proposed(folder)}
    found = [event for event in events(folder) if event["kind"] == "ended" and event["key"].endswith(f"/{stage}")]
    return [event["data"]["end"] for event in found if event["key"].split("/")[1] in mine]


BODIES = {
    "malformed": ("reply.write_text('{')", "malformed"),
    "crashed": ("sys.exit('no idea')", "malformed"),
    "nothing": ("pass", "malformed"),
    "refused": ("answer({'recipe.lr': {'scale': 1.0}})", "refused"),
}


@pytest.mark.parametrize("what", BODIES)
def test_a_worker_that_never_answers_well_is_asked_a_bounded_number_of_times(
    what: str, ground: Ground, worker: Callable[[str], list[str]], variant: Callable[..., Path], tmp_path: Path
) -> None:
    body, ending = BODIES[what]
    file = variant(**SMALL, worker=worker(body))
    folder = tmp_path / "campaign"
    stopped = ground.run(folder, file=file, first=STARTUP, TEST_KILL_AT=PROPOSED)
    assert stopped.returncode < 0, stopped.stderr
    calls = proposed(folder)
    assert [one["call"]["ending"] for one in calls] == [ending] * 3, "one proposal and two repairs, each charged"
    assert [one["call"]["verb"] for one in calls] == ["propose", "repair", "repair"]
    assert all(one["refused"] and not one["candidate"] for one in calls)
    briefs = [json.loads(path.read_bytes()) for path in sorted(folder.glob("rounds/1/workers/1/*/brief.json"))]
    assert [brief["reason"] for brief in briefs] == ["", calls[0]["refused"], calls[1]["refused"]]


def test_a_worker_that_recovers_is_taken_at_its_word(
    ground: Ground, worker: Callable[[str], list[str]], variant: Callable[..., Path], tmp_path: Path
) -> None:
    file = variant(**SMALL, worker=worker("answer({'recipe.steps': {'set': 4}}) if calls else sys.exit('not yet')"))
    folder = tmp_path / "campaign"
    done = ground.run(folder, file=file)
    assert done.returncode == 0, done.stderr
    assert [one["call"]["ending"] for one in proposed(folder)] == ["malformed", "ok"]
    for stage in ("train", "dev"):  # at the closing more are trained, where these settings stand
        assert {end["outcome"] for end in ended(folder, stage)} == {"finished"}
    assert verify_campaign(folder)["ok"]


def test_an_unavailable_worker_pauses_the_campaign(
    ground: Ground, worker: Callable[[str], list[str]], variant: Callable[..., Path], tmp_path: Path
) -> None:
    body = "answer({'recipe.steps': {'set': 4}}) if calls > 2 else sys.exit(75)"
    file = variant(**SMALL, worker=worker(body))
    folder = tmp_path / "campaign"
    paused = ground.run(folder, file=file)
    assert paused.returncode == 75
    assert "unavailable" in paused.stdout
    assert proposed(folder) == [], "nobody answered in its place"
    stopped = ground.run(folder, file=file, first=STARTUP, TEST_KILL_AT=PROPOSED)
    assert stopped.returncode < 0, stopped.stderr
    assert [one["call"]["ending"] for one in proposed(folder)] == ["ok"]


def test_a_killed_worker_is_asked_again_at_no_charge(
    ground: Ground, worker: Callable[[str], list[str]], variant: Callable[..., Path], tmp_path: Path
) -> None:
    body = "answer({'recipe.steps': {'set': 4}}) if calls else os.kill(os.getpid(), signal.SIGKILL)"
    file = variant(**SMALL, worker=worker(body))
    folder = tmp_path / "campaign"
    ground.run(folder, file=file, first=STARTUP, TEST_KILL_AT=PROPOSED)
    assert [one["call"]["ending"] for one in proposed(folder)] == ["ok"]


def test_a_diverged_run_is_repaired_within_bounds(
    ground: Ground, worker: Callable[[str], list[str]], variant: Callable[..., Path], tmp_path: Path
) -> None:
    wild = {name: {"set": value} for name, value in WILD.items()}
    body = f"change = {wild!r}\nchange['recipe.lr'] = {{'set': 1.0 - calls / 100}}\n"
    limits = {"max_steps": 60}
    file = variant(
        **SMALL,
        constitution__limits=limits,
        worker=worker(f"{body}answer(change if calls < 2 else {{'recipe.steps': {{'set': 4}}}})"),
    )
    folder = tmp_path / "campaign"
    done = ground.run(folder, "--json", file=file)
    assert done.returncode == 0, done.stderr
    calls = proposed(folder)
    outcomes = [end["outcome"] for end in ended(folder)]
    assert [one["call"]["ending"] for one in calls] == ["ok"] * 3
    assert outcomes[:3] == ["diverged", "diverged", "finished"]
    briefs = [json.loads(path.read_bytes()) for path in sorted(folder.glob("rounds/1/workers/1/*/brief.json"))]
    assert [brief["ending"] for brief in briefs] == ["", "diverged", "diverged"]
    assert "diverged at step" in briefs[1]["reason"]
    answer = json.loads(done.stdout)
    shown = {one["id"]: one for one in answer["rounds"][0]["candidates"]}
    for call in calls[:2]:
        assert shown[call["candidate"]]["dev"] is None, "no score for a run that diverged"
        assert shown[call["candidate"]]["runs"][0]["outcome"] == "diverged"
    assert shown[calls[2]["candidate"]]["dev"] is not None
    assert verify_campaign(folder)["ok"]


def test_runs_out_of_time_end_the_round_without_an_effect(
    ground: Ground, variant: Callable[..., Path], tmp_path: Path
) -> None:
    """Not even the anchor finishes: the round is judged unresolved and the campaign closes."""
    limits = {"max_steps": 20, "run_seconds": 0.05}
    file = variant(**SMALL, constitution__limits=limits)
    folder = tmp_path / "campaign"
    done = ground.run(folder, "--json", file=file)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    kinds = {run["outcome"] for one in answer["rounds"][0]["candidates"] for run in one["runs"]}
    assert kinds == {"timed_out"}
    assert all(one["dev"] is None for one in answer["rounds"][0]["candidates"])
    assert {one["outcome"] for one in answer["rounds"][0]["verdicts"]} == {"UNRESOLVED"}
    assert len(proposed(folder)) == 3
    assert verify_campaign(folder)["ok"]


def test_a_run_without_memory_is_repaired(
    ground: Ground, worker: Callable[[str], list[str]], variant: Callable[..., Path], tmp_path: Path
) -> None:
    """A limit on its data makes a large batch fail as a full machine would: by its allocator's own words."""
    if shutil.which("prlimit") is None:
        pytest.skip("limiting memory needs prlimit")
    large = "{'recipe.batch_size': {'set': 4096}, 'recipe.steps': {'set': 2}, 'recipe.warmup_steps': {'set': 0}}"
    file = variant(**SMALL, worker=worker(f"answer({{'recipe.steps': {{'set': 4}}}} if calls else {large})"))
    folder = tmp_path / "campaign"
    limited = ["prlimit", f"--data={DATA_BYTES}", *ground.arguments(folder, "--json", file=file)]
    done = subprocess.run(limited, env=environment(), capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [end["outcome"] for end in ended(folder)][:2] == ["out_of_memory", "finished"]
    brief = json.loads((folder / "rounds/1/workers/1/1/brief.json").read_bytes())
    assert (brief["verb"], brief["ending"]) == ("repair", "out_of_memory")
    assert verify_campaign(folder)["ok"]
