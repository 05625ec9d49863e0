"""The fused experts against the definition in float64: every output and every gradient, through both doors."""

import pytest
import torch

from megatron_evolve.kernels import eager, fused, reference
from tests.kernels.expert_cases import DEVICE, FLOAT32, TILE_CASES, error, inputs, layer, routed, run, widened

# bfloat16 is held to its own kind: what plain PyTorch loses on the same inputs, and a quarter more. Measured at most
# 1.03 times: the adapter is not rounded apart from the base, nor da and each expert's sum before they are used.
BFLOAT16_TIMES_EAGER = 1.25


def check_float32(case: str, layer, *, lora: bool) -> None:
    idx, values = inputs(case, torch.float32, cases=TILE_CASES)
    want = run(reference, idx, widened(values), lora=lora)
    got = run(fused, idx, values, lora=lora, layer=layer)
    errors = {n: error(got[n], want[n]) for n in want}
    assert all(e <= FLOAT32 for e in errors.values()), errors


@pytest.mark.parametrize("case", TILE_CASES)
def test_from_sorted_rows(case):
    check_float32(case, layer, lora=False)


@pytest.mark.parametrize("case", TILE_CASES)
def test_from_tokens_with_adapters(case):
    check_float32(case, routed, lora=True)


@pytest.mark.parametrize("layer", [layer, routed], ids=["rows", "tokens"])
def test_adapters_from_rows_and_none_from_tokens(layer):
    check_float32("odd", layer, lora=layer is not routed)


@pytest.mark.parametrize("case", ["odd", "a tile and a half", "tiles of 64"])
def test_bfloat16_is_as_good_as_eager(case):
    """With float32 probabilities, as Megatron's float32 router hands them over."""
    idx, values = inputs(case, torch.bfloat16, cases=TILE_CASES)
    values["p"] = values["p"].detach().float().requires_grad_()
    want = run(reference, idx, widened(values), lora=True)
    plain = run(eager, idx, values, lora=True)
    got = run(fused, idx, values, lora=True, layer=routed)
    times = {n: error(got[n], want[n]) / error(plain[n], want[n]) for n in want}
    assert all(t <= BFLOAT16_TIMES_EAGER for t in times.values()), times
    assert all(got[n].dtype == plain[n].dtype for n in got)


def test_negative_pre_activations_are_dead():
    idx, values = inputs("plain", torch.float32, cases=TILE_CASES)
    with torch.no_grad():
        values["x"].abs_()
        values["W1"].abs_().neg_()
    got = run(fused, idx, values, lora=False)
    assert all(not t.any() for t in got.values())


def test_nan_reaches_its_token_and_no_other():
    idx, values = inputs("plain", torch.float32, cases=TILE_CASES)
    with torch.no_grad():
        values["x"][5, 3] = torch.nan
    got = run(fused, idx, values, lora=False, layer=routed)
    assert got["out"].isnan().any(-1).nonzero().flatten().tolist() == [5]
    assert got["out"][5].isnan().all()
    assert got["dp"][5].isnan().all()
    assert got["dp"].isnan().sum() == 2
    touched = got["dW1"].isnan().flatten(1).any(-1).nonzero().flatten().tolist()
    assert touched == sorted(idx[5].tolist())


