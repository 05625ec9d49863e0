"""A few training steps on random tokens, for `gpu_check`: their losses, time and memory, beside the memory planned."""

import time
from statistics import median
from typing import Any

STEPS, WARM = 6, 2  # of which the first are not counted: they compile


def prepared(architecture: Any, mode: str, experts: str, layers: str, rows: int, length: int) -> tuple[Any, Any, Any]:
    """A trainer in bfloat16, a batch of random tokens for it, and the job as the plan takes it."""
    import numpy as np
    import torch

    from megatron_evolve.substrate import operations
    from megatron_evolve.substrate.model import build
    from megatron_evolve.substrate.model.lora import add_lora
    from megatron_evolve.substrate.packing import Batch
    from megatron_evolve.substrate.plan.job import Job
    from megatron_evolve.substrate.recipe import Recipe
    from megatron_evolve.substrate.train.step import Trainer

    scan = operations.mamba_scan(operations.machine(torch.cuda.is_available())).path
    job = Job(mode=mode, sequence_length=length, micro_batch=rows, batch_size=rows, scan=scan)
    adapter = job.adapter if mode == "lora" else None
    recipe = Recipe(adapter=adapter, lr=1e-4, batch_size=rows, steps=STEPS, warmup_steps=1, sequence_length=length)
    how = {"experts": experts, "layers": layers, "params_dtype": torch.bfloat16}
    (model,) = build.build_chunks(architecture, seed=1, **how)
    if adapter is not None:
        add_lora(model, rank=adapter.rank, alpha=adapter.alpha, targets=adapter.targets, seed=0)
    tokens_BT = np.random.default_rng(0).integers(0, architecture.vocab_size, (rows, length))
    weights_BT, padding_BT = np.ones((rows, length), np.float32), np.zeros((rows, length), bool)
    batch = Batch(tokens_BT, np.roll(tokens_BT, -1, 1), weights_BT, padding_BT, float(rows * length), ("none",) * rows)
    return Trainer([model], recipe), batch, job


def trained(
    architecture: Any, mode: str, experts: str, layers: str = "auto", rows: int = 4, length: int = 2048
) -> dict:
    """A few optimizer steps: losses, milliseconds a step, tokens a second, peak memory beside the plan's."""
    import torch

    from megatron_evolve.substrate.layout import Layout
    from megatron_evolve.substrate.plan.memory import peak

    on_gpu = torch.cuda.is_available()
    settle = torch.cuda.synchronize if on_gpu else lambda: None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer, batch, job = prepared(architecture, mode, experts, layers, rows, length)
    losses, norms, times = [], [], []
    for number in range(STEPS):
        settle()
        begun = time.perf_counter()
        measured = trainer.step(batch, number)
        losses.append(round(measured.loss, 5))
        norms.append(round(measured.grad_norm, 6))
        settle()
        times.append(time.perf_counter() - begun)
    step_s = median(times[WARM:])
    planned = peak(architecture, Layout(), 1, job)
    return {
        "steps": mode,
        "experts": experts,
        "rows": rows,
        "length": length,
        "losses": losses,
        "grad_norms": norms,
        "step_ms": round(1e3 * step_s, 2),
        "step_ms_all": [round(1e3 * t, 2) for t in times],
        "tokens_per_s": round(rows * length / step_s),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if on_gpu else None,
        "planned_gib": round(planned.total / 2**30, 3),
        "ok": bool(losses[-1] < losses[0]),
    }
