"""The eager form against the definition in float64: every output and every gradient, and the laws both obey."""

import pytest
import torch

from megatron_evolve.kernels import eager, reference
from tests.kernels.expert_cases import CASES, error, inputs, layer, run, widened

# Largest ||got - want|| / ||want|| per tensor, `want` in float64 from the same (already rounded) inputs.
TOLERANCE = {
    torch.float64: 1e-14,  # eps 2.2e-16 and sums of up to 64 terms: measured at most 4e-16
    torch.float32: 2e-6,  # eps 1.2e-7: measured at most 4e-7
    torch.bfloat16: 2e-2,  # rounding 2^-9 = 2e-3 of h, a, y and each gradient in turn: measured at most 1.1e-2
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["plain weights", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_layer_and_every_gradient(case, lora, dtype):
    idx, values = inputs(case, dtype)
    want = run(reference, idx, widened(values), lora=lora)
    got = run(eager, idx, values, lora=lora)
    errors = {n: error(got[n], want[n]) for n in want}
    assert all(e <= TOLERANCE[dtype] for e in errors.values()), errors
    assert all(got[n].dtype == dtype for n in got)


def test_negative_pre_activations_are_dead():
    idx, values = inputs("plain", torch.float64)
    with torch.no_grad():
        values["x"].abs_()
        values["W1"].abs_().neg_()
    got = run(eager, idx, values, lora=False)
    assert all(not t.any() for t in got.values())


@pytest.mark.parametrize("backend", [reference, eager], ids=["reference", "eager"])
def test_nan_reaches_its_token_and_no_other(backend):
    idx, values = inputs("plain", torch.float32)
    with torch.no_grad():
        values["x"][5, 3] = torch.nan
    got = run(backend, idx, values, lora=False)
    bad = got["out"].isnan().any(-1)
    assert bad.nonzero().flatten().tolist() == [5]
    assert got["out"][5].isnan().all()
    assert got["dp"][5].isnan().all()
    touched = got["dW1"].isnan().flatten(1).any(-1).nonzero().flatten().tolist()
    assert touched == sorted(idx[5].tolist())


def test_router_gradient_against_float64():
    rng = torch.Generator().manual_seed(5)
    logits, bias, dp = (torch.randn(*s, generator=rng) for s in [(30, 7), (7,), (30, 3)])
    grads = {}
    for dtype in (torch.float32, torch.float64):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        idx, p = eager.router(leaf, bias, 3, 2.5)
        grads[dtype] = (idx, *torch.autograd.grad(p, leaf, dp.to(dtype)))
    assert torch.equal(grads[torch.float32][0], grads[torch.float64][0])
    assert error(grads[torch.float32][1], grads[torch.float64][1]) < TOLERANCE[torch.float32]


def test_permute_then_unpermute_is_the_identity():
    idx, values = inputs("one choice", torch.float32)
    plan = eager.route_plan(idx, 5)
    rows, p_rows = eager.permute(values["x"], values["p"], plan)
    assert torch.equal(eager.unpermute(rows, plan), values["x"])
    assert torch.equal(p_rows[plan.row_of_choice_TK], values["p"])


def test_same_input_same_bits():
    idx, values = inputs("plain", torch.float32)
    first, second = (run(eager, idx, values, lora=True) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_frozen_weights_cost_no_weight_gradient():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(frozen: bool) -> int:
        idx, values = inputs("plain", torch.float32)
        for name in ("W1", "W2"):
            values[name].requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter:
            layer(eager, idx, values, lora=False).sum().backward()
        assert (values["W1"].grad is None) == frozen
        return counter.get_total_flops()

    T, _, K, H, F, _ = CASES["plain"]
    one_product = 2 * T * K * H * F
    assert flops(frozen=False) - flops(frozen=True) == 2 * one_product


def test_mixed_precision_probabilities():
    """bfloat16 rows with float32 probabilities, as Megatron's float32 router hands them over."""
    idx, values = inputs("plain", torch.bfloat16)
    values["p"] = values["p"].detach().float().requires_grad_()
    want = run(reference, idx, widened(values), lora=False)
    got = run(eager, idx, values, lora=False)
    assert got["out"].dtype == torch.bfloat16
    assert got["dp"].dtype == torch.float32
    assert all(error(got[n], want[n]) <= TOLERANCE[torch.bfloat16] for n in want)


def test_counts_that_do_not_fit_the_rows_are_refused():
    x, W = torch.zeros(5, 4), torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="sum to 5; got 2 counts that sum to 4"):
        eager.grouped_linear(x, [2, 2], W)
    with pytest.raises(ValueError, match="rows of 2 experts"):
        eager.grouped_linear(x, [2, 2, 1], W)
