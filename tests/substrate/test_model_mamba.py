"""The chunked scan, the convolution and the norm against the sequential recurrence, with every gradient."""

import math

import pytest
import torch
from torch import Tensor

from megatron_evolve.substrate.model import mamba, mamba_ssm

# float64 on both sides: only the order of sums differs; measured 1e-14 relative
EXACT = 1e-11


def sequential(x, dt, A, B, C, D, initial=None) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written: one token after the other."""
    L, batch, H, P = x.shape
    heads = H // B.shape[2]
    B, C = B.repeat_interleave(heads, 2), C.repeat_interleave(heads, 2)
    state = x.new_zeros(batch, H, P, B.shape[3]) if initial is None else initial
    outputs = []
    for t in range(L):
        state = (dt[t] * A).exp()[..., None, None] * state + (dt[t, ..., None] * x[t])[..., None] * B[t][:, :, None]
        outputs.append((state * C[t][:, :, None]).sum(-1) + D[:, None] * x[t])
    return torch.stack(outputs), state


def inputs(L: int, *, batch=2, H=6, P=5, G=3, N=4, with_state: bool = False) -> list[Tensor | None]:
    rng = torch.Generator().manual_seed(L)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    x, dt, A = randn(L, batch, H, P), randn(L, batch, H).exp(), -randn(H).exp()
    state = randn(batch, H, P, N) if with_state else None
    return [x, dt, A, randn(L, batch, G, N), randn(L, batch, G, N), randn(H), state]


def outputs_and_gradients(scan, values: list[Tensor | None]) -> list[Tensor]:
    leaves = [None if v is None else v.clone().requires_grad_() for v in values]
    y, state = scan(*leaves)
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t.dtype) for t in (y, state)]
    ((y * weights[0]).sum() + (state * weights[1]).sum()).backward()
    return [y.detach(), state.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


@pytest.mark.parametrize(
    ("L", "chunk", "with_state"),
    [(1, 16, False), (12, 16, False), (16, 16, False), (37, 16, False), (37, 16, True), (5, 1, True), (64, 16, False)],
)
def test_scan_is_the_recurrence(L: int, chunk: int, with_state: bool) -> None:
    values = inputs(L, with_state=with_state)
    want = outputs_and_gradients(sequential, values)
    got = outputs_and_gradients(lambda x, dt, A, B, C, D, s: mamba.chunked_scan(x, dt, A, B, C, D, chunk, s), values)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= EXACT * (1 + b.norm())


def test_strong_decay_neither_overflows_nor_underflows_to_nan() -> None:
    x, dt, A, B, C, D, _ = (v if v is None else v.float() for v in inputs(40))
    got = outputs_and_gradients(lambda *v: mamba.chunked_scan(*v[:-1], 16), [x, dt * 100, A * 100, B, C, D, None])
    assert all(t.isfinite().all() for t in got)


def test_float32_gradients_keep_their_digits() -> None:
    """The gradient of the decay is a difference of two sums; it must not lose more than float32 costs anyway."""
    values = inputs(56, H=6, P=16, G=2, N=16)[:-1]
    values[1] *= 0.05  # steps as the model initialises them, 1e-3 to 1e-1
    exact, rounded = (
        outputs_and_gradients(lambda *v: mamba.chunked_scan(*v, 64), [v.to(dtype) for v in values])
        for dtype in (torch.float64, torch.float32)
    )
    for a, b in zip(rounded, exact, strict=True):
        assert (a - b).norm() <= 5e-6 * b.norm()  # measured at most 1.1e-6


def test_chunk_length_does_not_change_the_result() -> None:
    values = inputs(50)[:-1]
    results = [mamba.chunked_scan(*values, chunk)[0] for chunk in (1, 7, 16, 50, 999)]
    for result in results[1:]:
        assert torch.allclose(result, results[0], rtol=EXACT, atol=EXACT)


def test_a_step_of_zero_leaves_the_state() -> None:
    x, dt, A, B, C, D, state = inputs(9, with_state=True)
    _, after = mamba.chunked_scan(x, torch.zeros_like(dt), A, B, C, D, 4, state)
    assert torch.equal(after, state)


def test_tokens_one_by_one_are_the_scan() -> None:
    x, dt, A, B, C, D, state = inputs(11, with_state=True)
    want, want_state = mamba.chunked_scan(x, dt, A, B, C, D, 4, state)
    got = []
    for t in range(11):
        got.append(mamba.scan_step(x[t], dt[t], A, B[t], C[t], D, state))
    assert torch.allclose(torch.stack(got), want, rtol=EXACT, atol=EXACT)
    assert torch.allclose(state, want_state, rtol=EXACT, atol=EXACT)


def test_convolution_is_torch_conv1d() -> None:
    rng = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in ((9, 2, 6), (6, 4), (6,)))

    def theirs(x, weight, bias):
        y = torch.nn.functional.conv1d(x.permute(1, 2, 0), weight.unsqueeze(1), bias, padding=3, groups=6)[..., :9]
        return torch.nn.functional.silu(y).permute(2, 0, 1), x.new_zeros(1)

    def ours(x, weight, bias):
        return mamba.causal_conv(x, weight, bias), x.new_zeros(1)

    got, want = (outputs_and_gradients(conv, [x, weight, bias]) for conv in (ours, theirs))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=EXACT, atol=EXACT)
    state, steps = torch.zeros(3, 2, 6, dtype=torch.float64), []
    for token in x:
        y, state = mamba.conv_step(token, state, weight, bias)
        steps.append(y)
    assert torch.allclose(torch.stack(steps), mamba.causal_conv(x, weight, bias), rtol=EXACT, atol=EXACT)


SEQUENCES = [  # lengths in each of two rows of 50 tokens; chunks of 16 (four of 13)
    ([50], [50]),
    ([1] * 50, [50]),
    ([13, 13, 13, 11], [12, 1, 14, 23]),
    ([3, 1, 40, 6], [25, 25]),
]


def _by_sequence(lengths: tuple[list[int], list[int]], run, values: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """`run` on each sequence of each row alone; outputs put together again, and each row's last state."""
    rows = []
    for row, cut in enumerate(lengths):
        parts = zip(*(v[:, row : row + 1].split(cut) for v in values), strict=True)
        outputs, states = zip(*(run(*part) for part in parts), strict=True)
        rows.append((torch.cat(outputs), states[-1]))
    return torch.cat([y for y, _ in rows], 1), torch.cat([state for _, state in rows])


