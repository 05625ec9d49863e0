"""The plan's operations against those that PyTorch counts while a small model runs."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.plan.flops import layer_forward, token_flops
from megatron_evolve.substrate.plan.job import Job
from megatron_evolve.substrate.plan.measure import MODEL
from megatron_evolve.substrate.recipe import Adapter

ROWS, LENGTH = 4, 128


@pytest.fixture(scope="module")
def runtime() -> Iterator[build.Runtime]:
    yield build.start(seed=3)
    build.stop()


def counted(model: torch.nn.Module, *, backward: bool) -> float:
    """Operations a token of all matrix products; attention's kernel and the convolution are not among them."""
    tokens = torch.randint(0, MODEL.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    # the counter knows addmm, but not the form in place by which experts add their adapters
    in_place = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        loss = model(tokens, None, None, labels=tokens.roll(-1, 1)).mean()
        if backward:
            loss.backward()
    return counter.get_total_flops() / tokens.numel()


def uncounted() -> float:
    scores = sum(layer_forward(MODEL, letter, LENGTH).get("scores", 0.0) for letter in MODEL.pattern)
    return scores + MODEL.pattern.count("M") * 2 * MODEL.mamba_conv_size * MODEL.mamba_conv_kernel


def test_full_fine_tuning(runtime: build.Runtime) -> None:
    planned = token_flops(MODEL, Job(mode="sft", sequence_length=LENGTH))
    model = build.build_model(MODEL, seed=1)
    assert counted(model, backward=False) == planned.forward - uncounted()
    # the scan's backward pass has one product more than twice its forward ones: 0.04 % of all
    assert counted(model, backward=True) == pytest.approx(planned.train - 3 * uncounted(), rel=1e-3)


def test_adapters(runtime: build.Runtime) -> None:
    from megatron_evolve.substrate.model.lora import add_lora

    adapter = Adapter(rank=8, alpha=8)
    planned = token_flops(MODEL, Job(mode="lora", sequence_length=LENGTH, adapter=adapter))
    model = build.build_model(MODEL, seed=1)
    add_lora(model, rank=8, alpha=8, targets=adapter.targets, seed=0)
    gradient = 2 * MODEL.hidden_size * MODEL.vocab_size  # of the loss over a frozen table, which is made with it
    assert counted(model, backward=False) == planned.forward + gradient - uncounted()
    # not planned: nothing flows back through the first layer's frozen input projection
    assert counted(model, backward=True) == pytest.approx(planned.train - 3 * uncounted(), rel=0.03)
