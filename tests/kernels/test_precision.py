"""The three helpers that every kernel leans on, against torch's own arithmetic; and what is refused."""

import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_evolve.kernels import precision
from megatron_evolve.kernels.precision import dot, narrow, relu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _square_product(a, b, out, wide, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    acc = dot(tl.load(a + at), tl.load(b + at), tl.zeros([N, N], tl.float32))
    tl.store(out + at, narrow(acc, out.dtype.element_ty))
    tl.store(wide + at, relu(acc))


@pytest.mark.parametrize("dtype", precision.TRITON_TYPES, ids=str)
def test_products_are_wide_and_stores_round_to_nearest_even(dtype):
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=rng).to(dtype) for _ in range(2))
    a[3, 4] = torch.nan
    a[5, 6] = torch.inf
    want = a.float() @ b.float()
    out, wide = torch.empty(32, 32, dtype=dtype, device=DEVICE), torch.empty(32, 32, device=DEVICE)
    _square_product[(1,)](a.to(DEVICE), b.to(DEVICE), out, wide, 32)
    torch.testing.assert_close(wide.cpu(), want.relu(), rtol=1e-5, atol=1e-5, equal_nan=True)
    # the same float32 sum up to its order, so at most where it falls on the other side of a tie does one differ
    differs = (out.cpu() != want.to(dtype)) & ~want.isnan()
    assert differs.sum() <= (2 if dtype != torch.float32 else 32 * 32)
    assert torch.equal(out.cpu().isnan(), want.isnan())


@triton.jit
def _narrow(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, narrow(tl.load(x + i), out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_is_torchs_rounding(dtype):
    x = torch.randn(1024, generator=torch.Generator().manual_seed(1))
    x[:8] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.00390625, 1.01171875, 65504.0])
    out = torch.empty(1024, dtype=dtype, device=DEVICE)
    _narrow[(1,)](x.to(DEVICE), out, 1024)
    assert torch.equal(out.cpu().nan_to_num(7.0), x.to(dtype).nan_to_num(7.0))
    assert out[4].isnan()


def test_only_the_current_device_is_launched_on(monkeypatch):
    """Triton takes the current device's stream whatever the tensors' is: an illegal access, or a race."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with FakeTensorMode():
        # Not `torch.empty`, which another test's Megatron may have made a CPU's (substrate/model/cpu.py).
        here, there = (torch.empty_strided((4, 3), (3, 1), device=f"cuda:{index}") for index in (1, 0))
    precision.check(here, "x")
    with pytest.raises(ValueError, match=r"x on the current device cuda:1; got cuda:0: move it, or call within"):
        precision.check(there, "x")


def test_float64_is_refused():
    with pytest.raises(ValueError, match=r"x must be bfloat16, float16 or float32 .* got torch.float64: cast it"):
        precision.check(torch.zeros(2, dtype=torch.float64), "x")


def test_a_cpu_tensor_without_the_interpreter_is_refused_in_one_sentence():
    program = "import torch; from megatron_evolve.kernels import precision; precision.check(torch.zeros(2), 'x')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: the triton backend needs x on a CUDA device; got a CPU tensor: move it")
