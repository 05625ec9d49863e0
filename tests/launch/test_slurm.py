"""Slurm's script of a job: its options and ranks, and what does not fill whole nodes is refused."""

import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_evolve.launch.job import Job, Resources
from megatron_evolve.launch.slurm import Queue, render

NODE = Queue(gpus_per_node=8)


def job(tmp_path: Path, *argv: str, **fields: object) -> Job:
    return Job("1/ab/train", argv or ("true",), tmp_path / "run", 90.0, "done", **fields)


def options(script: str) -> dict[str, str]:
    """The script's options as sbatch reads them."""
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return dict(shlex.split(line)[0].split("=", 1) for line in lines)


def test_ranks_are_srun_s_tasks_on_whole_nodes(tmp_path: Path) -> None:
    wide = job(tmp_path, "python3", "-m", "train", resources=Resources(cores=128, gpus=16, tasks=16))
    queue = Queue(8, account="me", partition="batch,long", constraint="h100&nvlink")
    script = render(wide, queue)
    assert options(script) == {
        "job-name": "1/ab/train",
        "nodes": "2",
        "ntasks-per-node": "8",
        "cpus-per-task": "8",
        "gpus-per-node": "8",
        "time": "2",
        "output": str(tmp_path / "run" / "slurm-%j.log"),
        "account": "me",
        "partition": "batch,long",
        "constraint": "h100&nvlink",
    }
    assert script.endswith("exec srun --kill-on-bad-exit=1 --cpus-per-task=8 python3 -m train\n")


def test_one_process_needs_no_srun_and_a_part_of_a_node_no_other(tmp_path: Path) -> None:
    script = render(job(tmp_path, resources=Resources(cores=16, gpus=2)), NODE)
    asked = {"nodes": "1", "ntasks-per-node": "1", "cpus-per-task": "16", "gpus-per-node": "2"}
    assert asked.items() <= options(script).items()
    assert script.endswith("exec true\n")
    assert "gpus-per-node" not in options(render(job(tmp_path), NODE))


def test_the_script_does_what_the_job_does(tmp_path: Path) -> None:
    script = render(job(tmp_path, "/bin/sh", "-c", 'echo "$HELLO"', env={"HELLO": "it's; here"}), NODE)
    done = subprocess.run(["/bin/sh"], input=script, text=True, capture_output=True, check=True)
    assert done.stdout == "it's; here\n"


@pytest.mark.parametrize(("gpus", "tasks"), [(12, 12), (16, 3)])
def test_what_does_not_fill_whole_nodes_is_refused(gpus: int, tasks: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"whole nodes of 8 GPUs.*asks for {gpus} GPUs and {tasks} tasks"):
        render(job(tmp_path, resources=Resources(cores=16, gpus=gpus, tasks=tasks)), NODE)
