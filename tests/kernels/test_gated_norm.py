"""The gated group norm against the definition in float64: the output and every gradient."""

import pytest
import torch

from megatron_evolve.kernels import reference
from megatron_evolve.kernels.gated_norm import gated_rms_norm
from tests.kernels.expert_cases import DEVICE, error, widened

TOLERANCE = {
    torch.float32: 2e-6,  # eps 1.2e-7, sums of up to 160 terms, one exponential and one root: measured at most 2e-7
    torch.bfloat16: 4e-3,  # float32 inside; dout and each result round once (2^-9): measured at most 2.9e-3
}
# T, D, G; a program holds 2,048 numbers of one group and sums dw over 64 tokens
CASES = {
    "plain": (40, 64, 4),
    "odd": (37, 3 * 47, 3),
    "one group": (20, 160, 1),
    "groups of two": (5, 8, 4),
    "more than a stripe": (70, 32, 2),
    "no tokens": (0, 32, 2),
}


def outcome(norm, values: dict, groups: int) -> list[torch.Tensor]:
    out = norm(*values.values(), groups)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, list(values.values()), dout)]


def leaves(case: str, dtype: torch.dtype) -> dict:
    T, D, _ = CASES[case]
    rng = torch.Generator().manual_seed(0)
    values = {name: torch.randn(*shape, generator=rng) for name, shape in (("y", (T, D)), ("z", (T, D)), ("w", (D,)))}
    return {name: value.to(DEVICE, dtype).requires_grad_() for name, value in values.items()}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype):
    values, groups = leaves(case, dtype), CASES[case][2]
    got, again = (outcome(gated_rms_norm, values, groups) for _ in range(2))
    for a, b, c in zip(got, outcome(reference.gated_rms_norm, widened(values), groups), again, strict=True):
        assert a.dtype == dtype
        assert error(a, b) <= TOLERANCE[dtype]
        assert torch.equal(a, c)


def test_nan_stays_in_its_token_and_group():
    values = leaves("plain", torch.float32)
    with torch.no_grad():
        values["y"][7, 20] = torch.nan  # of the second group of 16
    out = gated_rms_norm(*values.values(), 4)
    bad = out.isnan().nonzero()
    assert set(bad[:, 0].tolist()) == {7}
    assert bad[:, 1].tolist() == list(range(16, 32))


def test_definition_is_torchs_rms_norm_of_the_gated_rows():
    values = widened(leaves("odd", torch.float32))
    y, z, w = values.values()
    gated = (y * z * z.sigmoid()).unflatten(1, (3, 47))
    want = torch.nn.functional.rms_norm(gated, (47,), eps=1e-5).flatten(1) * w
    torch.testing.assert_close(reference.gated_rms_norm(y, z, w, 3), want)


def test_groups_that_do_not_divide_are_refused():
    y = torch.zeros(2, 10, device=DEVICE)
    with pytest.raises(ValueError, match=r"D a multiple of 3 groups; got \(2, 10\)"):
        gated_rms_norm(y, y, y[0], 3)
