"""Small real jobs as the stages of runs: shell commands on the ground of a campaign that trains nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.budget import Account
from megatron_evolve.candidate import Candidate
from megatron_evolve.jobs import Ground, Run, Stage, StageEnd, drive
from megatron_evolve.launch.job import Job, Resources
from megatron_evolve.launch.local import LocalLauncher
from megatron_evolve.retries import Retries
from tests.megatron_evolve.test_delta import BASE

DONE = "touch $RUN/scores.json"
LOST = "kill -9 $$"


@dataclass(frozen=True)
class Shell(Ground):
    """Every stage of a candidate is the command of its name."""

    commands: Mapping[str, str] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)
    stall_s: float | None = None

    def job(self, run: Run, stage: Stage) -> Job:
        run_dir = self.stage_dir(run, stage)
        argv = ("/bin/sh", "-c", self.commands[run.candidate.id])
        limits = {"time_limit_s": self.time_limit_s, "grace_s": 0.0, "stall_s": self.stall_s, "start_s": self.stall_s}
        return Job(
            f"{run.key}/{stage}",
            argv,
            run_dir,
            done_file="scores.json",
            env={"RUN": str(run_dir)},
            resources=self.resources,
            **limits,
        )


@dataclass
class Bench:
    """A folder, its launcher's size, and the ends of what was driven there."""

    root: Path
    cores: int = 2
    devices: tuple[str, ...] = ()
    ends: dict[str, StageEnd] = field(default_factory=dict)

    def run(
        self,
        commands: Mapping[str, str],
        *,
        retries: Retries | None = None,
        account: Account | None = None,
        stop: Callable[[], bool] = lambda: False,
        **ground: object,
    ) -> dict[str, StageEnd]:
        """Drives one stage of each candidate; returns the ends by its name."""
        made = Shell(
            CampaignFolder(self.root), self.root, self.root, commands=commands, **({"time_limit_s": 30.0} | ground)
        )
        stages = [(Run(1, Candidate(id=name, substrate="s", settings=BASE), 7), "dev") for name in commands]
        with LocalLauncher(self.cores, self.root, devices=self.devices) as launcher:
            for end in drive(made, launcher, stages, lambda end: (), stop, retries, account):
                self.ends[end.run.candidate.id] = end
        return self.ends

    def attempts(self, name: str) -> list[Path]:
        """Folders of a candidate's attempts."""
        return sorted(self.root.glob(f"rounds/1/{name}/runs/7/dev/attempts/*"))
