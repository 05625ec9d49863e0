"""Slurm: a job as the script that `sbatch` takes. Nothing here submits, polls or cancels yet.

A job's tasks are srun's own ranks: signals reach them, and no agent stands between them and their exit status. They
are spread evenly over as many whole nodes as the GPUs fill.
"""

import math
import shlex
from dataclasses import dataclass

from megatron_evolve.launch.job import Job


@dataclass(frozen=True)
class Queue:
    """Where a cluster takes jobs, and how many GPUs each of its nodes has. None leaves a choice to the cluster."""

    gpus_per_node: int
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None


def render(job: Job, queue: Queue) -> str:
    """The script of a job. Raises ValueError where its GPUs or tasks do not fill whole nodes."""
    nodes = num_nodes(job, queue)
    asked = job.resources
    tasks = asked.tasks // nodes
    cores = max(1, asked.cores // asked.tasks)
    options = {
        "job-name": job.key,
        "nodes": nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": cores,
        "gpus-per-node": asked.gpus // nodes or None,
        "time": math.ceil(job.time_limit_s / 60),  # whole minutes
        "output": job.run_dir / "slurm-%j.log",
        "account": queue.account,
        "partition": queue.partition,
        "qos": queue.qos,
        "constraint": queue.constraint,
    }
    lines = ["#!/bin/sh"]
    lines += [f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(job.env.items())]
    # Since 22.05 srun does not take over sbatch's --cpus-per-task.
    srun = f"srun --kill-on-bad-exit=1 --cpus-per-task={cores} " if asked.tasks > 1 else ""
    lines.append(f"exec {srun}{shlex.join(job.argv)}")
    return "\n".join(lines) + "\n"


def num_nodes(job: Job, queue: Queue) -> int:
    """Nodes that a job takes: one, or all GPUs of several. Raises ValueError where they do not come out even."""
    gpus, tasks = job.resources.gpus, job.resources.tasks
    if gpus <= queue.gpus_per_node:
        return 1
    if queue.gpus_per_node == 0 or gpus % queue.gpus_per_node or tasks % (gpus // queue.gpus_per_node):
        raise ValueError(
            f"job {job.key} must fill whole nodes of {queue.gpus_per_node} GPUs with equally many tasks each; it asks "
            f"for {gpus} GPUs and {tasks} tasks: change the number of ranks or the node's GPUs"
        )
    return gpus // queue.gpus_per_node
