"""Models of full size on the meta device: as many parameters as the architecture says, alone and over the ranks."""

import resource
from collections.abc import Iterator

import pytest
import torch

from megatron_evolve.substrate.model import build, weights
from megatron_evolve.substrate.model.architecture import PRESETS, Architecture
from tests.substrate.enlarged import SMALL
from tests.substrate.on_meta import build_on_meta

WHOLE = Architecture.model_validate(SMALL.model_dump() | {"latent_size": 24, "mtp_pattern": "*E", "mtp_depths": 2})


@pytest.fixture
def alone() -> Iterator[None]:
    build.start(seed=1)
    yield
    build.stop()


def test_names_shapes_and_dtypes_are_those_of_a_real_model(alone: None) -> None:
    real, shape = build.build_model(WHOLE, seed=1), build_on_meta(WHOLE, params_dtype=torch.bfloat16)
    low = build.build_model(WHOLE, seed=1, params_dtype=torch.bfloat16)
    described = [
        {name: (tuple(t.shape), t.dtype) for name, t in weights.state_of(model).items()} for model in (shape, low)
    ]
    assert described[0] == described[1]
    assert {t.device.type for t in [*shape.parameters(), *shape.buffers()]} == {"meta"}
    assert {t.device.type for t in [*real.parameters(), *real.buffers()]} != {"meta"}


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["nemotron3-nano", "nemotron3-super", "nemotron3-ultra"])
def test_full_sizes_have_the_parameters_that_the_architecture_counts(preset: str, alone: None) -> None:
    architecture = PRESETS[preset]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build_on_meta(architecture)
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    heads = [name for name, _ in model.named_parameters() if name.startswith("mtp.")]
    assert sum(p.numel() for name, p in model.named_parameters() if name not in set(heads)) == (
        architecture.num_parameters()
    )
    assert bool(heads) == bool(architecture.mtp_depths)
    assert sum(p.numel() for p in model.parameters()) == (
        architecture.num_parameters() + architecture.num_mtp_parameters()
    )
    assert grown_kb < 500_000  # 51,000 tensors of Ultra; measured 90 MB


@pytest.mark.slow
def test_the_ranks_of_a_recipe_hold_the_model_once() -> None:
    """Ultra as its published recipe lays it out (TP 2, PP 6, EP 32 on 192 GPUs): one rank of every stage."""
    build.prepare()
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ultra, world, tensor, pipeline, expert = PRESETS["nemotron3-ultra"], 192, 2, 6, 32
    total = 0
    for rank in range(0, world, world // pipeline):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            parallel_state.initialize_model_parallel(
                tensor,
                pipeline,
                expert_model_parallel_size=expert,
                expert_tensor_parallel_size=1,
                create_gloo_process_groups=False,
            )
            build.seed_generators(1)
            model = build_on_meta(ultra, params_dtype=torch.bfloat16)
        finally:
            build.stop()
        for name, p in model.named_parameters():
            if name.startswith("embedding.") and rank > 0:
                continue  # the last stage's heads have a copy of the first one's table
            split = expert if ".experts." in name else tensor if getattr(p, "tensor_model_parallel", False) else 1
            total += p.numel() * split
    assert total == ultra.num_parameters() + ultra.num_mtp_parameters()
