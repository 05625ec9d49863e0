"""Megatron on two nodes: four ranks with tensor and expert parallelism train what one process does, stop and go on."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_evolve.launch import rundir
from megatron_evolve.launch.job import Job, OutcomeKind, Resources
from megatron_evolve.launch.slurm_launcher import SUBMISSION_FILE, SlurmLauncher
from megatron_evolve.substrate.manifest import read_manifest
from megatron_evolve.substrate.recipe import Recipe
from megatron_evolve.substrate.settings import Settings
from tests.megatron_evolve.tiny import environment
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ends, running, until

pytestmark = pytest.mark.slow
RECIPE = Recipe(steps=24, batch_size=16, warmup_steps=2)
BUILD = """
import sys
from dataclasses import replace
from pathlib import Path
from megatron_evolve.substrate.build import NANO, build_substrate
build_substrate(replace(NANO, pretraining=NANO.pretraining.replace(steps=2, warmup_steps=1)), Path(sys.argv[1]), 0)
"""
# Gloo looks for an interface of the host's name; all nodes are on the loopback.
ENV = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture
def trainings(cluster: Cluster, tmp_path: Path) -> Callable[..., Job]:
    """Makes a training run of the nano architecture as a job."""
    substrate = tmp_path / "substrate"
    subprocess.run([sys.executable, "-c", BUILD, str(substrate)], env=environment(), check=True)
    manifest = read_manifest(substrate)
    settings = Settings(mix=manifest.default.mix, recipe=RECIPE).model_dump(mode="json")
    candidate = tmp_path / "candidate.json"
    candidate.write_text(json.dumps({"id": "c0", "substrate": manifest.digest, "settings": settings}))

    def make(name: str, *more: str, ranks: int = 1) -> Job:
        out = tmp_path / "runs" / name
        argv = (sys.executable, "-m", "megatron_evolve.substrate.train.run", "--substrate", str(substrate))
        argv += ("--candidate", str(candidate), "--seed", "5", "--out", str(out), "--save-every", "0", *more)
        asked = Resources(cores=ranks, gpus=ranks if ranks > 1 else 0, tasks=ranks)
        return Job(name, argv, out, 600.0, "result.json", env=ENV, resources=asked, grace_s=60.0)

    return make


def losses(job: Job) -> list[float]:
    path = job.run_dir / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()] if path.exists() else []


def test_four_ranks_on_two_nodes_stop_together_and_go_on_to_the_same_losses(
    make_launcher: Callable[..., SlurmLauncher], trainings: Callable[..., Job], cluster: Cluster
) -> None:
    launcher = make_launcher()
    alone = trainings("alone")
    whole, stopped = (trainings(name, "--layout", "tp=2,ep=2", ranks=4) for name in ("whole", "stopped"))
    for job in (stopped, alone):
        launcher.submit(job)
    running(launcher, stopped)
    folder = stopped.run_dir / "attempts/1"
    until(lambda: len(losses(stopped)) > 2, "three steps")
    assert "n[" in rundir.read_json(folder / rundir.QUEUE_FILE)["nodes"]
    cluster.run("scancel", "--signal=TERM", "--batch", rundir.read_json(folder / SUBMISSION_FILE)["job"])
    until((folder / "starts/0.json").exists, "the end of the first start")
    first = rundir.read_json(folder / "starts/0.json")
    saved = [path.name for path in (stopped.run_dir / "resume").iterdir()]
    assert first["kind"] == "lost" and not (stopped.run_dir / "result.json").exists(), first
    assert (folder / "stderr.log").read_text().count("stopped as asked and saved after step") == 4
    assert saved == [f"step-{len(losses(stopped)):09d}"] and 2 < len(losses(stopped)) < RECIPE.steps
    launcher.submit(whole)
    outcomes = ends(launcher, alone, whole, stopped)
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.FINISHED] * 3, outcomes
    assert len(losses(whole)) == RECIPE.steps
    assert losses(stopped) == losses(whole)
    assert losses(whole) == pytest.approx(losses(alone), rel=1e-4)
    assert outcomes[0].cpu_seconds is not None and outcomes[1].cpu_seconds is None
