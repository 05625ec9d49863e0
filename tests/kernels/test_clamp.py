"""The soft bound of the squared ReLU: its two numbers one by one, and the whole layer with it, against float64."""

import pytest
import torch
import triton
import triton.language as tl

from megatron_evolve.kernels import eager, fused, reference
from megatron_evolve.kernels.clamp import soft_clamp, soft_clamp_slope
from tests.kernels.expert_cases import CASES, DEVICE, FLOAT32, TILE_CASES, error, inputs, layer, routed, run, widened

# Largest ||got - want|| / ||want|| per tensor, `want` in float64 from the same (already rounded) inputs.
EAGER = {
    torch.float64: 1e-14,  # measured at most 3.7e-16
    torch.float32: FLOAT32,  # measured at most 2.4e-7
    torch.bfloat16: 2e-2,  # as without a clamp: measured at most 9.0e-3
}
BFLOAT16_TIMES_EAGER = 1.25  # as without a clamp: measured at most 0.94, for eager rounds g and a apart
# relu(h) is of order 1: nearly all of it under the bound, and most of it flattened
CLAMPS = (4.0, 0.5)


@triton.jit
def _both(r, g, slope, s, N: tl.constexpr):
    i = tl.arange(0, N)
    r_N = tl.load(r + i)
    tl.store(g + i, soft_clamp(r_N, s))
    tl.store(slope + i, soft_clamp_slope(r_N, s))


def both(r_N: torch.Tensor, s: float) -> tuple[torch.Tensor, torch.Tensor]:
    g_N, slope_N = torch.empty_like(r_N), torch.empty_like(r_N)
    _both[(1,)](r_N, g_N, slope_N, s, N=len(r_N))
    return g_N, slope_N


@pytest.mark.parametrize("s", [0.5, 30.0])
def test_every_number_keeps_its_digits(s):
    """Element by element, from far below the bound to where the slope is 1e-37, the smallest normal float32."""
    r = (torch.logspace(-12, 1.6, 1024, dtype=torch.float64) * s).float().to(DEVICE)
    z = r.double() / s
    g, slope = both(r, s)
    # 1 - q is 0.4 where the series ends, so q's rounding counts 1.5 times: eps 1.2e-7, measured at most 2.9e-7
    assert ((g / s - z.tanh()).abs() <= 5e-7 * z.tanh()).all()
    want = z.cosh() ** -2
    # e^(-2z) turns the rounding of z, 6e-8, into 2 z of it: measured at most 1.5e-7 (1 + z)
    assert ((slope - want).abs() <= 4e-7 * (1 + z) * want).all()


@pytest.mark.filterwarnings("ignore:overflow")  # of the series, which is not taken there
def test_the_ends_of_the_range():
    r = torch.tensor([0.0, 1e30, torch.inf, torch.nan], device=DEVICE)
    g, slope = both(r, 2.0)
    torch.testing.assert_close(g.cpu(), torch.tensor([0.0, 2.0, 2.0, torch.nan]), equal_nan=True)
    torch.testing.assert_close(slope.cpu(), torch.tensor([1.0, 0.0, 0.0, torch.nan]), equal_nan=True)


def test_the_definition_is_bounded_and_tends_to_the_squared_relu():
    rng = torch.Generator().manual_seed(0)
    h, p = torch.randn(50, 8, generator=rng, dtype=torch.float64) * 3, torch.rand(50, generator=rng).double()
    plain = reference.weighted_squared_relu(h, p)
    for s in (0.5, 2.0):
        a = reference.weighted_squared_relu(h, p, s)
        assert (a <= plain).all()
        assert (a <= p.unsqueeze(-1) * s**2).all()
        assert torch.equal(a > 0, h > 0)
    # tanh(z) = z - z^3 / 3: at s = 1e4 and h of at most 12 the square is off by 2/3 z^2 = 1e-6
    torch.testing.assert_close(reference.weighted_squared_relu(h, p, 1e4), plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("dtype", EAGER, ids=str)
def test_eager_and_every_gradient(dtype, clamp):
    for case in ("odd", "empty experts", "no rows"):
        idx, values = inputs(case, dtype, cases=CASES)
        want = run(reference, idx, widened(values), lora=True, clamp=clamp)
        got = run(eager, idx, values, lora=True, clamp=clamp)
        errors = {n: error(got[n], want[n]) for n in want}
        assert all(e <= EAGER[dtype] for e in errors.values()), errors
        assert all(got[n].dtype == dtype for n in got)


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize(("case", "layer"), [("odd", layer), ("a tile and a half", routed), ("no rows", routed)])
def test_fused_and_every_gradient(case, layer, clamp):
    """Matrices and adapters both want gradients: h alone is kept, and `a` is made again with the bound."""
    idx, values = inputs(case, torch.float32, cases=TILE_CASES)
    want = run(reference, idx, widened(values), lora=True, clamp=clamp)
    got = run(fused, idx, values, lora=True, layer=layer, clamp=clamp)
    errors = {n: error(got[n], want[n]) for n in want}
    assert all(e <= FLOAT32 for e in errors.values()), errors


@pytest.mark.slow
def test_fused_in_bfloat16_is_as_good_as_eager():
    idx, values = inputs("odd", torch.bfloat16, cases=TILE_CASES)
    values["p"] = values["p"].detach().float().requires_grad_()
    want = run(reference, idx, widened(values), lora=True, clamp=1.0)
    plain = run(eager, idx, values, lora=True, clamp=1.0)
    got = run(fused, idx, values, lora=True, layer=routed, clamp=1.0)
    times = {n: error(got[n], want[n]) / error(plain[n], want[n]) for n in want}
    assert all(t <= BFLOAT16_TIMES_EAGER for t in times.values()), times


@pytest.mark.parametrize("backend", [reference, eager, fused], ids=["reference", "eager", "fused"])
@pytest.mark.filterwarnings("ignore:overflow")  # of the series, which is not taken there
def test_huge_rows_saturate_and_nan_stays_in_its_token(backend):
    idx, values = inputs("plain", torch.float32, cases=TILE_CASES)
    with torch.no_grad():
        values["x"][3] *= 1e6
        values["x"][5, 3] = torch.nan
    got = run(backend, idx, values, lora=False, clamp=2.0)
    assert got["out"].isnan().any(-1).nonzero().flatten().tolist() == [5]
    assert got["out"][5].isnan().all()
    assert got["dx"].isnan().any(-1).nonzero().flatten().tolist() == [5]
    assert not got["dx"][3].any()  # flat there: and no 0 * inf on the way


@pytest.mark.parametrize("backend", [reference, eager, fused], ids=["reference", "eager", "fused"])
@pytest.mark.parametrize("clamp", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_bound_is_refused(backend, clamp):
    idx, values = inputs("one token", torch.float32, cases=TILE_CASES)
    with pytest.raises(ValueError, match="clamp must be a positive number, or None"):
        layer(backend, idx, values, lora=False, clamp=clamp)
