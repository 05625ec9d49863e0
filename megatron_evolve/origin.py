"""The origin: the substrate's own recipe under at least eight seeds, scored once and frozen with the judge.

It is where the seed variance of every test starts and what a performance claim is measured against. Its checkpoints
stay beside the judge, so that they can be asked later items too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from megatron_evolve.eval.judge import Judge
from megatron_evolve.eval.paired import Answers
from megatron_evolve.eval.seeds import Replicates, RunReplicates
from megatron_evolve.facts import RunFacts
from megatron_evolve.jobs import Ground, Run
from megatron_evolve.launch.rundir import read_json
from megatron_evolve.substrate.frozen import Frozen

ORIGIN_FILE = "origin.json"
ORIGIN_ROUND = 0
EXTERNAL_SPLITS = ("external-a", "external-b")


class Origin(Frozen):
    """What is frozen of the origin: replicates for the seed variance, and means by split and family."""

    schema_: str = Field(default="origin/1", alias="schema")
    candidate: str
    seeds: tuple[int, ...]
    means: dict[str, dict[str, float]] = Field(description="accuracy by split and family, mean over seeds")
    replicates: dict[str, Any] = Field(description="per-seed means and item flips on dev-b and external")

    def family_means(self, split: str) -> dict[str, float]:
        """Accuracy by family on a split."""
        return self.means[split]

    def pooled(self) -> tuple[RunReplicates, ...]:
        """The origin's share of the seed pool."""
        return (RunReplicates.from_dict(self.replicates),)


def origin_document(ground: Ground, runs: Sequence[Run], external: bool) -> Origin:
    """The origin's scores from its finished runs."""
    stages = ("train", "dev", *(EXTERNAL_SPLITS if external else ()))
    facts = [
        RunFacts(
            run.candidate.id,
            run.seed,
            ground.stage_dir(run, "dev").parent,
            {stage: {"outcome": "finished", "reason": "", "cpu_seconds": 0.0} for stage in stages},
        )
        for run in runs
    ]
    splits = ("dev-a", "dev-b", *(EXTERNAL_SPLITS if external else ()))
    outside = _replicates(facts, EXTERNAL_SPLITS) if external else None
    return Origin(
        candidate=runs[0].candidate.id,
        seeds=tuple(run.seed for run in runs),
        means={split: _means(facts, split) for split in splits},
        replicates=RunReplicates(_replicates(facts, ("dev-b",)), outside).to_dict(),
    )


def _replicates(facts: Sequence[RunFacts], splits: Sequence[str]) -> Replicates:
    answers = Answers.of([run.items(splits) for run in facts])
    return answers.replicates(facts[0].candidate, [run.seed for run in facts])


def _means(facts: Sequence[RunFacts], split: str) -> dict[str, float]:
    answers = Answers.of([run.items((split,)) for run in facts])
    return {name: float(mean) for name, mean in zip(answers.families, answers.family_means_RF().mean(0), strict=True)}


def read_origin(judge_folder: Path, judge: Judge) -> Origin:
    """The origin's frozen scores. Raises ValueError when the judge has none."""
    if judge.origin is None:
        raise ValueError(f"the judge in {judge_folder} has no origin scores yet: run the campaign's preparation")
    path = Path(judge_folder) / judge.origin.file
    return Origin.parse(read_json(path), where=str(path))
