"""The definition itself: against a token-by-token loop written from the equations, and its laws."""

import pytest
import torch

from megatron_evolve.kernels import reference


def _layer_by_token(x, logits, bias, W1, W2, num_chosen, scale):
    """The two equations at the top of reference.py, one token and one expert at a time."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        s = torch.sigmoid(logits[t])
        chosen = sorted(range(len(s)), key=lambda e: (-(s[e] + bias[e]).item(), e))[:num_chosen]
        total = sum(s[e] for e in chosen) + 1e-20
        for e in chosen:
            p = scale * s[e] / total
            out[t] += W2[e] @ (p * torch.relu(W1[e] @ x[t]) ** 2)
    return out


@pytest.mark.parametrize(
    ("T", "E", "K", "H", "F"), [(9, 4, 2, 8, 12), (5, 7, 3, 7, 5), (6, 3, 3, 4, 4), (0, 4, 2, 8, 12)]
)
def test_layer_equals_its_equations(T, E, K, H, F):
    rng = torch.Generator().manual_seed(T + E)
    x, logits, bias = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in [(T, H), (T, E), (E,)])
    W1, W2 = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in [(E, F, H), (E, H, F)])
    idx, p = reference.router(logits, bias, K, 2.5)
    plan = reference.route_plan(idx, E)
    rows, p_rows = reference.permute(x, p, plan)
    out = reference.unpermute(reference.grouped_experts(rows, plan.counts_E, p_rows, W1, W2), plan)
    torch.testing.assert_close(out, _layer_by_token(x, logits, bias, W1, W2, K, 2.5), rtol=1e-12, atol=1e-12)


def test_lora_is_a_low_rank_change_of_the_matrix():
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(10, 6, generator=rng, dtype=torch.float64)
    W, A, B = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in [(3, 5, 6), (3, 2, 6), (3, 5, 2)])
    counts = torch.tensor([4, 0, 6])
    merged = reference.grouped_linear(x, counts, W + 0.5 * torch.einsum("eor,eri->eoi", B, A))
    torch.testing.assert_close(reference.grouped_linear(x, counts, W, reference.GroupedLora(A, B, 0.5)), merged)


def test_router_probabilities_sum_to_the_scale():
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, p = reference.router(logits, torch.zeros(8), 3, 2.5)
    torch.testing.assert_close(p.sum(-1), torch.full((50,), 2.5, dtype=torch.float64))


def test_router_breaks_ties_to_the_lowest_expert():
    idx, _ = reference.router(torch.zeros(4, 16), torch.zeros(16), 5, 1.0)
    assert idx.tolist() == [[0, 1, 2, 3, 4]] * 4


def test_router_bias_selects_but_does_not_weigh():
    logits = torch.tensor([[3.0, -3.0, 0.0]])
    idx, p = reference.router(logits, torch.tensor([0.0, 10.0, -10.0]), 2, 1.0)
    s = torch.sigmoid(logits[0])
    assert idx.tolist() == [[1, 0]]
    torch.testing.assert_close(p[0], torch.stack([s[1], s[0]]) / (s[1] + s[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_router_keeps_scores_that_a_large_bias_hides(dtype):
    # s = sigmoid(-16) = 1.1e-7 is under half the float32 spacing at 12 (4.8e-7): s + b is exactly 12 for every expert,
    # so the lowest experts win, and (s + b) - b would give 0 / 0 where the unbiased score gives the right share.
    logits = torch.tensor([[-16.0, -15.8, -15.6, -15.4]], dtype=dtype)
    idx, p = reference.router(logits, torch.full((4,), 12.0), 2, 1.0)
    assert idx.tolist() == [[0, 1]]
    torch.testing.assert_close(p[0], torch.softmax(logits[0, :2], -1), rtol=1e-6, atol=0)  # sigmoid ~ exp down here


def test_router_single_choice_keeps_its_score():
    logits = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    _, p = reference.router(logits, torch.zeros(2), 1, 2.0)
    torch.testing.assert_close(p, 2.0 * torch.sigmoid(logits[:, 1:]))


def test_plan_counts_every_choice_once_and_keeps_token_order():
    idx, _ = reference.router(torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), torch.zeros(6), 2, 1.0)
    plan = reference.route_plan(idx, 6)
    assert plan.counts_E.sum() == 40 * 2
    assert sorted(plan.choice_of_row_M.tolist()) == list(range(80))
    start = 0
    for e, count in enumerate(plan.counts_E.tolist()):
        tokens = plan.token_of_row_M[start : start + count].tolist()
        assert tokens == sorted(tokens)
        assert all(e in idx[t] for t in tokens)
        start += count
