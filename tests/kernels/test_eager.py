"""The eager form against the definition in float64: every output and every gradient, and the laws both obey."""

import pytest
import torch
from torch import Tensor

from megatron_evolve.kernels import eager, reference

# Largest ||got - want|| / ||want|| per tensor, `want` in float64 from the same (already rounded) inputs.
TOLERANCE = {
    torch.float64: 1e-14,  # eps 2.2e-16 and sums of up to 64 terms: measured at most 4e-16
    torch.float32: 2e-6,  # eps 1.2e-7: measured at most 4e-7
    torch.bfloat16: 2e-2,  # rounding 2^-9 = 2e-3 of h, a, y and each gradient in turn: measured at most 1.1e-2
}

# T, E, K, H, F and which experts a token may choose
CASES = {
    "plain": (24, 4, 2, 16, 24, None),
    "odd": (13, 7, 3, 7, 5, None),
    "one choice": (17, 5, 1, 8, 12, None),
    "all chosen": (9, 4, 4, 8, 6, None),
    "empty experts": (20, 6, 2, 8, 12, (1, 3, 4)),
    "one expert takes all": (20, 5, 1, 8, 12, (2,)),
    "no rows": (0, 4, 2, 8, 12, None),
}


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """An output cell that nobody wrote shows as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _inputs(case: str, dtype: torch.dtype, *, rank: int = 3, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Chosen experts (T, K) and leaf tensors; weights are scaled so that every product is of order one."""
    T, E, K, H, F, allowed = CASES[case]
    rng = torch.Generator().manual_seed(seed)
    pool = torch.tensor(allowed if allowed is not None else range(E))
    idx = pool[torch.rand(T, len(pool), generator=rng).argsort(-1)[:, :K]]
    shapes = {
        "x": (T, H),
        "p": (T, K),
        "W1": (E, F, H),
        "W2": (E, H, F),
        "A1": (E, rank, H),
        "B1": (E, F, rank),
        "A2": (E, rank, F),
        "B2": (E, H, rank),
    }
    values = {n: torch.randn(*s, generator=rng) / (s[-1] ** 0.5 if len(s) == 3 else 1) for n, s in shapes.items()}
    values["p"] = values["p"].sigmoid()
    return idx, {n: v.to(dtype).requires_grad_() for n, v in values.items()}


def _layer(backend, idx: Tensor, v: dict[str, Tensor], *, lora: bool) -> Tensor:
    plan = backend.route_plan(idx, len(v["W1"]))
    rows, p_rows = backend.permute(v["x"], v["p"], plan)
    adapters = [backend.GroupedLora(v["A1"], v["B1"], 0.5), backend.GroupedLora(v["A2"], v["B2"], 0.5)] if lora else []
    return backend.unpermute(backend.grouped_experts(rows, plan.counts_E, p_rows, v["W1"], v["W2"], *adapters), plan)


def _run(backend, idx: Tensor, v: dict[str, Tensor], *, lora: bool) -> dict[str, Tensor]:
    out = _layer(backend, idx, v, lora=lora)
    wanted = {n: t for n, t in v.items() if t.requires_grad and (lora or n[0] not in "AB")}
    rng = torch.Generator().manual_seed(99)
    dout = torch.randn(out.shape, generator=rng).to(out.dtype)
    grads = torch.autograd.grad(out, list(wanted.values()), dout)
    return {"out": out.detach()} | {f"d{n}": g for n, g in zip(wanted, grads, strict=True)}


def _error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    scale = want.norm().item()
    error = (got.double() - want).norm().item()
    return error / scale if scale > 0 else error


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["plain weights", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_layer_and_every_gradient(case, lora, dtype):
    idx, values = _inputs(case, dtype)
    exact = {n: t.detach().double().requires_grad_() for n, t in values.items()}
    want = _run(reference, idx, exact, lora=lora)
    got = _run(eager, idx, values, lora=lora)
    errors = {n: _error(got[n], want[n]) for n in want}
    assert all(e <= TOLERANCE[dtype] for e in errors.values()), errors
    assert all(got[n].dtype == dtype for n in got)


def test_negative_pre_activations_are_dead():
    idx, values = _inputs("plain", torch.float64)
    with torch.no_grad():
        values["x"].abs_()
        values["W1"].abs_().neg_()
    got = _run(eager, idx, values, lora=False)
    assert all(not t.any() for t in got.values())


@pytest.mark.parametrize("backend", [reference, eager], ids=["reference", "eager"])
def test_nan_reaches_its_token_and_no_other(backend):
    idx, values = _inputs("plain", torch.float32)
    with torch.no_grad():
        values["x"][5, 3] = torch.nan
    got = _run(backend, idx, values, lora=False)
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
    assert _error(grads[torch.float32][1], grads[torch.float64][1]) < TOLERANCE[torch.float32]


def test_permute_then_unpermute_is_the_identity():
    idx, values = _inputs("one choice", torch.float32)
    plan = eager.route_plan(idx, 5)
    rows, p_rows = eager.permute(values["x"], values["p"], plan)
    assert torch.equal(eager.unpermute(rows, plan), values["x"])
    assert torch.equal(p_rows[plan.row_of_choice_TK], values["p"])


def test_same_input_same_bits():
    idx, values = _inputs("plain", torch.float32)
    first, second = (_run(eager, idx, values, lora=True) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_frozen_weights_cost_no_weight_gradient():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(frozen: bool) -> int:
        idx, values = _inputs("plain", torch.float32)
        for name in ("W1", "W2"):
            values[name].requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter:
            _layer(eager, idx, values, lora=False).sum().backward()
        assert (values["W1"].grad is None) == frozen
        return counter.get_total_flops()

    T, _, K, H, F, _ = CASES["plain"]
    one_product = 2 * T * K * H * F
    assert flops(frozen=False) - flops(frozen=True) == 2 * one_product


def test_mixed_precision_probabilities():
    """bfloat16 rows with float32 probabilities, as Megatron's float32 router hands them over."""
    idx, values = _inputs("plain", torch.bfloat16)
    values["p"] = values["p"].detach().float().requires_grad_()
    want = _run(reference, idx, {n: t.detach().double().requires_grad_() for n, t in values.items()}, lora=False)
    got = _run(eager, idx, values, lora=False)
    assert got["out"].dtype == torch.bfloat16
    assert got["dp"].dtype == torch.float32
    assert all(_error(got[n], want[n]) <= TOLERANCE[torch.bfloat16] for n in want)


def test_counts_that_do_not_fit_the_rows_are_refused():
    x, W = torch.zeros(5, 4), torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="sum to 5; got 2 counts that sum to 4"):
        eager.grouped_linear(x, [2, 2], W)
    with pytest.raises(ValueError, match="rows of 2 experts"):
        eager.grouped_linear(x, [2, 2, 1], W)
