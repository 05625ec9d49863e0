"""The expert path in plain PyTorch made fast: the form a CPU runs, functions and arguments as in `reference`.

Three things make it faster than autograd over the definition. A grouped matrix multiplies slices of the sorted
rows straight into one output, with no gathered weights and no concatenation. The squared ReLU keeps only r = relu(h)
and takes both its gradients from the one product r * da:

    dh = 2 p r da        dp = sum_f r (r da)

With a clamp s, g = s tanh(r / s) takes the place of r, and dh is also multiplied by dg/dr = 1 / cosh(r / s)^2, which
keeps its digits where tanh is near 1.

A sum over each token's rows is an embedding bag, which reads every row once. Frozen matrices get no gradient
product. Everything is a fixed sequence of products and sums: the same input and thread count give the same bits.

Letters as in `reference`: T tokens, E experts, K chosen, M rows sorted by expert, H model width, F hidden width,
R adapter rank, I and O the input and output width of one grouped matrix.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_evolve.kernels.chunked_loss import Form, chunked_loss

# The definition's own router and plan serve here: sorting (T, E) scores takes 0.1 of 6 ms at E = 4, 3.5 of 77 ms at
# E = 64 (forward and backward, one core), and torch.topk, two to three times faster, promises no order among equals.
from megatron_evolve.kernels.reference import (
    GroupedLora,
    RoutePlan,
    check_clamp,
    experts_of_chunks,
    route_plan,
    router,
)

__all__ = [
    "GroupedLora",
    "RoutePlan",
    "experts_of_chunks",
    "grouped_experts",
    "grouped_linear",
    "linear_cross_entropy",
    "permute",
    "route_plan",
    "router",
    "unpermute",
    "weighted_squared_relu",
]


class _Permute(torch.autograd.Function):
    """Gather rows; backward sums each token's K rows in a fixed order instead of scattering."""

    @staticmethod
    def forward(ctx, x_TH, p_TK, choice_of_row_M, row_of_choice_TK):
        ctx.save_for_backward(row_of_choice_TK)
        token_of_row_M = choice_of_row_M // row_of_choice_TK.size(1)
        return x_TH.index_select(0, token_of_row_M), p_TK.flatten().index_select(0, choice_of_row_M)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_MH, dp_M):
        (row_of_choice_TK,) = ctx.saved_tensors
        return F.embedding_bag(row_of_choice_TK, dx_MH, mode="sum"), dp_M[row_of_choice_TK], None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_MH, choice_of_row_M, row_of_choice_TK):
        ctx.save_for_backward(choice_of_row_M)
        ctx.num_chosen = row_of_choice_TK.size(1)
        return F.embedding_bag(row_of_choice_TK, y_MH, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TH):
        (choice_of_row_M,) = ctx.saved_tensors
        return dy_TH.index_select(0, choice_of_row_M // ctx.num_chosen), None, None


class _WeightedSquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_MF, p_M, clamp):
        r_MF = torch.relu(h_MF)
        ctx.save_for_backward(r_MF, p_M)
        ctx.clamp = clamp
        g_MF = r_MF.to(torch.promote_types(h_MF.dtype, p_M.dtype))
        if clamp is not None:
            g_MF = (g_MF / clamp).tanh_().mul_(clamp)
        return g_MF.square().mul_(p_M.unsqueeze(-1)).to(h_MF.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, da_MF):
        r_MF, p_M = ctx.saved_tensors
        r_MF = r_MF.to(torch.promote_types(r_MF.dtype, p_M.dtype))
        g_MF = r_MF if ctx.clamp is None else (r_MF / ctx.clamp).tanh_().mul_(ctx.clamp)
        gda_MF = g_MF * da_MF
        dp_M = torch.einsum("mf,mf->m", gda_MF, g_MF).to(p_M.dtype) if ctx.needs_input_grad[1] else None
        if ctx.clamp is not None:
            gda_MF.div_((r_MF / ctx.clamp).cosh_().square_())
        return gda_MF.mul_((2 * p_M).unsqueeze(-1)).to(da_MF.dtype), dp_M, None


class _GroupedLinear(torch.autograd.Function):
    """y_e = x_e W_e^T + scale (x_e A_e^T) B_e^T for each expert's slice of rows; saves x and u = x A^T."""

    @staticmethod
    def forward(ctx, x_MI, sizes, scale, A_ERI, B_EOR, *W_OI):
        ctx.sizes, ctx.scale = sizes, scale
        y_MO = x_MI.new_empty(x_MI.size(0), W_OI[0].size(0))
        x, y = x_MI.split(sizes), y_MO.split(sizes)
        for e, W in enumerate(W_OI):
            torch.mm(x[e], W.t(), out=y[e])
        u_MR = None
        if A_ERI is not None:
            u_MR = x_MI.new_empty(x_MI.size(0), A_ERI.size(1))
            for e, u in enumerate(u_MR.split(sizes)):
                torch.mm(x[e], A_ERI[e].t(), out=u)
                y[e].addmm_(u, B_EOR[e].t(), alpha=scale)
        ctx.save_for_backward(x_MI, u_MR, A_ERI, B_EOR, *W_OI)
        return y_MO

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_MO):
        x_MI, u_MR, A_ERI, B_EOR, *W_OI = ctx.saved_tensors
        need_x, _, _, need_A, need_B, *need_W = ctx.needs_input_grad
        x, dy = x_MI.split(ctx.sizes), dy_MO.split(ctx.sizes)
        dx_MI = torch.empty_like(x_MI, memory_format=torch.contiguous_format) if need_x else None
        dx = dx_MI.split(ctx.sizes) if need_x else None
        if need_x:
            for e, W in enumerate(W_OI):
                torch.mm(dy[e], W, out=dx[e])
        # an expert without rows gets a zero gradient, not None: data parallelism waits for every parameter
        dW_OI = [dy[e].t() @ x[e] if need else None for e, need in enumerate(need_W)]
        dA_ERI = torch.empty_like(A_ERI) if need_A else None
        dB_EOR = torch.empty_like(B_EOR) if need_B else None
        if A_ERI is not None:
            for e, u in enumerate(u_MR.split(ctx.sizes)):
                du = (dy[e] @ B_EOR[e]).mul_(ctx.scale)
                if need_A:
                    torch.mm(du.t(), x[e], out=dA_ERI[e])
                if need_B:
                    torch.mm(dy[e].t(), u, out=dB_EOR[e]).mul_(ctx.scale)
                if need_x:
                    dx[e].addmm_(du, A_ERI[e])
        return dx_MI, None, None, dA_ERI, dB_EOR, *dW_OI


