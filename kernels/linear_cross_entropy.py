"""The output head and the loss together in Triton: the passes over logits between the products of `chunked_loss`.

    maximum, sum of exp(logit - maximum), target's logit        one pass, a program a row
    softmax - [v = target]                                      one pass, in place of the logits

Letters: C tokens of a chunk, V vocabulary (of this rank), T tokens, H model width.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from megatron_evolve.kernels.chunked_loss import Form, chunked_loss
from megatron_evolve.kernels.precision import check, narrow

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


def _row_statistics(logits_CV: Tensor, target_C: Tensor, first_entry: int) -> tuple[Tensor, Tensor, Tensor]:
    C, V = logits_CV.shape
    max_C, sum_C, chosen_C = torch.empty(3, C, dtype=torch.float32, device=logits_CV.device)
    _statistics[(C,)](logits_CV, target_C, max_C, sum_C, chosen_C, V, first_entry, BV=BLOCK, num_warps=8)
    return max_C, sum_C, chosen_C


def _in_place(logits_CV: Tensor, target_C: Tensor, max_C: Tensor, sum_C: Tensor, first_entry: int) -> Tensor:
    C, V = logits_CV.shape
    grid = (C, triton.cdiv(V, BLOCK))
    _gradient[grid](logits_CV, target_C, max_C, sum_C, V, first_entry, BV=BLOCK, num_warps=8)
    return logits_CV


FORM = Form("triton", _row_statistics, _in_place)


def linear_cross_entropy(
    x_TH: Tensor, W_VH: Tensor, target_T: Tensor, *, first_entry: int = 0, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Each token's loss (T,) in float32. Every target must be an entry of the vocabulary: weigh a loss to mask it.

    With `group`, W holds the entries from `first_entry` on, the same x is on every rank, and so is its gradient.
    """
    check(x_TH, "x")
    return chunked_loss(x_TH, W_VH, target_T, first_entry, group, FORM)
