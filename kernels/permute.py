"""Token order to expert order and back, by the compact plan: a gather of rows, and a sum over each token's K rows.

    rows[m] = x[token(m)], p_rows[m] = p[choice(m)]            y[t] = sum_k rows[row(t, k)],  k = 0 ... K-1 in float32

Each is the other's gradient. The sum runs in the order of k in one program: no scatter, no atomics, the same bits every
time. Both move their bytes once: 37,632 a token for Nemotron-3-Nano (K = 6 rows of 5,376 B and the token itself).

Letters as in `reference`: T tokens, K chosen, M rows sorted by expert, H model width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_evolve.kernels.precision import check, narrow
from megatron_evolve.kernels.reference import RoutePlan
from megatron_evolve.kernels.shapes import check_shapes

# Of a program, by what an H100 did with 617 MB at Nano's width of 21 x 128: the gather 2,640 GB/s (2,210 at 4 x 512),
# the sum 2,850 (2,720 at 4 x 512); a plain copy 2,970.
GATHERED = (16, 128)  # rows, columns
COMBINED = (1, 1024)


@triton.jit
def _gather(x, choice_of_row_M, out_MH, M, H, num_chosen, BM: tl.constexpr, BH: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    i = tl.program_id(1) * BH + tl.arange(0, BH)
    live = (m < M)[:, None] & (i < H)[None, :]
    token = tl.load(choice_of_row_M + m, mask=m < M, other=0) // num_chosen
    block = tl.load(x + token.to(tl.int64)[:, None] * H + i[None, :], mask=live, other=0.0)
    tl.store(out_MH + m.to(tl.int64)[:, None] * H + i[None, :], block, mask=live)


@triton.jit
def _combine(y_MH, row_of_choice_TK, out_TH, T, H, num_chosen, BT: tl.constexpr, BH: tl.constexpr):
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    i = tl.program_id(1) * BH + tl.arange(0, BH)
    live = (t < T)[:, None] & (i < H)[None, :]
    acc = tl.zeros([BT, BH], tl.float32)
    for k in range(num_chosen):
        m = tl.load(row_of_choice_TK + t * num_chosen + k, mask=t < T, other=0)
        acc += tl.load(y_MH + m.to(tl.int64)[:, None] * H + i[None, :], mask=live, other=0.0).to(tl.float32)
    tl.store(out_TH + t.to(tl.int64)[:, None] * H + i[None, :], narrow(acc, out_TH.dtype.element_ty), mask=live)


def gather(x_TH: Tensor, plan: RoutePlan) -> Tensor:
    """Rows (M, H) in the order of the plan; no gradient."""
    check(x_TH, "x")
    x_TH = x_TH.contiguous()
    (T, K), H = plan.row_of_choice_TK.shape, x_TH.size(1)
    out_MH = x_TH.new_empty(T * K, H)
    if out_MH.numel():
        rows, columns = GATHERED
        grid = (triton.cdiv(T * K, rows), triton.cdiv(H, columns))
        _gather[grid](x_TH, plan.choice_of_row_M, out_MH, T * K, H, K, BM=rows, BH=columns)
    return out_MH


def combine(y_MH: Tensor, plan: RoutePlan) -> Tensor:
    """Each token's K rows summed (T, H), choice 0 first, in float32 and rounded once; no gradient."""
    check(y_MH, "y")
    y_MH = y_MH.contiguous()
    (T, K), H = plan.row_of_choice_TK.shape, y_MH.size(1)
    out_TH = y_MH.new_empty(T, H)
    if out_TH.numel():
        tokens, columns = COMBINED
        grid = (triton.cdiv(T, tokens), triton.cdiv(H, columns))
        _combine[grid](y_MH, plan.row_of_choice_TK, out_TH, T, H, K, BT=tokens, BH=columns)
    return out_TH


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, p_TK, plan):
        ctx.plan = plan
        return gather(x_TH, plan), p_TK.flatten().index_select(0, plan.choice_of_row_M)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_MH, dp_M):
        dx_TH = combine(dx_MH, ctx.plan) if ctx.needs_input_grad[0] else None
        return dx_TH, dp_M[ctx.plan.row_of_choice_TK] if ctx.needs_input_grad[1] else None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_MH, plan):
        ctx.plan = plan
        return combine(y_MH, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TH):
        return gather(dy_TH, ctx.plan), None


def permute(x_TH: Tensor, p_TK: Tensor, plan: RoutePlan) -> tuple[Tensor, Tensor]:
    """Rows (M, H) and their probabilities (M,), sorted by expert."""
    choices = plan.row_of_choice_TK.shape
    check_shapes("the plan", choices, x=(x_TH, (choices[0], x_TH.size(-1))), p=(p_TK, choices))
    return _Permute.apply(x_TH, p_TK, plan)


def unpermute(y_MH: Tensor, plan: RoutePlan) -> Tensor:
    """Sum each token's K rows back to (T, H)."""
    choices = plan.row_of_choice_TK.shape
    check_shapes("the plan", choices, y=(y_MH, (choices.numel(), y_MH.size(-1))))
    return _Unpermute.apply(y_MH, plan)
