"""Gather and combine against the definition in float64, and the law that one undoes the other."""

import pytest
import torch

from megatron_evolve.kernels import fused, reference
from tests.kernels.expert_cases import DEVICE, TILE_CASES, error, inputs, widened

# Rows are copied, so exact; a sum of K <= 7 rows in float32 rounds once in bfloat16 (2^-9) and to 4 eps in float32.
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 4e-3}


def both_ways(backend, idx, num_experts, x, p):
    """Rows, their probabilities, the sum of the rows, and the gradients of x and p through all of it."""
    plan = backend.route_plan(idx, num_experts)
    rows, p_rows = backend.permute(x, p, plan)
    out = backend.unpermute(rows, plan)
    loss = (out * out).sum() + (p_rows * torch.arange(len(p_rows), device=p.device)).sum()
    return [rows, p_rows, out, *torch.autograd.grad(loss, [x, p])]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", ["plain", "odd", "one choice", "all chosen", "empty experts", "no rows"])
def test_values_and_gradients(case, dtype):
    idx, v = inputs(case, dtype, cases=TILE_CASES)
    num_experts = len(v["W1"])
    want = both_ways(reference, idx, num_experts, *(widened(v)[n] for n in "xp"))
    got = both_ways(fused, idx, num_experts, v["x"], v["p"])
    for a, b in zip(got, want, strict=True):
        assert error(a.detach(), b.detach()) <= TOLERANCE[dtype]


def test_unpermute_undoes_permute_at_one_choice():
    idx, v = inputs("one choice", torch.bfloat16, cases=TILE_CASES)
    plan = fused.route_plan(idx, 5)
    rows, _ = fused.permute(v["x"], v["p"], plan)
    assert torch.equal(fused.unpermute(rows, plan), v["x"])


def test_wide_rows():
    """More columns than one block of 512."""
    x = torch.randn(3, 1100, device=DEVICE)
    plan = fused.route_plan(torch.tensor([[0, 1], [1, 0], [1, 0]], device=DEVICE), 2)
    rows, _ = fused.permute(x, torch.ones(3, 2, device=DEVICE), plan)
    assert torch.equal(fused.unpermute(rows, plan), 2 * x)


def test_rows_are_summed_in_float32_in_the_order_of_choice():
    idx, _ = inputs("all chosen", torch.bfloat16, cases=TILE_CASES)
    plan = fused.route_plan(idx, 4)
    y = torch.randn(idx.numel(), 32, generator=torch.Generator().manual_seed(5)).to(DEVICE, torch.bfloat16)
    want = torch.zeros(len(idx), 32, device=DEVICE)
    for k in range(4):
        want += y[plan.row_of_choice_TK[:, k]].float()
    assert torch.equal(fused.unpermute(y, plan), want.bfloat16())
