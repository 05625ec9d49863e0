"""Activation recompute changes what is kept, not what is computed."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.architecture import Architecture
from tests.substrate.enlarged import SMALL, build_enlarged

LATENT = Architecture.model_validate(SMALL.model_dump() | {"latent_size": 24})
HEADED = Architecture.model_validate(LATENT.model_dump() | {"mtp_pattern": "*E", "mtp_depths": 2})
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LENGTHS = [60, 4, 64, 33, 1, 94]

# what is kept of the forward pass may be at most this part of what is kept without recompute; measured beside it
KEPT = {
    "every layer": (FULL, 0.1),  # 0.07
    "three layers at a time": (FULL | {"recompute_num_layers": 3}, 0.06),  # 0.05
    "two layers only": (FULL | {"recompute_method": "block", "recompute_num_layers": 2}, 0.7),  # 0.64
    "experts": ({"recompute_granularity": "selective", "recompute_modules": ["moe"]}, 0.85),  # 0.81
    "shared experts": ({"recompute_granularity": "selective", "recompute_modules": ["shared_experts"]}, 0.96),  # 0.945
    "core attention": ({"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}, 0.995),  # 0.992
}


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    build.start(seed=1)
    yield
    build.stop()


def step(architecture: Architecture, **fields: Any) -> tuple[Tensor, dict[str, Tensor], list[Tensor], int]:
    """Losses, gradients, tokens counted by each router, and bytes that the forward pass kept for the backward one."""
    from megatron_evolve.substrate.model.packed import PackedSequences

    model = build_enlarged(architecture, **fields)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    tokens, labels = torch.randint(0, 77, (2, 1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        losses = model(tokens, None, None, labels=labels, packed_seq_params=PackedSequences(LENGTHS))
    losses.mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    counted = [m.local_tokens_per_expert for m in model.modules() if hasattr(m, "local_tokens_per_expert")]
    return losses.detach(), gradients, counted, sum(kept.values())


@pytest.fixture(scope="module")
def plain() -> tuple[Tensor, dict[str, Tensor], list[Tensor], int]:
    return step(LATENT)


@pytest.mark.parametrize("case", KEPT)
def test_same_bits_and_less_is_kept(case: str, plain: tuple[Tensor, dict[str, Tensor], list[Tensor], int]) -> None:
    fields, part = KEPT[case]
    losses, gradients, counted, kept = step(LATENT, **fields)
    assert torch.equal(losses, plain[0])
    assert all(torch.equal(gradient, plain[1][name]) for name, gradient in gradients.items())
    assert all(torch.equal(a, b) for a, b in zip(counted, plain[2], strict=True)) and counted[0].sum() > 0
    assert kept <= part * plain[3]


def test_prediction_heads_are_recomputed_too() -> None:
    """Their depths share weights and add their gradients in another order: 4e-6 in A_log, a difference of sums."""
    losses, gradients, _, kept = step(HEADED)
    again, recomputed, _, less = step(HEADED, **FULL)
    assert torch.equal(again, losses) and less <= 0.1 * kept
    for name, gradient in gradients.items():
        assert (recomputed[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("fields", [{}, FULL, KEPT["experts"][0]])
def test_adapters_over_a_frozen_embedding_are_trained(fields: dict[str, Any]) -> None:
    from megatron_evolve.substrate.model.lora import add_lora

    model = build_enlarged(LATENT.model_copy(update={"pattern": "EM"}), **fields)
    add_lora(model, rank=2, alpha=4, targets=("experts", "mamba"), seed=1)
    model(torch.arange(40).view(2, 20), None, None).square().mean().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8
    assert all(gradient is not None for gradient in trained.values())
    assert all(gradient.any() for name, gradient in trained.items() if name.endswith("lora_B"))


def test_what_needs_transformer_engine_says_so() -> None:
    with pytest.raises(ValueError, match="leave layernorm out"):
        build.build_model(SMALL, seed=1, recompute_granularity="selective", recompute_modules=["layernorm"])
