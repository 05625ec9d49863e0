"""Every layout of a job on so many GPUs: which fit, in the order of their estimated step time, and why others do not.

The estimate orders layouts; it is not a forecast. Arithmetic of the slowest stage at 40 % of an H100's peak, stretched
by the pipeline's bubble, plus each kind of traffic at the speed of the link that its group spans, none of it hidden
behind arithmetic. Equal layouts in all of that: fewer kinds of parallelism first.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_evolve.substrate.layout import SIZES, Layout
from megatron_evolve.substrate.model.architecture import Architecture
from megatron_evolve.substrate.plan.communication import Traffic, traffic
from megatron_evolve.substrate.plan.flops import head_flops, pattern_flops
from megatron_evolve.substrate.plan.job import GIB, Job
from megatron_evolve.substrate.plan.memory import Memory, peak
from megatron_evolve.substrate.plan.parameters import stages

GPUS_PER_NODE = 8
FLOPS_PER_S = 0.4 * 989e12  # H100, dense bf16; 40 % is what good published runs of these models reach
NODE_BYTES_PER_S = 450e9  # NVLink 4, one direction
NETWORK_BYTES_PER_S = 50e9  # 400 Gb/s a GPU
RESERVED_BYTES = 2 * GIB  # CUDA's context and NCCL's buffers, which no tensor holds
REMEDIES = {
    "weights": "raise ep, tp or pp",
    "adapters": "raise ep or lower the adapter's rank",
    "gradients": "raise ep, tp or pp",
    "optimizer": "use more GPUs, reduced optimizer state or offload",
    "activations": "recompute more, or raise tp or cp",
    "logits": "raise tp or cp, or lower the micro-batch",
}


@dataclass(frozen=True)
class Candidate:
    """A layout on these GPUs. What a layout that cannot run would need is None; `reason` is empty where it fits."""

    layout: Layout
    gpus: int
    reason: str
    memory: Memory | None = None
    traffic: Traffic | None = None
    cost_s: float | None = None

    @property
    def fits(self) -> bool:
        """Whether it can run in the memory given."""
        return not self.reason


def rank(
    architecture: Architecture, gpus: int, gpu_bytes: int, job: Job, *, transformer_engine: bool = False
) -> list[Candidate]:
    """Every candidate, those that fit first and the cheapest of them first, then those that nearly fit.

    `transformer_engine` says whether Transformer Engine is there, and so context parallelism. Raises ValueError for
    fewer than one GPU.
    """
    _some(gpus)
    found = [
        assess(architecture, layout, gpus, gpu_bytes, job, transformer_engine=transformer_engine)
        for layout in candidates(gpus, context_parallel=transformer_engine)
    ]
    return sorted(found, key=_order)


def candidates(gpus: int, *, context_parallel: bool) -> Iterator[Layout]:
    """Layouts that divide the GPUs: tp within a node, pp any divisor, the others powers of two.

    Experts are whole (etp 1) or split like the dense layers (etp = tp).
    """
    powers = [2**n for n in range(gpus.bit_length()) if 2**n <= gpus]
    for pp in (size for size in range(1, gpus + 1) if gpus % size == 0):
        for tp in (size for size in powers if size <= GPUS_PER_NODE):
            for cp in powers if context_parallel else (1,):
                for ep in powers:
                    for etp in sorted({1, tp}):
                        layout = Layout(tp=tp, pp=pp, ep=ep, etp=etp, cp=cp)
                        if gpus % layout.ranks == 0:
                            yield layout


def assess(
    architecture: Architecture,
    layout: Layout,
    gpus: int,
    gpu_bytes: int,
    job: Job,
    *,
    transformer_engine: bool = False,
) -> Candidate:
    """One layout: what it needs, or why it cannot run. Raises ValueError for fewer than one GPU."""
    _some(gpus)
    problem = _problem(architecture, layout, gpus, job, transformer_engine)
    if problem:
        return Candidate(layout, gpus, problem)
    job = job.replace(sequence_length=layout.padded(job.sequence_length))  # as the trainer pads the widest rows
    memory = peak(architecture, layout, gpus, job)
    sent = traffic(architecture, layout, gpus, job)
    cost_s = _cost(architecture, layout, gpus, job, sent)
    return Candidate(layout, gpus, _shortage(memory, gpu_bytes), memory, sent, cost_s)


def _some(gpus: int) -> None:
    if gpus < 1:
        raise ValueError(f"a plan needs at least 1 GPU; got {gpus}: give their number")


def _problem(a: Architecture, layout: Layout, gpus: int, job: Job, transformer_engine: bool) -> str:
    """Why this layout cannot run, memory apart; empty where it can."""
    given = {
        "ranks": gpus,
        "batch_size": job.batch_size,
        "adapter": job.mode == "lora" and job.adapter.on_experts,
        "context_parallel": transformer_engine,
    }
    problems = layout.problems(a, **given)
    if problems:
        return problems[0]
    try:
        micro_batches = job.micro_batches(layout.data_parallel(gpus))
    except ValueError as error:
        return str(error)
    return next(iter(layout.problems(a, **given, micro_batches=micro_batches)), "")


def _shortage(memory: Memory, gpu_bytes: int) -> str:
    needed = memory.total + RESERVED_BYTES
    if needed <= gpu_bytes:
        return ""
    parts = [(name, value) for name, value in memory.parts().items() if value > 0]
    said = ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts[:3])
    return f"stage {memory.stage} needs {needed / GIB:.1f} GB of {gpu_bytes / GIB:g}: {said}; {REMEDIES[parts[0][0]]}"


def _cost(a: Architecture, layout: Layout, gpus: int, job: Job, sent: Traffic) -> float:
    """Seconds of a step, as far as layouts differ in them."""
    micro_batches = job.micro_batches(layout.data_parallel(gpus))
    tokens = job.micro_batch * job.sequence_length / (layout.tp * layout.cp)  # a rank's, of one micro-batch
    slowest = max(
        pattern_flops(a, stage.pattern, job).executed + (head_flops(a, job).executed if stage.last else 0.0)
        for stage in stages(a, layout)
    )
    rounds = micro_batches + (layout.pp - 1) / layout.vp
    spans = {
        "tensor": layout.tp,
        "context": layout.tp * layout.cp,
        "expert": layout.ep * layout.etp,
        "pipeline": gpus,
        "data": gpus // layout.pp,
    }
    waiting = sum(getattr(sent, kind) / _speed(span) for kind, span in spans.items())
    return rounds * tokens * slowest / FLOPS_PER_S + waiting


def _speed(span: int) -> float:
    return NODE_BYTES_PER_S if span <= GPUS_PER_NODE else NETWORK_BYTES_PER_S


def _order(one: Candidate) -> tuple:
    kinds = sum(getattr(one.layout, name) > 1 for name in SIZES)
    if one.fits:
        return 0, one.cost_s, kinds, str(one.layout)
    return 1 if one.memory else 2, one.memory.total if one.memory else 0.0, kinds, str(one.layout)
