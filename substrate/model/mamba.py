"""Mamba-2 in plain PyTorch, on any device: convolution, chunked scan, gated norm, and one token at a time.

The recurrence, per head, with step dt_t > 0 and decay exp(dt_t A), A < 0:

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t + D x_t

is evaluated in chunks of Q tokens: inside a chunk as one masked Q x Q product, between chunks through S (Dao and Gu,
"Transformers are SSMs", arXiv 2405.21060, section 6).

Several sequences may lie end to end in one row: `sequence_LB` then numbers the sequence of each token, and neither
convolution nor state crosses from one number to the next.

L tokens, B rows, H heads, P head dimension, G groups sharing B and C, N state, K taps, C convolved channels, Q chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

NO_LIMIT = (0.0, float("inf"))


def step_size(dt_LBH: Tensor, dt_bias_H: Tensor, dt_limit: tuple[float, float] = NO_LIMIT) -> Tensor:
    """softplus(dt + bias) in float32, clamped to `dt_limit` where that limits anything."""
    dt_LBH = F.softplus(dt_LBH.float() + dt_bias_H.float())
    return dt_LBH if tuple(dt_limit) == NO_LIMIT else dt_LBH.clamp(*dt_limit)


class _CausalConv(torch.autograd.Function):
    """The sum and its silu. Autograd over the same shifts keeps eight tensors and takes twice as long."""

    @staticmethod
    def forward(ctx, x_LBC, weight_CK, bias_C, sequence_LB):
        taps_KC = weight_CK.t().contiguous()
        sum_LBC = torch.addcmul(bias_C, x_LBC, taps_KC[-1])
        for back, tap_C in _earlier(taps_KC, len(x_LBC)):
            sum_LBC[back:].addcmul_(_inside(x_LBC[:-back], sequence_LB, back), tap_C)
        ctx.save_for_backward(x_LBC, taps_KC, sum_LBC, sequence_LB)
        return F.silu(sum_LBC)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_LBC):
        x_LBC, taps_KC, sum_LBC, sequence_LB = ctx.saved_tensors
        dsum_LBC = torch.ops.aten.silu_backward(dy_LBC, sum_LBC)
        dtaps_KC = torch.zeros_like(taps_KC)
        dtaps_KC[-1] = (dsum_LBC * x_LBC).sum((0, 1))
        dx_LBC = dsum_LBC * taps_KC[-1]
        for back, tap_C in _earlier(taps_KC, len(x_LBC)):
            dlater_LBC = _inside(dsum_LBC[back:], sequence_LB, back)
            dx_LBC[:-back].addcmul_(dlater_LBC, tap_C)
            dtaps_KC[-1 - back] = (dlater_LBC * x_LBC[:-back]).sum((0, 1))
        return dx_LBC, dtaps_KC.t(), dsum_LBC.sum((0, 1)), None


def _earlier(taps_KC: Tensor, num_tokens: int) -> Iterator[tuple[int, Tensor]]:
    """(tokens back, tap) of every tap but the last that reaches a token at all."""
    for back in range(1, min(len(taps_KC), num_tokens)):
        yield back, taps_KC[-1 - back]


def _inside(values_LBC: Tensor, sequence_LB: Tensor | None, back: int) -> Tensor:
    """Values of token pairs `back` apart, zero where the two are of different sequences."""
    if sequence_LB is None:
        return values_LBC
    return values_LBC.masked_fill((sequence_LB[back:] != sequence_LB[:-back]).unsqueeze(-1), 0.0)


def causal_conv(x_LBC: Tensor, weight_CK: Tensor, bias_C: Tensor, sequence_LB: Tensor | None = None) -> Tensor:
    """silu of a depthwise causal convolution along L, tokens before the first taken as zero. Returns (L, B, C).

    As K shifted multiply-adds: torch's grouped conv1d takes seven times as long on a CPU, and L first makes each shift
    one contiguous block. A bfloat16 input is summed in float32 and rounded once.
    """
    wide = torch.promote_types(x_LBC.dtype, torch.float32)
    return _CausalConv.apply(x_LBC.to(wide), weight_CK.to(wide), bias_C.to(wide), sequence_LB).to(x_LBC.dtype)


class _WithinChunks(torch.autograd.Function):
    """y_i = sum_{j<=i} (C_i B_j) exp(s_i - s_j) u_j, where s is the running sum of dt A and u = dt x.

    Shapes (..., Q, 1) s, (..., Q, P) u, (..., Q, N) B and C; B and C have 1 where s and u have the heads of a group. s
    stands only in exponents, so its gradient needs no further Q x Q product: ds_i = dy_i y_i - du_i u_i. Pairs (i, j)
    that are `apart` (..., Q, Q) are left out of the sum.
    """

    @staticmethod
    def forward(ctx, s, u, B, C, apart):
        # Above the diagonal the exponent is positive and may overflow; tril_ writes zeros there, whatever stands.
        decay = (s - s.transpose(-1, -2)).exp_().tril_()
        if apart is not None:
            decay.masked_fill_(apart, 0.0)
        mixing = decay * (C @ B.transpose(-1, -2))
        y = mixing @ u
        ctx.save_for_backward(u, B, C, decay, mixing, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        u, B, C, decay, mixing, y = ctx.saved_tensors
        du = mixing.transpose(-1, -2) @ dy
        dscores = (dy @ u.transpose(-1, -2)).mul_(decay).sum(3, keepdim=True)
        ds = (dy * y).sum(-1, keepdim=True) - (du * u).sum(-1, keepdim=True)
        return ds, du, dscores.transpose(-1, -2) @ C, dscores @ B, None


class _Resets(NamedTuple):
    """Where the state is not handed on, by chunk: each (chunk, B, 1, 1, ...) and true where a reset lies between."""

    apart: Tensor  # (..., Q, Q) one token and another
    before_end: Tensor  # (..., Q, 1) a token and the chunk's last
    since_start: Tensor  # (..., Q, 1) the last token of the chunk before and a token
    through: Tensor  # (..., 1, 1) the last token of the chunk before and the chunk's last


def _resets(sequence_LB: Tensor, num_chunks: int, Q: int) -> _Resets:
    tail = num_chunks * Q - len(sequence_LB)
    sequence_LB = torch.cat([sequence_LB, sequence_LB[-1:].expand(tail, -1)])  # the state runs on through the padding
    ids = sequence_LB.view(num_chunks, Q, -1).transpose(1, 2)[:, :, None, None, :, None]
    end = ids[..., -1:, :]
    before = torch.cat([ids[:1, ..., :1, :], end[:-1]])
    return _Resets(ids != ids.transpose(-1, -2), ids != end, ids != before, end != before)


def chunked_scan(
    x_LBHP: Tensor,
    dt_LBH: Tensor,
    A_H: Tensor,
    B_LBGN: Tensor,
    C_LBGN: Tensor,
    D_H: Tensor,
    chunk_size: int,
    initial_BHPN: Tensor | None = None,
    sequence_LB: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence above over L tokens. Returns y (L, B, H, P) and the state after the last token (B, H, P, N).

    An initial state is the first sequence's, the state returned the last one's. Everything is summed in the dtype of
    the step, float32 or wider; y is rounded to that of x, the state is not.
    `dt_LBH` is the step itself (see `step_size`); a token with step 0 leaves the state as it was, which is how padding
    is skipped. Chunks are made equal and at most `chunk_size` long: 56 tokens in chunks of 32 are 2 x 28, not 2 x 32
    with padding.
    """
    L, batch, H, P = x_LBHP.shape
    G, N = B_LBGN.shape[2:]
    num_chunks = -(-L // chunk_size)
    Q = -(-L // num_chunks)

    def fold(t: Tensor, heads: int) -> Tensor:  # (L, B, G heads, last) -> (chunk, B, G, heads, Q, last)
        tail = num_chunks * Q - L
        t = F.pad(t, (0, 0, 0, 0, 0, 0, 0, tail)) if tail else t
        return t.reshape(num_chunks, Q, batch, G, heads, -1).permute(0, 2, 3, 4, 1, 5).contiguous()

    u = fold(x_LBHP * dt_LBH.unsqueeze(-1), H // G)
    s = fold((dt_LBH * A_H).unsqueeze(-1), H // G).cumsum(-2)
    B, C = fold(B_LBGN.to(u.dtype), 1), fold(C_LBGN.to(u.dtype), 1)
    resets = None if sequence_LB is None else _resets(sequence_LB, num_chunks, Q)
    y = _WithinChunks.apply(s, u, B, C, resets and resets.apart)
    end = s[..., -1:, :]
    to_end, kept = (end - s).exp(), end.exp()
    if resets:
        to_end, kept = to_end.masked_fill(resets.before_end, 0.0), kept.masked_fill(resets.through, 0.0)
    added = (u * to_end).transpose(-1, -2) @ B
    state = torch.zeros_like(added[0]) if initial_BHPN is None else initial_BHPN.view_as(added[0])
    before = []
    for n in range(num_chunks):
        before.append(state)
        state = added[n] + state * kept[n]
    if num_chunks > 1 or initial_BHPN is not None:
        since = s.exp() if resets is None else s.exp().masked_fill(resets.since_start, 0.0)
        y = y + (C @ torch.stack(before).transpose(-1, -2)) * since
    y_LBHP = y.permute(0, 4, 1, 2, 3, 5).reshape(num_chunks * Q, batch, H, P)[:L]
    return (y_LBHP + x_LBHP * D_H.unsqueeze(-1)).to(x_LBHP.dtype), state.reshape(batch, H, P, N)


def conv_step(x_BC: Tensor, state_KBC: Tensor, weight_CK: Tensor, bias_C: Tensor) -> tuple[Tensor, Tensor]:
    """`causal_conv` for one token. `state_KBC` holds the K-1 inputs before it; returns (B, C) and the next state."""
    window = torch.cat([state_KBC, x_BC.unsqueeze(0)])
    wide = torch.promote_types(x_BC.dtype, torch.float32)
    taps_KC, inputs = weight_CK.t().to(wide), window.to(wide)
    out_BC = torch.addcmul(bias_C.to(wide), inputs[0], taps_KC[0])
    for k in range(1, len(window)):
        out_BC = torch.addcmul(out_BC, inputs[k], taps_KC[k])
    return F.silu(out_BC).to(x_BC.dtype), window[1:]


def scan_step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, D_H: Tensor, state_BHPN: Tensor
) -> Tensor:
    """The recurrence for one token. Returns y (B, H, P) and advances `state_BHPN` in place."""
    u_BHP = x_BHP * dt_BH.unsqueeze(-1)
    state_BHPN.mul_((dt_BH * A_H).exp()[..., None, None])
    by_group = state_BHPN.unflatten(1, (B_BGN.shape[1], -1))
    B_BGN, C_BGN = B_BGN.to(u_BHP.dtype), C_BGN.to(u_BHP.dtype)
    by_group.addcmul_(u_BHP.view(by_group.shape[:-1]).unsqueeze(-1), B_BGN[:, :, None, None])
    y = by_group.flatten(2, 3) @ C_BGN.unsqueeze(-1)
    return torch.addcmul(y.view_as(x_BHP), x_BHP.to(y.dtype), D_H.unsqueeze(-1)).to(x_BHP.dtype)


def group_rms_norm(x: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """RMS norm over blocks of `group_size` channels of the last axis, in float32, then the weight."""
    grouped = x.float().unflatten(-1, (-1, group_size))
    scale = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    return (grouped * scale).flatten(-2).to(x.dtype) * weight
