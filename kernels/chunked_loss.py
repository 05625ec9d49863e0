"""The frozen head and the loss together, without ever holding all logits: what the forms of it share.

    loss[t] = log sum_v exp(W_v x_t) - W_target x_t             dx[t] = dloss[t] sum_v (softmax_v - [v = target]) W_v

8,192 tokens of 131,072 logits are 2 GiB in bfloat16, and the unfused loss makes 4 GiB more in float32. Tokens go
through in chunks of 256 MiB of logits (64 in PyTorch) instead: a product, each row's maximum and sum, the logits turned
into their own gradient, and a second product for dx. Since loss[t] depends on x_t alone, dx is ready in the forward
pass up to its factor dloss[t]. The two products are dense and large, so the vendor's library does them; what lies
between is a `Form`.

The head may be cut over the ranks of `group` by vocabulary: maxima, sums and target logits are then reduced over it,
T numbers each, and dx once. A frozen head gets no gradient: with adapters that is a third of the products less.

Letters: T tokens, C tokens of a chunk, V vocabulary (of this rank), H model width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_evolve.kernels.backend import LOSS_CHUNK_BYTES


class Form(NamedTuple):
    """The two passes over a chunk's logits. Targets count from the whole vocabulary's first entry."""

    name: str  # of `LOSS_CHUNK_BYTES`
    # logits (C, V), target (C,), first entry: each row's maximum, its sum of exp(logit - maximum), and its target's
    # logit or 0 where another rank has it; (C,) each, float32 or wider
    statistics: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    # logits, target, maximum, sum, first entry: softmax - [v = target], which may take the place of the logits
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def _chunk(x_CH: Tensor, W_VH: Tensor, target_C: Tensor, first_entry: int, group, want_dx: bool, form: Form):
    """Loss of a chunk of tokens, and this rank's part of its dx for dloss = 1."""
    logits_CV = x_CH @ W_VH.t()
    max_C, sum_C, chosen_C = form.statistics(logits_CV, target_C, first_entry)
    if group is not None:
        own_C = max_C.clone()
        dist.all_reduce(max_C, dist.ReduceOp.MAX, group)
        sum_C.mul_(torch.exp(own_C - max_C))
        dist.all_reduce(sum_C, group=group)
        dist.all_reduce(chosen_C, group=group)
    dx_CH = None
    if want_dx:
        dx_CH = form.gradient(logits_CV, target_C, max_C, sum_C, first_entry) @ W_VH
    # in this order: beside a maximum of 1e4 the logarithm would lose all but three digits
    return (max_C - chosen_C) + torch.log(sum_C), dx_CH


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, W_VH, target_T, first_entry, group, form):
        rows = max(1, LOSS_CHUNK_BYTES[form.name] // (len(W_VH) * x_TH.element_size()))
        want_dx = ctx.needs_input_grad[0]
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        loss_T = torch.empty(len(x_TH), dtype=wide, device=x_TH.device)
        dx_TH = torch.empty_like(x_TH) if want_dx else None
        for start in range(0, len(x_TH), rows):
            here = slice(start, start + rows)
            loss_T[here], dx_CH = _chunk(x_TH[here], W_VH, target_T[here], first_entry, group, want_dx, form)
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
        return (dx_TH * dloss_T.unsqueeze(-1)).to(dx_TH.dtype), None, None, None, None, None


def chunked_loss(
    x_TH: Tensor, W_VH: Tensor, target_T: Tensor, first_entry: int, group: dist.ProcessGroup | None, form: Form
) -> Tensor:
    """Each token's loss (T,), float32 or wider, by this form. Raises ValueError for a head that wants a gradient."""
    if W_VH.requires_grad:
        raise ValueError(
            "the head of linear_cross_entropy must be frozen; got a W that wants a gradient: train it through logits, "
            "or detach it"
        )
    return _ChunkedLoss.apply(x_TH.contiguous(), W_VH, target_T.contiguous(), first_entry, group, form)
