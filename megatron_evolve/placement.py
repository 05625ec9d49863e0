"""Placement: what each of a campaign's jobs takes of a site, and who starts its ranks.

    campaign (ranks, layout, engine) + site (GPUs of a node, launcher) --> Resources of a job, words before its module

On a cluster every rank is a task that the launcher starts (Slurm's srun, Kubernetes' pods); on one machine torchrun
starts them, and finds a free port by itself.
"""

import os
from dataclasses import dataclass, field
from typing import Self

from megatron_evolve.campaign import Campaign, Training
from megatron_evolve.eval.engines.settings import EngineSettings, OpenAISettings, VllmServer
from megatron_evolve.launch.job import Resources
from megatron_evolve.site import Site


@dataclass(frozen=True)
class Placement:
    """How the runs of one campaign lie on one site. The default is one rank on a core of this machine."""

    training: Training = field(default_factory=Training)
    site: Site = field(default_factory=Site)
    scoring_gpus: int = 0

    @classmethod
    def of(cls, campaign: Campaign, site: Site) -> Self:
        """Raises ValueError for a job that is larger than the site's machines."""
        gpus = scoring_gpus(campaign.judge.engine, site.gpus_per_node) if site.gpus_per_node else 0
        if gpus > site.gpus_per_node:
            raise ValueError(
                f"a scoring job starts its engine on one node; campaign {campaign.name} asks for {gpus} GPUs, a node "
                f"has {site.gpus_per_node}: lower tensor_parallel, or let the engine ask a `url`"
            )
        ranks = campaign.launch.training.ranks
        if site.gpus_per_node and ranks > site.gpus_per_node:
            if site.launcher == "local":
                raise ValueError(
                    f"campaign {campaign.name} trains on {ranks} GPUs, this one machine has {site.gpus_per_node}: give "
                    "a site with `launcher: slurm` or `launcher: kubernetes`"
                )
            if ranks % site.gpus_per_node:
                raise ValueError(
                    f"ranks must fill whole nodes of {site.gpus_per_node} GPUs; campaign {campaign.name} has {ranks}: "
                    "change launch.training.ranks"
                )
        return cls(campaign.launch.training, site, gpus)

    @property
    def training_gpus(self) -> int:
        """GPUs of one training run: one for each rank, where the site has any."""
        return self.training.ranks if self.site.gpus_per_node else 0

    def resources(self, *, trains: bool) -> Resources:
        """What a training or a scoring job takes."""
        gpus = self.training_gpus if trains else self.scoring_gpus
        ranks = self.training.ranks if trains else 1
        cores = gpus * self.site.cores_per_gpu or ranks
        return Resources(cores=cores, gpus=gpus, tasks=1 if self.site.launcher == "local" else ranks)

    def environment(self, *, trains: bool) -> dict[str, str]:
        """What the processes of a job are told about threads and compiling.

        On cores, ranks fill them, one each; compiling Megatron's elementwise functions there takes seconds a process
        and gained nothing. On GPUs a rank has cores of its own, and what is compiled (squared ReLU of shared experts,
        the router's counts) is one pass over memory in place of several.
        """
        if not self.resources(trains=trains).gpus:
            return {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
        return {"OMP_NUM_THREADS": str(self.site.cores_per_gpu)}

    @property
    def rank_starter(self) -> tuple[str, ...]:
        """Python's arguments before the trainer's module."""
        if self.training.ranks == 1 or self.site.launcher != "local":
            return ()
        return ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.training.ranks}")


def scoring_gpus(engine: EngineSettings, node: int) -> int:
    """GPUs that a scoring job computes on: its own model's one, or those of the server that it starts.

    A server that is only known by its command line may take all `node` GPUs.
    """
    if not isinstance(engine, OpenAISettings):
        return 1
    if engine.server is None:
        return 0
    return engine.server.tensor_parallel if isinstance(engine.server, VllmServer) else node


def cores_here(campaign: Campaign) -> int:
    """Cores of this machine that a campaign's jobs may fill together."""
    return campaign.launch.cores or len(os.sched_getaffinity(0))
