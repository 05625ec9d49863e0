"""Several processes on gloo: the same losses as on one, with Megatron's DDP and distributed optimizer."""

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

# Saves (one process) or loads a distributed checkpoint, takes three steps on one fixed global batch, writes the losses.
PROGRAM = """
import json
import sys
from pathlib import Path

import torch

from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.architecture import NANO_CPU


def forward_step(batches, model):
    tokens = next(batches)
    output = model(tokens, None, None, labels=tokens.roll(-1, 1))
    return output, lambda loss: (loss.mean(), {"loss": loss.mean().detach()})


def main(folder, sizes):
    runtime = build.start(seed=1, **sizes)
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    model = build.build_model(NANO_CPU, seed=2, finalize_model_grads_func=finalize_model_grads)
    if runtime.world_size == 1:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.mul_(6 if p.dim() == 2 else 1)
        dist_checkpointing.save(model.sharded_state_dict(), folder)
    else:
        model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), folder))
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(model.config, ddp, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=1.0, use_distributed_optimizer=True),
        [model],
        use_gloo_process_groups=False,
    )
    tokens = torch.randint(0, 77, (3, 8, 24), generator=torch.Generator().manual_seed(0))
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    losses = []
    for batch in tokens:
        mine = iter(batch.chunk(size)[rank].chunk(2))
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=mine, model=model, num_microbatches=2,
            seq_length=24, micro_batch_size=4 // size, forward_only=False,
        )
        _, norm, _ = optimizer.step()
        if reports:
            loss = torch.stack([report["loss"] for report in reports]).mean()
            torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group())
            losses.append([loss.item() / size, float(norm)])
    if runtime.rank == runtime.world_size - 1:  # of every layout a rank that has the losses; one writer, one file
        Path(__file__).with_name("losses.json").write_text(json.dumps(losses))
    torch.distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
"""

TENSOR, EXPERT, PIPELINE = "tensor_model_parallel_size", "expert_model_parallel_size", "pipeline_model_parallel_size"
EXPERT_TENSOR = "expert_tensor_parallel_size"
LAYOUTS = {  # processes, sizes; data parallelism takes what is left
    "data": (2, {}),
    "tensor and sequence": (2, {TENSOR: 2, EXPERT_TENSOR: 1}),
    "expert": (2, {EXPERT: 2}),
    "pipeline": (2, {PIPELINE: 2}),
    "tensor, expert and expert-tensor": (4, {TENSOR: 2, EXPERT: 2, EXPERT_TENSOR: 2}),
}


def _run(launcher: list[str], program: Path, sizes: dict) -> list[list[float]]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launcher, str(program), str(program.with_name("checkpoint")), json.dumps(sizes)]
    losses = program.with_name("losses.json")
    losses.unlink(missing_ok=True)
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env, check=False)
    assert run.returncode == 0 and losses.exists(), run.stdout + run.stderr
    return json.loads(losses.read_text())


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[float]]]:
    """The program, its checkpoint beside it, and the losses and gradient norms of one process."""
    path = tmp_path_factory.mktemp("layouts") / "program.py"
    path.write_text(PROGRAM)
    path.with_name("checkpoint").mkdir()
    return path, _run([sys.executable], path, {})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_processes_are_one(layout: str, program: tuple[Path, list[list[float]]]) -> None:
    path, alone = program
    processes, sizes = LAYOUTS[layout]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    got = _run(torchrun, path, sizes)
    # float32 sums in another order, three steps of Adam; measured 1e-6
    assert torch.allclose(torch.tensor(got), torch.tensor(alone), rtol=2e-5)
