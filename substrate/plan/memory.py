"""The memory of the fullest rank: weights, gradients, optimizer state, adapters, activations, logits.

A pipeline of pp stages runs one forward, one backward: stage s holds up to pp - s micro-batches at once. With virtual
stages a rank holds more pieces, each 1/vp of its layers: 2 (pp - s - 1) + (vp - 1) pp + 1 of them (Narayanan et al.
2021, arXiv 2104.04473, section 2.2). The stage with the largest sum decides, for every rank must fit.
"""

from dataclasses import dataclass, fields

from megatron_evolve.substrate.layout import Layout
from megatron_evolve.substrate.model.architecture import Architecture
from megatron_evolve.substrate.plan.activations import Activations
from megatron_evolve.substrate.plan.job import GIB, Job
from megatron_evolve.substrate.plan.parameters import Share, Stage, adapter_share, stage_share, stages


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank of a pipeline stage at the peak of a step."""

    weights: float  # of the base model
    adapters: float  # their weights
    gradients: float  # of what is trained
    optimizer: float  # of what is trained, this rank's part
    activations: float  # kept between forward and backward, computed again, and working copies
    logits: float  # of the next and further tokens, with the loss
    stage: int  # which stage this is

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Name and bytes of each part, largest first."""
        names = [field.name for field in fields(self) if field.name != "stage"]
        return dict(sorted(((name, getattr(self, name)) for name in names), key=lambda part: -part[1]))

    def gib(self) -> dict[str, float]:
        """The parts in GiB, rounded for people and JSON."""
        return {name: round(value / GIB, 3) for name, value in self.parts().items()}


def peak(architecture: Architecture, layout: Layout, ranks: int, job: Job) -> Memory:
    """The stage that needs most."""
    return max(by_stage(architecture, layout, ranks, job), key=lambda memory: memory.total)


def by_stage(architecture: Architecture, layout: Layout, ranks: int, job: Job) -> list[Memory]:
    """Memory of a rank of each stage. The layout must fit architecture and ranks (`Layout.check`)."""
    activations = Activations(architecture, layout, job)
    micro_batches = job.micro_batches(layout.data_parallel(ranks))
    return [
        _stage(architecture, layout, ranks, job, activations, number, stage, micro_batches)
        for number, stage in enumerate(stages(architecture, layout))
    ]


def _stage(
    a: Architecture,
    layout: Layout,
    ranks: int,
    job: Job,
    activations: Activations,
    number: int,
    stage: Stage,
    micro_batches: int,
) -> Memory:
    base = stage_share(a, layout, stage)
    adapters = adapter_share(a, layout, stage, job.adapter) if job.mode == "lora" else Share()
    trained = base if job.mode == "sft" else adapters
    sharded = trained.dense / (layout.data_parallel(ranks) * layout.cp)
    sharded += trained.expert / layout.expert_data_parallel(ranks)
    kept, logits = _activations(a, layout, activations, number, stage, micro_batches)
    return Memory(
        weights=base.total * job.weight_bytes,
        adapters=adapters.total * job.weight_bytes,
        gradients=trained.total * job.gradient_bytes,
        optimizer=sharded * job.state_bytes,
        activations=kept,
        logits=logits,
        stage=number,
    )


def _activations(
    a: Architecture, layout: Layout, activations: Activations, number: int, stage: Stage, micro_batches: int
) -> tuple[float, float]:
    """Bytes of the layers and of the head at the step's peak.

    Either the loss is computed while every layer's activations are kept, or a layer's backward pass runs with its own
    recomputed ones; the larger of the two counts.
    """
    letters = {letter: activations.layer(letter) for letter in set(stage.pattern)}
    kept = sum(letters[letter].kept for letter in stage.pattern)
    busiest = max(one.again + one.working for one in letters.values())
    if layout.vp == 1:
        in_flight = min(layout.pp - number, micro_batches)
    else:
        pieces = 2 * (layout.pp - number - 1) + (layout.vp - 1) * layout.pp + 1
        in_flight = min(pieces, micro_batches * layout.vp) / layout.vp
    kept = kept * in_flight + activations.boundary()
    if not stage.last:
        return kept + busiest, 0.0
    further = [activations.layer(letter) for letter in a.mtp_pattern]
    kept += a.mtp_depths * sum(one.kept for one in further)
    busiest = max([busiest, *(one.again + one.working for one in further)])
    head = activations.head(a.mtp_depths)
    logits = head.kept + head.working
    return kept + max(0.0, busiest - logits), logits