def permute(x_TH: Tensor, p_TK: Tensor, plan: RoutePlan) -> tuple[Tensor, Tensor]:
    """Rows (M, H) and their probabilities (M,), sorted by expert."""
    return _Permute.apply(x_TH, p_TK, plan.choice_of_row_M, plan.row_of_choice_TK)


def unpermute(y_MH: Tensor, plan: RoutePlan) -> Tensor:
    """Sum each token's K rows back to (T, H), choice 0 first."""
    return _Unpermute.apply(y_MH, plan.choice_of_row_M, plan.row_of_choice_TK)


def weighted_squared_relu(h_MF: Tensor, p_M: Tensor, clamp: float | None = None) -> Tensor:
    """a = p * relu(h)^2, in the wider dtype of the two and rounded to that of h; `clamp` as in the definition."""
    check_clamp(clamp)
    return _WeightedSquaredRelu.apply(h_MF, p_M, clamp)


def grouped_linear(
    x_MI: Tensor,
    counts_E: Tensor | list[int],
    W_EOI: Tensor | Sequence[Tensor],
    lora: GroupedLora | None = None,
) -> Tensor:
    """Each row times its expert's matrix: (M, O). Rows stand sorted by expert; W is stacked or E matrices.

    Raises ValueError when the counts do not name the E experts or do not sum to the M rows.
    """
    sizes = counts_E.tolist() if isinstance(counts_E, Tensor) else counts_E
    W_OI = W_EOI.unbind() if isinstance(W_EOI, Tensor) else tuple(W_EOI)
    if len(sizes) != len(W_OI) or sum(sizes) != x_MI.size(0):
        raise ValueError(
            f"counts must give the rows of {len(W_OI)} experts and sum to {x_MI.size(0)}; got {len(sizes)} counts that "
            f"sum to {sum(sizes)}: pass rows sorted by expert with the counts they were sorted by"
        )
    A_ERI, B_EOR, scale = lora if lora is not None else (None, None, 1.0)
    return _GroupedLinear.apply(x_MI, sizes, scale, A_ERI, B_EOR, *W_OI)


def grouped_experts(
    x_MH: Tensor,
    counts_E: Tensor | list[int],
    p_M: Tensor,
    W1_EFH: Tensor | Sequence[Tensor],
    W2_EHF: Tensor | Sequence[Tensor],
    lora1: GroupedLora | None = None,
    lora2: GroupedLora | None = None,
    *,
    clamp: float | None = None,
) -> Tensor:
    """fc1, weighted squared ReLU, fc2 on rows sorted by expert: (M, H), each row weighted by its probability."""
    sizes = counts_E.tolist() if isinstance(counts_E, Tensor) else counts_E
    a_MF = weighted_squared_relu(grouped_linear(x_MH, sizes, W1_EFH, lora1), p_M, clamp)
    return grouped_linear(a_MF, sizes, W2_EHF, lora2)


def _row_statistics(logits_CV: Tensor, target_C: Tensor, first_entry: int) -> tuple[Tensor, Tensor, Tensor]:
    wide_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    max_C = wide_CV.amax(-1)
    target_C = target_C - first_entry
    mine_C = (target_C >= 0) & (target_C < logits_CV.size(1))
    chosen_C = wide_CV.gather(1, target_C.where(mine_C, 0).unsqueeze(1)).squeeze(1).where(mine_C, 0.0)
    return max_C, (wide_CV - max_C.unsqueeze(1)).exp_().sum(-1), chosen_C


def _share(logits_CV: Tensor, target_C: Tensor, max_C: Tensor, sum_C: Tensor, first_entry: int) -> Tensor:
    """In place where the logits are float32 or wider."""
    share_CV = logits_CV.to(max_C.dtype).sub_(max_C.unsqueeze(1)).exp_().div_(sum_C.unsqueeze(1))
    target_C = target_C - first_entry
    mine_C = (target_C >= 0) & (target_C < logits_CV.size(1))
    share_CV[torch.arange(len(target_C), device=target_C.device), target_C.where(mine_C, 0)] -= mine_C.to(max_C.dtype)
    return share_CV.to(logits_CV.dtype)


def linear_cross_entropy(
    x_TH: Tensor, W_VH: Tensor, target_T: Tensor, *, first_entry: int = 0, group: dist.ProcessGroup | None = None
) -> Tensor:
    """-log softmax(W x)[target] of each token (T,), at least in float32, by chunks (`chunked_loss`).

    With `group`, W holds the entries from `first_entry` on, the same x is on every rank, and so is its gradient.
    """
    return chunked_loss(x_TH, W_VH, target_T, first_entry, group, Form("eager", _row_statistics, _share))
