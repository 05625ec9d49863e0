"""Which of several processes this one is, from the environment that started it.

    torchrun     RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
    srun         SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID; all meet at the step's first node, at a port that
                 follows from the job's and the step's number, unless MASTER_ADDR and MASTER_PORT name another place
    neither      one process alone

Several ranks are either torchrun's children or srun's own tasks, never both: with torchrun under srun each node has one
task, and torchrun's variables count. Imports without torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

# Below Linux's ephemeral range (32768 up), so that no outgoing connection holds the port by chance.
FIRST_PORT, NUM_PORTS = 12_000, 20_000


@dataclass(frozen=True)
class Place:
    """One process among `world_size`. `meet` is the address all connect to, tcp://HOST:PORT; empty when alone."""

    rank: int
    world_size: int
    local_rank: int
    meet: str

    @property
    def alone(self) -> bool:
        """Whether there is nobody to meet."""
        return not self.meet


def place_in(environment: Mapping[str, str]) -> Place:
    """This process's place. Raises ValueError in one sentence for an environment that is only half there."""
    if "WORLD_SIZE" in environment:
        return _torchrun(environment)
    if int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        return _srun(environment)
    return Place(rank=0, world_size=1, local_rank=0, meet="")


def _torchrun(environment: Mapping[str, str]) -> Place:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in environment]
    if missing:
        raise ValueError(
            f"a rank needs {', '.join(names)}; {', '.join(missing)} is not set: start it with torchrun, or unset "
            "WORLD_SIZE"
        )
    rank, size, local = (int(environment[name]) for name in names[:3])
    return Place(rank, size, local, f"tcp://{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}")


def _srun(environment: Mapping[str, str]) -> Place:
    host = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
    number = int(environment["SLURM_JOB_ID"]) * 64 + int(environment["SLURM_STEP_ID"])
    port = environment.get("MASTER_PORT") or FIRST_PORT + number % NUM_PORTS
    return Place(
        rank=int(environment["SLURM_PROCID"]),
        world_size=int(environment["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(environment["SLURM_LOCALID"]),
        meet=f"tcp://{host}:{port}",
    )


def first_host(nodelist: str) -> str:
    """The first host of Slurm's short form: `gpu[07-09,12],cpu1` is gpu07."""
    first = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^\[,]*))?", nodelist)
    if first is None:
        raise ValueError(f"a node list starts with a host's name; got {nodelist!r}: set MASTER_ADDR")
    return "".join(part or "" for part in first.groups())