def _numbers(lengths: tuple[list[int], list[int]]) -> Tensor:
    """The sequence of each token (L, B), from 7 on: only whether two are equal may count."""
    return torch.stack([torch.arange(len(cut)).repeat_interleave(torch.tensor(cut)) + 7 for cut in lengths], 1)


@pytest.mark.parametrize("lengths", SEQUENCES)
def test_sequences_of_one_row_do_not_see_each_other(lengths: tuple[list[int], list[int]]) -> None:
    x, dt, A, B, C, D, _ = inputs(50)

    def together(x, dt, A, B, C, D):
        return mamba.chunked_scan(x, dt, A, B, C, D, 16, sequence_LB=_numbers(lengths))

    def alone(x, dt, A, B, C, D):
        return _by_sequence(lengths, lambda x, dt, B, C: sequential(x, dt, A, B, C, D), [x, dt, B, C])

    got, want = (outputs_and_gradients(scan, [x, dt, A, B, C, D]) for scan in (together, alone))
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= EXACT * (1 + b.norm())


@pytest.mark.parametrize("lengths", SEQUENCES)
def test_convolution_begins_anew_at_each_sequence(lengths: tuple[list[int], list[int]]) -> None:
    rng = torch.Generator().manual_seed(2)
    values = [torch.randn(*s, generator=rng, dtype=torch.float64) for s in ((50, 2, 6), (6, 4), (6,))]

    def together(x, weight, bias):
        return mamba.causal_conv(x, weight, bias, _numbers(lengths)), x.new_zeros(1)

    def alone(x, weight, bias):
        return _by_sequence(lengths, lambda x: (mamba.causal_conv(x, weight, bias), x.new_zeros(1)), [x])

    got, want = (outputs_and_gradients(conv, values) for conv in (together, alone))
    for a, b in zip((got[0], *got[2:]), (want[0], *want[2:]), strict=True):
        assert torch.allclose(a, b, rtol=EXACT, atol=EXACT)


def test_convolution_of_fewer_tokens_than_taps() -> None:
    x, weight, bias = torch.ones(2, 1, 1), torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.zeros(1)
    got = mamba.causal_conv(x, weight, bias).flatten().tolist()
    assert got == pytest.approx([v / (1 + math.exp(-v)) for v in (4.0, 7.0)])


def test_group_norm_is_rms_by_group() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    norm = mamba_ssm.GatedRMSNorm(8, eps=1e-5, group_size=4)
    want = torch.cat([torch.nn.functional.rms_norm(part, (4,), eps=1e-5) for part in x.split(4, -1)], -1)
    assert torch.allclose(norm(x), want, rtol=1e-6)
    with pytest.raises(ValueError, match="norm_before_gate"):
        mamba_ssm.GatedRMSNorm(8, norm_before_gate=True)


def test_clamp_applies_after_softplus() -> None:
    dt = mamba.step_size(torch.tensor([[[-20.0, 3.0]]]), torch.zeros(2), (1e-3, math.inf))
    assert dt.flatten().tolist() == pytest.approx([1e-3, math.log1p(math.exp(3.0))])


def test_refuses_what_only_the_package_does() -> None:
    x, w = torch.zeros(1, 4, 24), torch.zeros(16, 4)
    with pytest.raises(ValueError, match="install mamba-ssm"):
        mamba_ssm.mamba_split_conv1d_scan_combined(x, w, w[:, 0], w[0], w[0], w[0], 16, activation="relu", headdim=2)
