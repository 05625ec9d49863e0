"""A whole nano model on Megatron-Core trains the same with the fused experts and router as with the definition."""

from unittest import mock

import pytest
import torch

from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.architecture import NANO_CPU
from tests.kernels.expert_cases import DEVICE

STEPS, LEARNING_RATE = 2, 3e-3


@pytest.fixture(scope="module")
def megatron():
    yield build.start(seed=7)
    build.stop()


def refuse_lists(experts: torch.nn.Module) -> None:
    """Inside it the rows of each expert must never become a list of the host's, which on a GPU would wait for it."""
    listing = mock.patch.object(torch.Tensor, "tolist", side_effect=AssertionError("tokens_per_expert was listed"))
    forward = experts.forward

    def guarded(*given):
        with listing:
            return forward(*given)

    experts.forward = guarded


def losses(name: str) -> list[float]:
    """Loss before each of two AdamW steps and after the last, with every expert layer on this backend."""
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_evolve.substrate.model.router import FusedRouter

    model = build.build_model(NANO_CPU, seed=5, experts=name)
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    assert len(layers) == NANO_CPU.pattern.count("E")
    for layer in layers:
        assert layer.experts.backend == name
        if name == "triton":
            refuse_lists(layer.experts)
        assert type(layer.router) is (FusedRouter if name == "triton" else TopKRouter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    tokens = torch.randint(0, 77, (2, 8), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    seen = []
    for step in range(STEPS + 1):
        with torch.set_grad_enabled(step < STEPS):
            loss = model(tokens, None, None, labels=tokens.roll(-1, 1)).mean()
        seen.append(loss.item())
        if step < STEPS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return seen


@pytest.mark.slow
def test_two_steps_give_the_same_losses(megatron):
    want = losses("reference")
    assert want[0] - want[-1] > 0.05  # the steps did something
    # float32 on all sides, in another order of sums: eps 1.2e-7, and AdamW divides small gradients by their own size
    for name in ("eager", "triton"):
        assert losses(name) == pytest.approx(want, rel=1e-5), name
