"""A distributed checkpoint of model and optimizer, loaded without Apex or Transformer Engine, goes on as before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="checks what is supplied where no GPU is present"),
]

# Two steps, save, three more; then a fresh model and optimizer load and take the same three.
PROGRAM = """
import json
import sys

import torch

from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.architecture import NANO_CPU

FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def make():
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    model = build.build_model(NANO_CPU, seed=2)
    model = DistributedDataParallel(model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    config = OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=1.0, use_distributed_optimizer=True)
    return model, get_megatron_optimizer(config, [model], use_gloo_process_groups=False)


def step(model, optimizer, tokens):
    model.zero_grad_buffer()
    optimizer.zero_grad()
    loss = model(tokens, None, None, labels=tokens.roll(-1, 1)).mean()
    loss.backward()
    model.finish_grad_sync()
    _, norm, _ = optimizer.step()
    return loss.item(), float(norm)


def states(model, optimizer, is_loading):
    tensors = model.module.sharded_state_dict()
    return {
        "model": tensors,
        "optimizer": optimizer.sharded_state_dict(tensors, is_loading=is_loading, metadata=FORMAT),
    }


def main(folder):
    build.start(seed=1)
    from megatron.core import dist_checkpointing

    tokens = torch.randint(0, 77, (5, 8, 24), generator=torch.Generator().manual_seed(0))
    model, optimizer = make()
    for batch in tokens[:2]:
        step(model, optimizer, batch)
    dist_checkpointing.save(states(model, optimizer, is_loading=False), folder)
    uninterrupted = [step(model, optimizer, batch) for batch in tokens[2:]]
    model, optimizer = make()
    inner = optimizer.chained_optimizers[0].optimizer
    for p in (p for group in inner.param_groups for p in group["params"]):  # Megatron asks for a state to load into
        zero = torch.zeros_like(p)
        inner.state[p] = {"step": torch.zeros(()), "exp_avg": zero, "exp_avg_sq": zero.clone()}
    loaded = dist_checkpointing.load(states(model, optimizer, is_loading=True), folder)
    model.module.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    print("LOSSES", json.dumps([uninterrupted, [step(model, optimizer, batch) for batch in tokens[2:]]]))


if __name__ == "__main__":
    main(sys.argv[1])
"""


def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "checkpoint").mkdir()
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "checkpoint")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env, check=False)
    assert run.returncode == 0, run.stderr
    line = next(line for line in run.stdout.splitlines() if line.startswith("LOSSES"))
    uninterrupted, resumed = json.loads(line.removeprefix("LOSSES"))
    assert resumed == uninterrupted
