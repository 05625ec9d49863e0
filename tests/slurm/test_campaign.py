"""A whole campaign on a real Slurm of four nodes gives what one machine gives, whatever happens to its controller."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_evolve.launch.slurm import SCRIPTS
from tests.megatron_evolve import tiny
from tests.megatron_evolve.conftest import ground  # noqa: F401 -- a fixture: the tiny ground, its origin scored
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import until

pytestmark = pytest.mark.slow
# Two anchors and one explorer a round; nothing is asked outside and nothing promoted by so few runs.
RULES = {"rounds": 2, "workers": 2, "anchor_seeds": 2, "external_looks": 0, "promote_probability": 0.999}
# A node for each job, so that all nodes work.
SLURM = {"partition": "main", "throttle": 4, "options": {"exclusive": ""}}
SITE = {"schema": "site/1", "launcher": "slurm", "slurm": SLURM}
VARIES = {"seconds", "cpu_seconds", "attempts"}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(one) for name, one in value.items() if name not in VARIES}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def ended(folder: Path) -> dict[str, dict[str, Any]]:
    """How each stage ended, by its key."""
    found = tiny.events(folder) if (folder / "ledger.jsonl").exists() else []
    stages = [event for event in found if event["kind"] == "ended"]
    assert len({event["key"] for event in stages}) == len(stages)
    return {event["key"]: event["data"]["end"] for event in stages}


def test_a_campaign_on_four_nodes_is_the_campaign_of_one_machine(
    ground: tiny.Ground,  # noqa: F811
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = ground.settings()
    settings["constitution"] |= RULES
    settings["search"] = {"replicates": {"explorer": 1, "confirm_candidates": 0, "confirm_seeds": 1}}
    file, site, here, there = (tmp_path / name for name in ("small.yaml", "site.yaml", "here", "there"))
    file.write_text(yaml.safe_dump(settings))
    site.write_text(yaml.safe_dump(SITE))
    done = ground.run(here, file=file)
    assert done.returncode == 0, done.stderr

    # The first controller is killed while its jobs run.
    words = ground.arguments(there, "--site", str(site), file=file)
    with open(tmp_path / "first.log", "w") as log:
        first = subprocess.Popen(words, env=tiny.environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    until(lambda: list(there.glob("rounds/1/*/runs/*/train/metrics.jsonl")), "a training of round 1")
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL

    # The second is a job, told to stop in the middle: it puts itself back and goes on.
    program = tmp_path / "megatron-evolve"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m megatron_evolve.cli "$@"\n')
    program.chmod(0o755)
    for name, value in {**tiny.environment(), "MEGATRON_EVOLVE": str(program)}.items():
        monkeypatch.setenv(name, value)
    log = f"--output={tmp_path}/controller.log"
    job = cluster.run("sbatch", "--parsable", log, str(SCRIPTS / "controller.sbatch"), *words[len(tiny.COMMAND) + 1 :])
    until(lambda: len(ended(there)) > 2, "three ends in the ledger")
    cluster.run("scancel", "--signal=TERM", "--batch", job)
    state = ["squeue", "--noheader", "--states=all", "--jobs", job, "--format=%T"]
    until(lambda: cluster.run(*state) == "COMPLETED", "the end of the campaign", within_s=1500)
    shown = cluster.run("scontrol", "--oneliner", "show", "job", job)
    assert " Restarts=1 " in shown, (tmp_path / "controller.log").read_text()

    assert without_times(ended(there)) == without_times(ended(here))
    assert {end["attempts"] for end in ended(there).values()} == {1}
    for number in (1, 2):
        one, other = (json.loads((root / f"rounds/{number}/evidence.json").read_text()) for root in (here, there))
        assert without_times(other) == without_times(one)
        one, other = ((root / f"rounds/{number}/policy.yaml").read_text() for root in (here, there))
        assert other == one
    outcomes = list(there.rglob("attempts/*/outcome.json"))
    assert len(outcomes) == len(ended(there))
    hosts = {json.loads(path.read_text())["host"] for path in outcomes}
    assert hosts <= {"n1", "n2", "n3", "n4"} and len(hosts) >= 3
    assert not list(there.rglob("attempts/*/starts/1.json"))  # none was started twice
    assert os.path.getsize(there / "report.html") > 0
    verified = tiny.command("verify", there, "--json")
    assert verified.returncode == 0, verified.stdout
