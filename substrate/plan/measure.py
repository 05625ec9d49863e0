"""Planned against measured memory: small models, real processes, every allocation of one training step.

    python -m megatron_evolve.substrate.plan.measure                                        # one process
    torchrun --standalone --nproc-per-node 2 -m megatron_evolve.substrate.plan.measure      # two, three, four

One JSON line a case: the bytes that `memory.peak` plans for the fullest rank, and those that torch.profiler saw
allocated at the peak of the second step, the first having made the optimizer's state. The model is built inside the
profile, so weights, gradient buffers and moments are counted too. For a machine without a GPU; the case in bfloat16 has
the fused gated norm and wants TRITON_INTERPRET=1.
"""

import contextlib
import gc
import json
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_evolve.substrate.layout import Layout
from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.architecture import NANO_CPU, Architecture
from megatron_evolve.substrate.plan.job import Job
from megatron_evolve.substrate.plan.memory import by_stage, peak
from megatron_evolve.substrate.recipe import Adapter

MODEL = Architecture.model_validate(
    NANO_CPU.model_dump()
    | {
        "name": "nano-measured",
        "pattern": "MEM*MEME",
        "hidden_size": 128,
        "vocab_size": 512,
        "head_dim": 32,
        "mamba_num_heads": 16,
        "num_experts": 8,
        "expert_ffn_size": 192,
        "shared_ffn_size": 256,
        "max_sequence_length": 256,
    }
)
# As Super and Ultra: experts at a latent width, two further tokens predicted by one shared head.
FURTHER = Architecture.model_validate(
    MODEL.model_dump() | {"name": "nano-measured-further", "latent_size": 64, "mtp_pattern": "*E", "mtp_depths": 2}
)
WORDY = MODEL.with_vocab(131_072)  # a table of the real sizes: all logits would be 403 MB
# The PyTorch scan in proportions of the real sizes: heads of 64, states and chunks of 128.
SCAN = Architecture.model_validate(
    MODEL.model_dump()
    | {
        "name": "nano-measured-scan",
        "pattern": "MMM",
        "mamba_num_heads": 8,
        "mamba_head_dim": 64,
        "mamba_state_dim": 128,
        "mamba_num_groups": 2,
        "mamba_chunk_size": 128,
        "max_sequence_length": 512,
    }
)
ADAPTED = (("attention", "*"), ("mamba", "M"), ("experts", "E"), ("shared", "E"))
STEP = "measured step"


@dataclass(frozen=True)
class Case:
    """A layout and a job; rows an optimizer step are `batch`."""

    layout: str
    batch: int
    micro_batch: int
    sequence_length: int
    mode: str = "sft"
    recompute: str = "none"
    model: Architecture = MODEL
    precision: str = "float32"

    @property
    def job(self) -> Job:
        """As the plan takes it."""
        return Job(
            mode=self.mode,
            sequence_length=self.sequence_length,
            micro_batch=self.micro_batch,
            batch_size=self.batch,
            recompute=self.recompute,
            precision=self.precision,
            scan="pytorch",
            adapter=Adapter(
                rank=8, alpha=8, targets=[kind for kind, letter in ADAPTED if letter in self.model.pattern]
            ),
        )


CASES = {  # by number of processes
    1: (
        Case("", 8, 8, 96),
        Case("", 8, 8, 96, mode="lora"),
        Case("", 8, 2, 192),
        Case("", 2, 2, 33),
        Case("", 8, 8, 96, recompute="full"),
        Case("", 8, 8, 96, recompute="selective"),
        Case("", 8, 8, 96, model=FURTHER),
        Case("", 8, 8, 96, mode="lora", model=FURTHER),
        Case("", 8, 8, 96, mode="lora", model=WORDY),
        Case("", 8, 8, 96, model=WORDY),
        Case("", 1, 1, 512, mode="lora", model=SCAN),
        Case("", 1, 1, 512, model=SCAN, recompute="full"),
        Case("", 1, 1, 256, model=SCAN, precision="bf16"),
    ),
    2: (
        Case("", 16, 8, 96),
        Case("tp=2", 8, 8, 96),
        Case("tp=2", 4, 4, 192, mode="lora"),
        Case("ep=2", 16, 8, 96),
        Case("etp=2", 16, 8, 96),
        Case("tp=2,ep=2", 8, 8, 96),
        Case("pp=2", 16, 4, 96),
        Case("pp=2", 8, 4, 160, mode="lora"),
        Case("pp=2", 16, 4, 96, model=FURTHER),
    ),
    3: (Case("pp=3", 24, 4, 96), Case("pp=3,vp=2", 24, 4, 96)),
    4: (Case("tp=2,ep=2", 16, 8, 96), Case("pp=2", 16, 4, 96), Case("tp=2,pp=2", 16, 4, 96)),
}


def main() -> None:
    """Measure every case of this number of processes; rank 0 prints."""
    runtime = build.start(seed=1)
    if runtime.device != "cpu":
        raise RuntimeError(
            "allocations are measured on a CPU; this machine has a GPU: hide it with CUDA_VISIBLE_DEVICES"
        )
    for case in CASES[runtime.world_size]:
        row = compare(case, runtime.world_size)
        if runtime.rank == 0:
            print(json.dumps(row), flush=True)
    build.stop()


