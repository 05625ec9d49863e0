"""Bytes that one rank sends in an optimizer step, by kind of parallelism, on the busiest pipeline stage.

Ring algorithms: of n ranks each sends (n - 1) / n of the whole tensor in an all-gather or a reduce-scatter. Sequence
parallelism replaces each all-reduce by one of either. Counted for each micro-batch: tensor parallelism twice forward
and twice backward in every layer, and once more where a weight's gradient needs the gathered input again; experts one
all-to-all there and one back, both ways; a pipeline one activation on, one gradient back. Once a step: gradients
reduced over the copies, and the updated weights gathered.
"""

from dataclasses import asdict, dataclass

from megatron_evolve.substrate.layout import Layout
from megatron_evolve.substrate.model.architecture import Architecture
from megatron_evolve.substrate.plan.job import Job
from megatron_evolve.substrate.plan.parameters import Share, Stage, adapter_share, stage_share, stages


@dataclass(frozen=True)
class Traffic:
    """Bytes a rank sends in a step."""

    tensor: float
    expert: float
    context: float
    pipeline: float
    data: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(asdict(self).values())


def traffic(architecture: Architecture, layout: Layout, ranks: int, job: Job) -> Traffic:
    """Of the stage that sends most. The layout must fit (`Layout.check`)."""
    return max((_stage(architecture, layout, ranks, job, one) for one in stages(architecture, layout)), key=_total)


def _total(one: Traffic) -> float:
    return one.total


def _stage(a: Architecture, layout: Layout, ranks: int, job: Job, stage: Stage) -> Traffic:
    copies = layout.data_parallel(ranks)
    micro_batches = job.micro_batches(copies)
    tokens = job.micro_batch * job.sequence_length / layout.cp
    wide = tokens * a.hidden_size * job.weight_bytes
    pattern = stage.pattern + (a.mtp_pattern * a.mtp_depths if stage.last else "")
    again = {"none": "", "selective": "E", "full": "ME*"}[job.recompute]
    repeated = sum(pattern.count(letter) for letter in again)

    passes = (5 if job.mode == "sft" else 4) * len(pattern) + 2 * repeated + 2 * (stage.first + stage.last)
    tensor = passes * _ring(layout.tp) * wide
    rows = tokens / layout.tp * a.top_k * (a.latent_size or a.hidden_size) * job.weight_bytes
    experts, experts_again = pattern.count("E"), pattern.count("E") if "E" in again else 0
    exchanges = 4 * experts + 2 * experts_again
    expert = exchanges * rows * (_ring(layout.ep) + (layout.etp - 1))
    ends = 0 if layout.pp == 1 else (2 - (stage.first or stage.last)) * layout.vp
    return Traffic(
        tensor=micro_batches * tensor,
        expert=micro_batches * expert,
        context=micro_batches * _context(a, layout, job, pattern, tokens),
        pipeline=micro_batches * ends * wide / layout.tp,
        data=_data(a, layout, ranks, job, stage),
    )


def _context(a: Architecture, layout: Layout, job: Job, pattern: str, tokens: float) -> float:
    """Keys and values pass round the ring; the scan exchanges sequence for heads, before and after, both ways."""
    keys = 2 * a.num_query_groups * a.head_dim / min(layout.tp, a.num_query_groups)
    around = 3 * (layout.cp - 1) * keys  # forward, and backward with their gradients
    scan = 2 * _ring(layout.cp) * (sum(a.mamba_projection_parts) + a.mamba_inner_size) / layout.tp
    return tokens * job.weight_bytes * (pattern.count("*") * around + pattern.count("M") * scan)


def _data(a: Architecture, layout: Layout, ranks: int, job: Job, stage: Stage) -> float:
    base = stage_share(a, layout, stage)
    trained: Share = base if job.mode == "sft" else adapter_share(a, layout, stage, job.adapter)
    each = job.gradient_bytes + job.weight_bytes
    dense = trained.dense * _ring(layout.data_parallel(ranks) * layout.cp)
    return each * (dense + trained.expert * _ring(layout.expert_data_parallel(ranks)))


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks
