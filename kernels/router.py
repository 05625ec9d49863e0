"""Which K experts a token goes to and how much each counts: product, sigmoid, bias, top-k and share in one kernel.

    l = x Wr^T      s = sigmoid(l)      C = the K largest of s + b      p_k = scale s_k / (sum_{j in C} s_j + 1e-20)
    dl_k = ds_k s_k (1 - s_k),          ds_k = scale / S (dp_k - sum_j dp_j s_j / S),      S = that sum

Megatron-Core takes about ten launches and a dense (T, E) tensor of probabilities for it. The bias selects and gets no
gradient; the share is of the unbiased score, which is carried along and never recovered as (s + b) - b: at bias 12 and
logit -16 that difference is exactly 0 in float32. Among equal s + b the lowest expert wins. A NaN score ranks first, as
in torch.sort, and its token's shares become NaN. A single choice (K = 1) keeps its score unnormalised, as in
Megatron-Core's topk_routing_with_score_function.

Letters as in `reference`: T tokens, E experts, K chosen, H model width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_evolve.kernels.precision import check, dot, narrow
from megatron_evolve.kernels.shapes import check_shapes

CELLS = 8192  # of a block of logits, tokens x experts: 32 numbers a thread in 8 warps; in 4 warps it spilled 160 bytes
DEPTH_CELLS = 16384  # of a block of the router's matrix, experts x depth: 96 KiB of shared memory in three stages


@triton.jit
def _logits(x_TH, W_EH, t, e, T, E, H, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr):
    k = tl.arange(0, BK)
    acc = tl.zeros([BT, BE], tl.float32)
    x_at = x_TH + t.to(tl.int64)[:, None] * H + k[None, :]
    w_at = W_EH + e[None, :] * H + k[:, None]
    for first in range(0, H, BK):
        live = k < H - first
        x = tl.load(x_at, mask=(t < T)[:, None] & live[None, :], other=0.0)
        w = tl.load(w_at, mask=live[:, None] & (e < E)[None, :], other=0.0)
        acc = dot(x, w, acc)
        x_at += BK
        w_at += BK
    return acc


@triton.jit
def _choose(
    x, W_EH, bias_E, idx_TK, p_TK, s_TK, scale, T, E, H,
    K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """x holds tokens (T, H), or, where W is None, their logits (T, E)."""
    t, e, kk = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BE), tl.arange(0, KP)
    if W_EH is None:
        at = x + t.to(tl.int64)[:, None] * E + e[None, :]
        logits = tl.load(at, mask=(t < T)[:, None] & (e < E)[None, :], other=0.0).to(tl.float32)
    else:
        logits = _logits(x, W_EH, t, e, T, E, H, BT, BE, BK)
    s = 1.0 / (1.0 + tl.exp(-logits))
    rank = s + tl.load(bias_E + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    rank = tl.where(rank == rank, rank, float("inf"))
    free = (e < E)[None, :] & (t < T)[:, None]
    idx, chosen = tl.zeros([BT, KP], tl.int32), tl.zeros([BT, KP], tl.float32)
    for k in range(K):
        best = tl.max(tl.where(free, rank, float("-inf")), 1)
        first = tl.min(tl.where(free & (rank == best[:, None]), e[None, :], BE), 1)
        taken = e[None, :] == first[:, None]
        free = free & (e[None, :] != first[:, None])
        s_T = tl.sum(tl.where(taken, s, 0.0), 1)
        idx = tl.where((kk == k)[None, :], first[:, None], idx)
        chosen = tl.where((kk == k)[None, :], s_T[:, None], chosen)
    p = chosen * scale
    if K > 1:
        p = chosen / (tl.sum(chosen, 1) + 1e-20)[:, None] * scale
    out, live = t[:, None] * K + kk[None, :], (t < T)[:, None] & (kk < K)[None, :]
    tl.store(idx_TK + out, idx, mask=live)
    tl.store(p_TK + out, p, mask=live)
    tl.store(s_TK + out, chosen, mask=live)


@triton.jit
def _gradient(
    dp_TK, s_TK, idx_TK, dl_TE, scale, T, E, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, KP: tl.constexpr
):
    t, e, kk = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BE), tl.arange(0, KP)
    at, live = t[:, None] * K + kk[None, :], (t < T)[:, None] & (kk < K)[None, :]
    s = tl.load(s_TK + at, mask=live, other=0.0)
    ds = tl.load(dp_TK + at, mask=live, other=0.0).to(tl.float32) * scale
    if K > 1:
        S = (tl.sum(s, 1) + 1e-20)[:, None]
        ds = (ds - tl.sum(ds * (s / S), 1)[:, None]) / S
    ds = ds * s * (1.0 - s)
    idx = tl.load(idx_TK + at, mask=live, other=-1)
    dl = tl.zeros([BT, BE], tl.float32)
    for k in range(K):
        here = (kk == k)[None, :]
        expert, value = tl.sum(tl.where(here, idx, 0), 1), tl.sum(tl.where(here, ds, 0.0), 1)
        dl = tl.where(e[None, :] == expert[:, None], value[:, None], dl)
    out = dl_TE + t.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(out, narrow(dl, dl_TE.dtype.element_ty), mask=(t < T)[:, None] & (e < E)[None, :])


def _blocks(num_experts: int, num_chosen: int) -> dict[str, int]:
    be = max(16, triton.next_power_of_2(num_experts))
    return {"BT": max(16, min(64, CELLS // be)), "BE": be, "KP": triton.next_power_of_2(num_chosen), "num_warps": 8}


def _depth(experts: int) -> int:
    """128 to 128 experts, 32 to 512: 0.074 instead of 0.088 ms for 16,384 tokens of Nano on an H100."""
    return max(32, min(128, DEPTH_CELLS // experts))


def _forward(x: Tensor, W_EH: Tensor | None, bias_E: Tensor, num_chosen: int, scale: float) -> tuple[Tensor, ...]:
    (T, H), E, bias_E = x.shape, len(bias_E), bias_E.contiguous()
    s_TK = torch.empty(T, num_chosen, dtype=torch.float32, device=x.device)
    p_TK, idx_TK = torch.empty_like(s_TK), torch.empty_like(s_TK, dtype=torch.int32)
    blocks = _blocks(E, num_chosen)
    if T:
        grid = (triton.cdiv(T, blocks["BT"]),)
        _choose[grid](
            x, W_EH, bias_E, idx_TK, p_TK, s_TK, scale, T, E, H, K=num_chosen, BK=_depth(blocks["BE"]), **blocks
        )
    return idx_TK, p_TK, s_TK


def _backward(dp_TK: Tensor, s_TK: Tensor, idx_TK: Tensor, num_experts: int, scale: float, dtype) -> Tensor:
    T, K = s_TK.shape
    dl_TE = torch.empty(T, num_experts, dtype=dtype, device=s_TK.device)
    blocks = _blocks(num_experts, K)
    if T:
        grid = (triton.cdiv(T, blocks["BT"]),)
        _gradient[grid](dp_TK.contiguous(), s_TK, idx_TK, dl_TE, scale, T, num_experts, K=K, **blocks)
    return dl_TE


class _Router(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_EH, bias_E, num_chosen, scale):
        idx_TK, p_TK, s_TK = _forward(x, W_EH, bias_E, num_chosen, scale)
        ctx.save_for_backward(x, W_EH, s_TK, idx_TK)
        ctx.scale, ctx.num_experts = scale, len(bias_E)
        ctx.mark_non_differentiable(idx_TK)
        return idx_TK, p_TK

    @staticmethod
    @once_differentiable
    def backward(ctx, _, dp_TK):
        x, W_EH, s_TK, idx_TK = ctx.saved_tensors
        dl_TE = _backward(dp_TK, s_TK, idx_TK, ctx.num_experts, ctx.scale, x.dtype)
        if W_EH is None:
            return dl_TE, None, None, None, None
        # two dense products, as large as the forward one: the vendor's library is good at those
        dx = dl_TE @ W_EH if ctx.needs_input_grad[0] else None
        return dx, dl_TE.t() @ x if ctx.needs_input_grad[1] else None, None, None, None


def _check_chosen(num_chosen: int, num_experts: int) -> None:
    if not 0 < num_chosen <= num_experts:
        raise ValueError(
            f"a token chooses between 1 and {num_experts} of {num_experts} experts; got {num_chosen}: change how many"
        )


def router(logits_TE: Tensor, bias_E: Tensor, num_chosen: int, scale: float) -> tuple[Tensor, Tensor]:
    """Chosen experts (T, K) int32, best first, and their float32 shares (T, K), from logits."""
    check(logits_TE, "logits")
    num_experts = logits_TE.size(-1)
    check_shapes("logits", logits_TE.shape, bias=(bias_E, (num_experts,)))
    _check_chosen(num_chosen, num_experts)
    return _Router.apply(logits_TE.contiguous(), None, bias_E.detach(), num_chosen, scale)


def router_from_tokens(
    x_TH: Tensor, W_EH: Tensor, bias_E: Tensor, num_chosen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The same from tokens: the logits are float32 sums of exact products and are never written."""
    check(x_TH, "x")
    num_experts, H = W_EH.shape
    check_shapes("W", (num_experts, H), x=(x_TH, (len(x_TH), H)), bias=(bias_E, (num_experts,)))
    _check_chosen(num_chosen, num_experts)
    if W_EH.dtype != x_TH.dtype:
        raise ValueError(f"tokens and router must share a dtype; got {x_TH.dtype} and {W_EH.dtype}: cast one of them")
    return _Router.apply(x_TH.contiguous(), W_EH.contiguous(), bias_E.detach(), num_chosen, scale)