def compare(case: Case, ranks: int) -> dict[str, Any]:
    """Planned and measured bytes of one case: at rest (weights, gradients, moments) and at the peak."""
    layout = Layout.from_text(case.layout)
    planned = peak(case.model, layout, ranks, case.job)
    at_rest = max(
        stage.weights + stage.adapters + stage.gradients + stage.optimizer
        for stage in by_stage(case.model, layout, ranks, case.job)
    )
    _lay_out(layout)
    rest_bytes, peak_bytes, profiled_bytes = _over_ranks(_measure(case, layout, ranks))
    return {
        "processes": ranks,
        "model": case.model.name,
        "layout": str(layout),
        "mode": case.mode,
        "recompute": case.recompute,
        "precision": case.precision,
        "rows": case.batch,
        "micro_batch": case.micro_batch,
        "sequence_length": case.sequence_length,
        "planned_at_rest": round(at_rest),
        "measured_at_rest": rest_bytes,
        "planned": round(planned.total),
        "measured": peak_bytes,
        "profiled": profiled_bytes or None,
        "ratio": round(planned.total / peak_bytes, 4),
    }


def _lay_out(layout: Layout) -> None:
    """Megatron's process groups anew for this layout, in the processes that run already."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,
    )


class Storages(TorchDispatchMode):
    """Bytes of every tensor storage that an operator made while this mode was on, until it is freed by any thread."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self.known:
            self.known.add(id(storage))
            self.held += storage.nbytes()
            self.most = max(self.most, self.held)
            weakref.finalize(storage, self._gone, id(storage), storage.nbytes()).atexit = False

    def _gone(self, storage: int, num_bytes: int) -> None:
        self.known.discard(storage)
        self.held -= num_bytes


def _measure(case: Case, layout: Layout, ranks: int) -> tuple[int, int, int]:
    """Bytes that this rank holds between two steps, and at the peak of the second; and that peak by the profiler.

    The profiler's is 0 where there are several processes: gloo's own threads free what they sent, unseen by it, and
    over two processes it read up to 13 % too much.
    """
    gc.collect()
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with profile if ranks == 1 else contextlib.nullcontext(), Storages() as storages:
        before = torch.empty(1)
        step = _trainer(case, layout, ranks)
        step(0)
        _settle()
        rest, storages.most = storages.held, storages.held
        with torch.profiler.record_function(STEP):
            step(1)
    del before
    return rest, storages.most, _profiled(profile) if ranks == 1 else 0


def _profiled(profile: Any) -> int:
    """The most that torch's allocator held during the measured step, less what it held when the profile began."""
    events, todo = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while todo:
        events.append(todo.pop())
        todo.extend(events[-1].children)
    step = next(event for event in events if event.name == STEP)
    allocations = [e for e in events if isinstance(e.extra_fields, torch._C._profiler._ExtraFields_Allocation)]
    allocations.sort(key=lambda event: event.start_time_ns)
    during = [e for e in allocations if step.start_time_ns <= e.start_time_ns <= step.end_time_ns]
    return max(e.extra_fields.total_allocated for e in during) - allocations[0].extra_fields.total_allocated


def _settle() -> None:
    """Free what nobody needs. Each of gloo's worker threads, two a group, keeps its last message until the next one."""
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        for _ in range(4):
            torch.distributed.all_reduce(torch.zeros(1), group=group)
    gc.collect()


def _trainer(case: Case, layout: Layout, ranks: int) -> Any:
    """A function that takes one optimizer step on rows drawn from a seed."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    bf16 = case.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    chunks = build.build_chunks(
        case.model,
        seed=2,
        experts="triton" if bf16 else "eager",  # the interpreter's kernels keep what compiled ones keep
        finalize_model_grads_func=finalize_model_grads,
        params_dtype=dtype,
        **build.RECOMPUTE[case.recompute],
    )
    if case.mode == "lora":
        from megatron_evolve.substrate.model.lora import add_lora

        adapter = case.job.adapter
        for chunk in chunks:
            add_lora(chunk, rank=adapter.rank, alpha=adapter.alpha, targets=adapter.targets, seed=0)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    model = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]
    settings = OptimizerConfig(
        optimizer="adam", lr=1e-3, clip_grad=1.0, use_distributed_optimizer=True, bf16=bf16, params_dtype=dtype
    )
    optimizer = get_megatron_optimizer(settings, model, use_gloo_process_groups=False)
    micro_batches = case.job.micro_batches(layout.data_parallel(ranks))
    shape = (micro_batches, case.micro_batch, case.sequence_length)

    def step(seed: int) -> None:
        tokens = torch.randint(0, case.model.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=[iter(tokens) for _ in model],
            model=model,
            num_microbatches=micro_batches,
            seq_length=case.sequence_length,
            micro_batch_size=case.micro_batch,
            forward_only=False,
        )
        optimizer.step()

    return step


def _forward(batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
    tokens = next(batches)
    output = model(tokens, None, None, labels=tokens.roll(-1, 1))
    return output, lambda losses: (losses.mean(), {})


def _over_ranks(numbers: tuple[int, ...]) -> list[int]:
    """The largest of each number over all ranks."""
    largest = torch.tensor(numbers)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return largest.tolist()


if __name__ == "__main__":
    main()
