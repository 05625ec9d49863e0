"""A moment of an invented campaign: its controller and its jobs, as their files would stand while they run."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.launch.process import ProcessIdentity
from megatron_evolve.launch.rundir import Queued, write_json, write_queued
from megatron_evolve.ledger import read_ledger


def me() -> dict:
    """This process, which lives."""
    return asdict(ProcessIdentity.of(os.getpid()))


def nobody() -> dict:
    """A process of this machine that ended."""
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    identity = asdict(ProcessIdentity.of(process.pid))
    process.communicate()
    return identity


def stranger() -> dict:
    """A process of another machine, or of another container of this one."""
    return {**nobody(), "host": "elsewhere"}


def hold(root: Path, identity: dict) -> None:
    """The lock file as that process leaves it; nobody holds the lock itself."""
    (root / "controller.lock").write_text(json.dumps(identity))


def candidates(root: Path, number: int) -> list[str]:
    """Candidates that were proposed in a round."""
    events = read_ledger(CampaignFolder(root).ledger)
    return [event.data["candidate"] for event in events if event.kind == "proposed" and event.data["round"] == number]


def put_job(
    root: Path,
    key: str,
    *,
    supervisor: dict | None = None,
    progress: tuple[int, int] | bytes | None = None,
    outcome: dict | None = None,
    attempt: int = 1,
    queued: Queued | None = None,
) -> Path:
    """An attempt's folder. `progress` is (step, steps), or the file's bytes."""
    number, name, seed, stage = key.split("/")
    folder = root / "rounds" / number / name / "runs" / seed / stage / "attempts" / str(attempt)
    folder.mkdir(parents=True)
    write_json(folder / "job.json", {"key": key})
    if supervisor is not None:
        write_json(folder / "supervisor.json", supervisor)
    if isinstance(progress, bytes):
        (folder / "progress.json").write_bytes(progress)
    elif progress is not None:
        told = {"step": progress[0], "steps": progress[1], "at": time.time(), "rank": 0, "stage": "train"}
        write_json(folder / "progress.json", told)
    if queued is not None:
        write_queued(folder, queued)
    if outcome is not None:
        write_json(folder / "outcome.json", outcome)
    return folder