def test_same_input_same_bits():
    idx, values = inputs("odd", torch.float32, cases=TILE_CASES)
    first, second = (run(fused, idx, values, lora=True, layer=routed) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_main_gradients_are_added_in_place():
    """E float32 buffers, views of one, the same bits twice; an expert without rows leaves its own as it was."""
    idx, values = inputs("empty experts", torch.bfloat16, cases=TILE_CASES)
    plan = fused.route_plan(idx, 6)
    W1, W2 = ([w.detach().clone().requires_grad_() for w in values[n]] for n in ("W1", "W2"))
    start = [torch.rand(6, *W[0].shape).to(W[0].device) for W in (W1, W2)]
    args = (values["x"], values["p"], plan, W1, W2)
    runs = [[buffer.clone() for buffer in start] for _ in range(2)]
    for main in runs:
        out = fused.routed_experts(*args, main_grads=tuple(list(m.unbind()) for m in main))
        out.backward(torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(w.grad is None for w in (*W1, *W2))
    grads = torch.autograd.grad(fused.routed_experts(*args), [*W1, *W2], torch.ones_like(out))
    for i, group in enumerate((grads[:6], grads[6:])):
        for e, grad in enumerate(group):
            added = main[i][e] - start[i][e]
            assert (added.bfloat16() - grad).norm() <= 2**-7 * grad.norm()  # the one rounded to bfloat16, once
            assert (e in (1, 3, 4)) or torch.equal(main[i][e], start[i][e])


def test_frozen_matrices_cost_no_gradient_product(monkeypatch):
    idx, values = inputs("plain", torch.float32, cases=TILE_CASES)
    for name in ("W1", "W2"):
        values[name].requires_grad_(False)

    def refuse(*args, **kwargs):
        raise AssertionError("a weight gradient of a frozen matrix")

    monkeypatch.setattr("megatron_evolve.kernels.grouped_linear.weight_gradient", refuse)
    got = run(fused, idx, values, lora=False)
    assert set(got) == {"out", "dx", "dp"}


def test_only_h_is_kept_for_the_backward_pass():
    idx, values = inputs("plain", torch.float32, cases=TILE_CASES)
    T, _, K, _, F, _ = TILE_CASES["plain"]
    plan = fused.route_plan(idx, len(values["W1"]))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused.routed_experts(values["x"], values["p"], plan, values["W1"], values["W2"])
    given = {t.data_ptr() for t in values.values()}
    assert [t.shape for t in kept if t.data_ptr() not in given] == [(T * K, F)]


@pytest.mark.parametrize("shared", [("A1", "B1", "A2", "B2"), ("A1", "B2")], ids=["whole", "outer"])
def test_shared_adapters_are_expanded_ones(shared):
    """One A and B for all experts of a rank (Megatron-Bridge's default) is a view of stride 0; nothing is copied.

    Shared outer: only the sides towards the model's width are one, each expert keeps its own towards the hidden width.
    """
    idx, values = inputs("plain", torch.float32, cases=TILE_CASES)
    own = {n: values[n][0] if n in shared else values[n] for n in ("A1", "B1", "A2", "B2")}
    one = {n: t.detach().clone().requires_grad_() for n, t in own.items()}

    def grads(backend, leaves, v):
        wide = {n: t.expand(len(v["W1"]), *t.shape[-2:]) for n, t in leaves.items()}
        out = layer(backend, idx, {**v, **wide}, lora=True)
        return torch.autograd.grad(out.square().sum(), list(leaves.values()))

    want = grads(reference, widened(one), widened(values))
    got = grads(fused, one, values)
    assert all(error(a, b) <= FLOAT32 for a, b in zip(got, want, strict=True))


def test_grouped_linear_and_every_gradient():
    rng = torch.Generator().manual_seed(4)
    counts = [9, 0, 22]
    shapes = {"x": (31, 40), "W": (3, 56, 40), "A": (3, 4, 40), "B": (3, 56, 4)}
    leaves = {n: torch.randn(*s, generator=rng).to(DEVICE).requires_grad_() for n, s in shapes.items()}

    def outcome(backend, v):
        lora = backend.GroupedLora(v["A"], v["B"], 0.25)
        out = backend.grouped_linear(v["x"], torch.tensor(counts), v["W"], lora)
        return [out, *torch.autograd.grad(out.square().sum(), list(v.values()))]

    for a, b in zip(outcome(fused, leaves), outcome(reference, widened(leaves)), strict=True):
        assert error(a.detach(), b.detach()) <= FLOAT32


def test_what_does_not_fit_is_refused():
    x, W = torch.zeros(5, 4, device=DEVICE), torch.zeros(2, 3, 4, device=DEVICE)
    with pytest.raises(ValueError, match="sum to 5; got 2 counts that sum to 4"):
        fused.grouped_linear(x, [2, 2], W)
    with pytest.raises(ValueError, match="rows of 2 experts"):
        fused.grouped_linear(x, [2, 2, 1], W)
    with pytest.raises(ValueError, match=r"share a dtype; got torch.float32 and torch.bfloat16: cast one"):
        fused.grouped_linear(x, [2, 3], W.bfloat16())
