"""The memory of the fullest rank: weights, gradients, optimizer state, adapters, activations, logits.

A pipeline of pp stages runs one forward, one backward: stage s holds up to pp - s micro-batches at once, and with
virtual stages 2 (pp - s - 1) + (vp - 1) pp + 1 times a piece of its layers (Narayanan et al. 2021, arXiv 2104.04473,
section 2.2). The stage with the largest sum decides, for every rank must fit.
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
    kept = _in_flight(
        layout, number, micro_batches, [sum(letters[letter].kept for letter in piece) for piece in stage.pieces]
    )
    busiest = max(one.again + one.working for one in letters.values())
    kept += activations.boundary()
    if not stage.last:
        return kept + busiest, 0.0
    further = [activations.in_heads().layer(letter) for letter in a.mtp_pattern]
    kept += a.mtp_depths * sum(one.kept for one in further)
    busiest = max([busiest, *(one.again + one.working for one in further)])
    head = activations.head(a.mtp_depths)
    logits = head.kept + head.working
    return kept + max(0.0, busiest - logits), logits


def _in_flight(layout: Layout, number: int, micro_batches: int, piece_bytes: list[float]) -> float:
    """The most that stage `number` holds of its pieces at once.

    Pieces take turns, pp micro-batches each: forward from the first, backward from the last. Where they differ in size
    the mixture matters, so the schedule is followed through one period.
    """
    pp, vp = layout.pp, layout.vp
    held_at_once = pp - number if vp == 1 else 2 * (pp - number - 1) + (vp - 1) * pp + 1
    begun = min(held_at_once, micro_batches * vp)
    forward = [piece_bytes[turn // pp % vp] for turn in range(begun + pp * vp)]
    backward = [piece_bytes[vp - 1 - turn // pp % vp] for turn in range(pp * vp)]
    held = most = sum(forward[:begun])
    for turn in range(min(pp * vp, micro_batches * vp - begun)):
        held += forward[begun + turn] - backward[turn]
        most = max(most, held)
    return most
