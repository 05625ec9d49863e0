"""The Triton router against the definition in float64: the choice, the shares, and every gradient."""

import pytest
import torch

from megatron_evolve.kernels import reference
from megatron_evolve.kernels.router import router, router_from_tokens
from tests.kernels.expert_cases import DEVICE, FLOAT32, error

SCALE = 2.5
# The gradient passes through dlogits rounded to bfloat16 once (2^-9) and one bfloat16 product (2^-9 again): measured at
# most 2.5e-3.
BFLOAT16 = 8e-3

# T, E, K, H
CASES = {
    "plain": (40, 16, 4, 64),
    "odd": (37, 7, 3, 97),
    "one choice": (20, 5, 1, 32),
    "all chosen": (20, 6, 6, 32),
    "more tokens than a block": (70, 20, 2, 16),
    "no tokens": (0, 4, 2, 32),
}


def values(case: str, dtype=torch.float32) -> list[torch.Tensor]:
    T, E, _, H = CASES[case]
    rng = torch.Generator().manual_seed(1)
    x, W, bias = (torch.randn(*s, generator=rng) for s in [(T, H), (E, H), (E,)])
    return [
        x.to(DEVICE, dtype).requires_grad_(),
        (W / H**0.5).to(DEVICE, dtype).requires_grad_(),
        (bias / 4).to(DEVICE),
    ]


def gradients(p: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    dp = torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(p)
    return [p.detach(), *torch.autograd.grad(p, leaves, dp)]


@pytest.mark.parametrize("case", CASES)
def test_from_logits(case):
    x, W, bias = values(case)
    logits = (x @ W.t()).detach().requires_grad_()
    wide = logits.detach().double().requires_grad_()
    want_idx, want_p = reference.router(wide, bias, CASES[case][2], SCALE)
    idx, p = router(logits, bias, CASES[case][2], SCALE)
    assert idx.dtype == torch.int32
    assert torch.equal(idx.long(), want_idx)
    for a, b in zip(gradients(p, logits), gradients(want_p, wide), strict=True):
        assert error(a, b) <= FLOAT32


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_from_tokens(case, dtype, tolerance):
    x, W, bias = values(case, dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, W)]
    want_idx, want_p = reference.router(wide[0] @ wide[1].t(), bias, CASES[case][2], SCALE)
    idx, p = router_from_tokens(x, W, bias, CASES[case][2], SCALE)
    assert torch.equal(idx.long(), want_idx)
    got, want = gradients(p, x, W), gradients(want_p, *wide)
    assert error(got[0], want[0]) <= FLOAT32  # bfloat16 products are exact in float32: the shares lose nothing
    for a, b in zip(got, want, strict=True):
        assert error(a, b) <= tolerance


def test_a_bias_may_be_a_column_of_something():
    x, _, bias = values("odd")
    pair = torch.stack((bias, bias.flip(0)), 1)
    got, want = router(x[:, :7], pair[:, 0], 3, SCALE), router(x[:, :7], bias, 3, SCALE)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_ties_go_to_the_lowest_expert():
    idx, p = router(torch.zeros(4, 12, device=DEVICE), torch.zeros(12, device=DEVICE), 5, 1.0)
    assert idx.tolist() == [[0, 1, 2, 3, 4]] * 4
    torch.testing.assert_close(p, torch.full_like(p, 0.2))


def test_a_large_bias_hides_scores_but_does_not_weigh():
    """s = sigmoid(-16) = 1.1e-7 vanishes beside 12 in float32: all are equal, and (s + b) - b would give 0 / 0."""
    logits = torch.tensor([[-16.0, -15.8, -15.6, -15.4]], device=DEVICE)
    idx, p = router(logits, torch.full((4,), 12.0, device=DEVICE), 2, 1.0)
    assert idx.tolist() == [[0, 1]]
    torch.testing.assert_close(p[0], torch.softmax(logits[0, :2], -1), rtol=1e-6, atol=0)


def test_nan_ranks_first_and_stays_in_its_token():
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    logits[2, 4] = torch.nan
    idx, p = router(logits, torch.zeros(6, device=DEVICE), 2, 1.0)
    assert torch.equal(idx.long(), reference.router(logits, torch.zeros(6, device=DEVICE), 2, 1.0)[0])
    assert p.isnan().any(-1).nonzero().flatten().tolist() == [2]
    assert p[2].isnan().all()


def test_nan_of_a_token_stays_in_its_shares_and_gradient():
    x, W, bias = values("plain")
    with torch.no_grad():
        x[5, 3] = torch.nan
    idx, p = router_from_tokens(x, W, bias, CASES["plain"][2], SCALE)
    dx, dW = torch.autograd.grad(p, [x, W], torch.ones_like(p))
    own = torch.arange(len(x), device=DEVICE) == 5
    assert torch.equal(p.isnan().all(1), own) and torch.equal(p.isnan().any(1), own)
    assert torch.equal(dx.isnan().all(1), own) and torch.equal(dx.isnan().any(1), own)
    assert dW[idx[5].long()].isnan().all(), "the chosen experts learn that something is wrong"


def test_an_expert_barred_by_its_bias_is_chosen_last():
    """Bias of minus infinity, and fewer experts left than a token wants: every index is still an expert's."""
    bias = torch.tensor([0.0, -torch.inf, -torch.inf], device=DEVICE)
    idx, _ = router(torch.zeros(2, 3, device=DEVICE), bias, 3, 1.0)
    assert idx.tolist() == [[0, 1, 2]] * 2


def test_shares_sum_to_the_scale_and_repeat_bit_for_bit():
    x, W, bias = values("plain")
    (idx, p), (again, q) = (router_from_tokens(x, W, bias, 4, SCALE) for _ in range(2))
    torch.testing.assert_close(p.sum(-1), torch.full((40,), SCALE, device=DEVICE))
    assert torch.equal(idx, again)
    assert torch.equal(p, q)
