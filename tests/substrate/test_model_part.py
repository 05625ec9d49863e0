"""A rank reads its part: in every layout the loss is that of one process, and what does not fit is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_evolve.substrate.model import build, weights
from megatron_evolve.substrate.model.architecture import NANO_CPU

# In one pair of processes, layout after layout: build with another seed, read the part, take the loss of one batch.
PROGRAM = """
import json
import sys
from pathlib import Path

import torch

from megatron_evolve.substrate.model import build, weights
from megatron_evolve.substrate.model.architecture import NANO_CPU


def main(paths, tokens, layouts, out):
    build.start(seed=1)
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    def step(batches, model):
        batch = next(batches)
        loss = model(batch, None, None, labels=batch.roll(-1, 1))
        return loss, lambda loss: (loss.mean(), {"loss": loss.mean().detach()})

    for name, sizes in layouts.items():
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False, **sizes)
        model = build.build_model(NANO_CPU, seed=5).eval()
        weights.load_part([model], paths)
        with torch.no_grad():
            reports = get_forward_backward_func()(
                forward_step_func=step, data_iterator=iter([tokens]), model=model, num_microbatches=1,
                seq_length=tokens.size(1), micro_batch_size=tokens.size(0), forward_only=True,
            )
        if reports and torch.distributed.get_rank() == 1:
            (out / f"{name}.json").write_text(json.dumps(reports[0]["loss"].item()))
    torch.distributed.barrier()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    tokens = torch.tensor(json.loads((folder / "tokens.json").read_text()))
    main(sorted(folder.glob("*.safetensors")), tokens, json.loads(sys.argv[2]), folder)
"""

TENSOR, EXPERT, PIPELINE = "tensor_model_parallel_size", "expert_model_parallel_size", "pipeline_model_parallel_size"
LAYOUTS = {
    "tensor": {TENSOR: 2},  # and within each expert
    "expert": {EXPERT: 2},
    "pipeline": {PIPELINE: 2},
    "tensor and expert": {TENSOR: 2, EXPERT: 2, "expert_tensor_parallel_size": 1},
}


@pytest.fixture(scope="module")
def model():
    build.start(seed=3)
    model = build.build_model(NANO_CPU, seed=3).eval()
    with torch.no_grad():
        for name, value in weights.state_of(model).items():
            if name.endswith("expert_bias"):
                value.copy_(torch.linspace(0, 0.4, len(value)))
            elif value.dim() == 2:
                value.mul_(6)
    yield model
    build.stop()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory) -> list[Path]:
    """The model's weights in two files, as an imported substrate may hold them."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("parts")
    state = {name: tensor.detach().clone() for name, tensor in weights.state_of(model).items()}
    names = sorted(state)
    paths = []
    for n, part in enumerate((names[::2], names[1::2])):
        paths.append(folder / f"weights-{n}.safetensors")
        save_file({name: state[name] for name in part}, paths[-1])
    return paths


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="checks what is supplied where no GPU is present")
def test_two_ranks_read_what_one_process_holds(model, files):
    tokens = torch.randint(0, NANO_CPU.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = model(tokens, None, None, labels=tokens.roll(-1, 1)).mean().item()
    folder = files[0].parent
    (folder / "tokens.json").write_text(json.dumps(tokens.tolist()))
    program = folder / "program.py"
    program.write_text(PROGRAM)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(program), str(folder), json.dumps(LAYOUTS)),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for layout in LAYOUTS:
        got = json.loads((folder / f"{layout}.json").read_text())
        assert abs(got - alone) < 1e-5, layout  # float32 sums in another order; measured 2e-6


def test_one_rank_reads_the_whole(model, files):
    other = build.build_model(NANO_CPU, seed=4)
    weights.load_part([other], files)
    expected = weights.state_of(model)
    assert all(torch.equal(value, expected[name]) for name, value in weights.state_of(other).items())


def test_values_take_the_models_dtype(model, files):
    other = build.build_model(NANO_CPU, seed=4, params_dtype=torch.bfloat16)
    weights.load_part([other], files)
    assert other.output_layer.weight.dtype is torch.bfloat16
    assert torch.equal(other.output_layer.weight, model.output_layer.weight.bfloat16())


def test_missing_and_misshapen_are_named_and_nothing_changes(model, files, tmp_path):
    other = build.build_model(NANO_CPU.model_copy(update={"shared_ffn_size": 64}), seed=4)
    before = {name: value.clone() for name, value in weights.state_of(other).items()}
    shapes = r"decoder.layers.2.mlp.shared_experts.linear_fc1.weight is \(128, 64\) for \(64, 64\)"
    with pytest.raises(ValueError, match=shapes):
        weights.load_part([other], files)
    with pytest.raises(ValueError, match=r"is missing; .* and \d+ more: use the architecture"):
        weights.load_part([other], files[:1])
    assert all(torch.equal(value, before[name]) for name, value in weights.state_of(other).items())
