"""Gather and combine against the definition in float64, and the law that one undoes the other."""

import pytest
import torch

from megatron_evolve.kernels import eager, fused, reference
from megatron_evolve.substrate.model import build
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


CHUNKS = {  # rows of each chunk, by rank and expert
    "two ranks": ((3, 0, 5), (2, 4, 1)),
    "one rank": ((2, 3),),
    "an expert that nobody chose": ((0, 4), (0, 1), (0, 3)),
    "nothing received": ((0, 0), (0, 0)),
}


@pytest.mark.parametrize("backend", [eager, fused], ids=["eager", "fused"])
@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_from_other_ranks_are_sorted_as_megatron_does(name, backend):
    """Values, probabilities and gradients, and the way back; Megatron's own sort lists its counts on the host."""
    build.prepare()  # Megatron is never imported before it, or no later test of this process could train
    from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs

    counts_RE = torch.tensor(CHUNKS[name])
    (R, E), M = counts_RE.shape, int(counts_RE.sum())
    rng = torch.Generator().manual_seed(6)
    x, p, dy = (torch.randn(*size, generator=rng).to(DEVICE) for size in ((M, 24), (M,), (M, 24)))
    x.requires_grad_()
    order = torch.arange(R * E).view(R, E).t().flatten()  # chunks by expert, ranks in order
    want, p_want = sort_chunks_by_idxs(x, counts_RE.flatten(), order, p)
    plan = backend.route_plan(backend.experts_of_chunks(counts_RE.to(DEVICE), M), E)
    got, p_got = backend.permute(x, p.unsqueeze(1), plan)
    assert torch.equal(got, want) and torch.equal(p_got, p_want)
    assert torch.equal(plan.counts_E.cpu().long(), counts_RE.sum(0))
    assert torch.equal(backend.unpermute(got, plan), x)
    assert torch.equal(*(torch.autograd.grad(rows, x, dy)[0] for rows in (got, want)))


def test_fused_experts_take_chunks_as_they_were_received():
    """No row is moved before fc1 or after fc2: the plan of the chunks is all they need."""
    _, v = inputs("one choice", torch.float32, cases=TILE_CASES)
    counts_RE = torch.tensor(((5, 0, 9, 2, 1), (3, 6, 0, 4, 3)), device=DEVICE)
    M, E = len(v["x"]), counts_RE.size(1)
    chunk_experts = reference.experts_of_chunks(counts_RE, M)
    assert counts_RE.sum() == M and chunk_experts[:5].eq(0).all() and chunk_experts[-3:].eq(4).all()
    out = fused.routed_experts(v["x"], v["p"], fused.route_plan(chunk_experts, E), v["W1"], v["W2"])
    plan = reference.route_plan(chunk_experts, E)
    wide = widened(v)
    rows, p_rows = reference.permute(wide["x"], wide["p"], plan)
    want = reference.unpermute(reference.grouped_experts(rows, plan.counts_E, p_rows, wide["W1"], wide["W2"]), plan)
    leaves = ("x", "p", "W1", "W2")
    got = [out, *torch.autograd.grad(out.sum(), [v[name] for name in leaves])]
    for a, b in zip(got, [want, *torch.autograd.grad(want.sum(), [wide[name] for name in leaves])], strict=True):
        assert error(a.detach(), b.detach()) <= 2e-6
