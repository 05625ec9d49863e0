"""The frozen head and the loss together, without ever holding all logits.

    loss[t] = log sum_v exp(W_v x_t) - W_target x_t             dx[t] = dloss[t] sum_v (softmax_v - [v = target]) W_v

8,192 tokens of 131,072 logits are 2 GiB in bfloat16, and the unfused loss makes 4 GiB more in float32. Tokens go
through in chunks of 256 MiB of logits instead: a product, one pass for each row's maximum and sum, one that turns the
logits into their own gradient in place, and a second product for dx. Since loss[t] depends on x_t alone, dx is ready
in the forward pass up to its factor dloss[t]. The two products are dense and large, so the vendor's library does them.

The head may be cut over the ranks of `group` by vocabulary: maxima, sums and target logits are then reduced over it,
T numbers each, and dx once. A frozen head gets no gradient: with adapters that is a third of the products less.

Letters: T tokens, C tokens of a chunk, V vocabulary (of this rank), H model width.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_evolve.kernels.precision import check, narrow

CHUNK_BYTES = 2**28
BLOCK = 4096  # logits at a time: 16 a thread in 8 warps


@triton.jit
def _statistics(logits_CV, target_C, max_C, sum_C, chosen_C, V, first_entry, BV: tl.constexpr):
    """One row: its maximum, the sum of exp(logit - maximum), and the target's logit, or 0 where another rank has it."""
    row, v = tl.program_id(0), tl.arange(0, BV)
    logits = logits_CV + row.to(tl.int64) * V
    # each lane keeps its own maximum; it starts at the lowest finite number, since inf - inf would be no number
    highest, total = tl.full([BV], -3.4e38, tl.float32), tl.zeros([BV], tl.float32)
    for first in range(0, V, BV):
        block = tl.load(logits + first + v, mask=v < V - first, other=float("-inf")).to(tl.float32)
        higher = tl.where(block > highest, block, highest)
        total = total * tl.exp(highest - higher) + tl.exp(block - higher)
        highest = higher
    top = tl.max(highest, 0)
    tl.store(max_C + row, top)
    tl.store(sum_C + row, tl.sum(total * tl.exp(highest - top), 0))
    target = tl.load(target_C + row).to(tl.int32) - first_entry
    mine = (target >= 0) & (target < V)
    tl.store(chosen_C + row, tl.load(logits + tl.where(mine, target, 0), mask=mine, other=0.0).to(tl.float32))


@triton.jit
def _gradient(logits_CV, target_C, max_C, sum_C, V, first_entry, BV: tl.constexpr):
    """The logits of one block become softmax - [v = target], in place."""
    row, v = tl.program_id(0), tl.program_id(1) * BV + tl.arange(0, BV)
    at = logits_CV + row.to(tl.int64) * V + v
    logit = tl.load(at, mask=v < V, other=float("-inf")).to(tl.float32)
    share = tl.exp(logit - tl.load(max_C + row)) / tl.load(sum_C + row)
    share -= (v == tl.load(target_C + row).to(tl.int32) - first_entry).to(tl.float32)
    tl.store(at, narrow(share, logits_CV.dtype.element_ty), mask=v < V)


def _chunk(x_CH: Tensor, W_VH: Tensor, target_C: Tensor, first_entry: int, group, want_dx: bool):
    """Loss of a chunk of tokens, and this rank's part of its dx for dloss = 1."""
    logits_CV = x_CH @ W_VH.t()
    C, V = logits_CV.shape
    max_C, sum_C, chosen_C = torch.empty(3, C, dtype=torch.float32, device=x_CH.device)
    _statistics[(C,)](logits_CV, target_C, max_C, sum_C, chosen_C, V, first_entry, BV=BLOCK, num_warps=8)
    if group is not None:
        own_C = max_C.clone()
        dist.all_reduce(max_C, dist.ReduceOp.MAX, group)
        sum_C.mul_(torch.exp(own_C - max_C))
        dist.all_reduce(sum_C, group=group)
        dist.all_reduce(chosen_C, group=group)
    dx_CH = None
    if want_dx:
        grid = (C, triton.cdiv(V, BLOCK))
        _gradient[grid](logits_CV, target_C, max_C, sum_C, V, first_entry, BV=BLOCK, num_warps=8)
        dx_CH = logits_CV @ W_VH
    # in this order: beside a maximum of 1e4 the logarithm would lose all but three digits
    return (max_C - chosen_C) + torch.log(sum_C), dx_CH


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, W_VH, target_T, first_entry, group):
        rows = max(1, CHUNK_BYTES // (len(W_VH) * x_TH.element_size()))
        want_dx = ctx.needs_input_grad[0]
        loss_T = torch.empty(len(x_TH), dtype=torch.float32, device=x_TH.device)
        dx_TH = torch.empty_like(x_TH) if want_dx else None
        for start in range(0, len(x_TH), rows):
            here = slice(start, start + rows)
            loss_T[here], dx_CH = _chunk(x_TH[here], W_VH, target_T[here], first_entry, group, want_dx)
            if want_dx:
                dx_TH[here] = dx_CH
        if want_dx and group is not None:
            dist.all_reduce(dx_TH, group=group)
        ctx.save_for_backward(dx_TH)
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss_T):
        (dx_TH,) = ctx.saved_tensors
        return (dx_TH * dloss_T.unsqueeze(-1)).to(dx_TH.dtype), None, None, None, None


def linear_cross_entropy(
    x_TH: Tensor, W_VH: Tensor, target_T: Tensor, *, first_entry: int = 0, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Each token's loss (T,) in float32. Every target must be an entry of the vocabulary: weigh a loss to mask it.

    With `group`, W holds the entries from `first_entry` on, the same x is on every rank, and so is its gradient.
    Raises ValueError for a head that wants a gradient.
    """
    check(x_TH, "x")
    if W_VH.requires_grad:
        raise ValueError(
            "the head of linear_cross_entropy must be frozen; got a W that wants a gradient: train it through logits, "
            "or detach it"
        )
    return _LinearCrossEntropy.apply(x_TH.contiguous(), W_VH, target_T.contiguous(), first_entry, group)
