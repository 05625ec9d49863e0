"""The norm after Mamba-2's scan in one pass each way: gate, group norm, weight.

    g = y silu(z)        r = 1 / sqrt(mean over the group of g^2 + eps)        out = g r w
    dg = r (w dout - g r^2 mean over the group of (w dout g))         dw = sum over tokens of dout g r
    dy = dg silu(z)      dz = dg y s(z) (1 + z (1 - s(z))),           s the sigmoid

Megatron-Core calls the scan without its norm and does this in several elementwise passes over T x D. Here each number
is read and written once; nothing is kept but the inputs, r is made again. dw crosses tokens: every program sums a
stripe of them in order, and a second pass adds the stripes.

Letters: T tokens, D inner width, G groups; at Nemotron-3-Nano D = 4096 and G = 8, groups of 512.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_evolve.kernels.precision import check, narrow

# Numbers of a program at a time, 8 a thread forward and 4 backward, where a loop waits for its loads: on an H100 at
# 16,384 tokens the backward pass moved 2,380 GB/s, with blocks of 2,048 in 8 warps 880.
FORWARD, BACKWARD = 2048, 512
STRIPE = 16  # tokens whose dw one program sums: 512 stripes of D float32 at 8,192 tokens, 2.5 % of the bytes moved


@triton.jit
def _gated(y_TD, z_TD, at, live):
    y = tl.load(y_TD + at, mask=live, other=0.0).to(tl.float32)
    z = tl.load(z_TD + at, mask=live, other=0.0).to(tl.float32)
    return y, z, 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _forward(y_TD, z_TD, w_D, out_TD, T, N, D, eps, BT: tl.constexpr, BN: tl.constexpr):
    t, n = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BN)
    at = t.to(tl.int64)[:, None] * D + (tl.program_id(1) * N + n)[None, :]
    live = (t < T)[:, None] & (n < N)[None, :]
    y, z, s = _gated(y_TD, z_TD, at, live)
    g = y * z * s
    r = 1.0 / tl.sqrt(tl.sum(g * g, 1) / N + eps)
    w = tl.load(w_D + tl.program_id(1) * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_TD + at, narrow(g * r[:, None] * w[None, :], out_TD.dtype.element_ty), mask=live)


@triton.jit
def _backward(
    dout_TD, y_TD, z_TD, w_D, dy_TD, dz_TD, dw_SD, T, N, D, eps, S: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr
):
    n = tl.arange(0, BN)
    columns = tl.program_id(1) * N + n
    w = tl.load(w_D + columns, mask=n < N, other=0.0).to(tl.float32)
    dw = tl.zeros([BN], tl.float32)
    for first in range(0, S, BT):
        t = tl.program_id(0) * S + first + tl.arange(0, BT)
        at = t.to(tl.int64)[:, None] * D + columns[None, :]
        live = (t < T)[:, None] & (n < N)[None, :]
        y, z, s = _gated(y_TD, z_TD, at, live)
        dout = tl.load(dout_TD + at, mask=live, other=0.0).to(tl.float32)
        g, dn = y * z * s, dout * w[None, :]
        r = (1.0 / tl.sqrt(tl.sum(g * g, 1) / N + eps))[:, None]
        dg = r * (dn - g * r * r * (tl.sum(dn * g, 1) / N)[:, None])
        dw += tl.sum(dout * g * r, 0)
        tl.store(dy_TD + at, narrow(dg * z * s, dy_TD.dtype.element_ty), mask=live)
        tl.store(dz_TD + at, narrow(dg * y * s * (1.0 + z * (1.0 - s)), dz_TD.dtype.element_ty), mask=live)
    tl.store(dw_SD + tl.program_id(0) * D + columns, dw, mask=n < N)


def _blocks(group_width: int, numbers: int) -> dict[str, int]:
    bn = triton.next_power_of_2(group_width)
    bt = max(1, min(STRIPE, numbers // bn))
    # 2,048 numbers in 4 warps spilled 8 bytes of the backward pass on sm_100
    return {"BT": bt, "BN": bn, "num_warps": 8 if bt * bn > 1024 else 4}


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_TD, z_TD, w_D, num_groups, eps):
        ctx.save_for_backward(y_TD, z_TD, w_D)
        ctx.num_groups, ctx.eps = num_groups, eps
        (T, D), out_TD = y_TD.shape, torch.empty_like(y_TD)
        blocks = _blocks(D // num_groups, FORWARD)
        if T:
            grid = (triton.cdiv(T, blocks["BT"]), num_groups)
            _forward[grid](y_TD, z_TD, w_D, out_TD, T, D // num_groups, D, eps, **blocks)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TD):
        y_TD, z_TD, w_D = ctx.saved_tensors
        T, D = y_TD.shape
        dy_TD, dz_TD = torch.empty_like(y_TD), torch.empty_like(z_TD)
        dw_SD = torch.empty(triton.cdiv(T, STRIPE), D, dtype=torch.float32, device=y_TD.device)
        if T:
            args = (dout_TD.contiguous(), y_TD, z_TD, w_D, dy_TD, dz_TD, dw_SD, T, D // ctx.num_groups, D, ctx.eps)
            _backward[len(dw_SD), ctx.num_groups](*args, S=STRIPE, **_blocks(D // ctx.num_groups, BACKWARD))
        return dy_TD, dz_TD, dw_SD.sum(0).to(w_D.dtype), None, None


def gated_rms_norm(y_TD: Tensor, z_TD: Tensor, w_D: Tensor, num_groups: int, eps: float = 1e-5) -> Tensor:
    """(T, D) in the dtype of y. Raises ValueError where the groups do not divide D or the shapes differ."""
    for name, tensor in (("y", y_TD), ("z", z_TD), ("w", w_D)):
        check(tensor, name)
    if y_TD.shape != z_TD.shape or w_D.shape != y_TD.shape[1:] or y_TD.size(1) % num_groups:
        raise ValueError(
            f"y and z must be (T, D), w (D,), and D a multiple of {num_groups} groups; got {tuple(y_TD.shape)}, "
            f"{tuple(z_TD.shape)} and {tuple(w_D.shape)}: flatten the leading axes and pass this rank's groups"
        )
    return _GatedNorm.apply(y_TD.contiguous(), z_TD.contiguous(), w_D.contiguous(), num_groups, eps)
