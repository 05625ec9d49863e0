"""The output head and the loss together, without ever holding all logits: what the forms of it share.

    loss[t] = log sum_v exp(W_v x_t) - W_target x_t             g[t, v] = softmax_v - [v = target]
    dx[t] = dloss[t] sum_v g[t, v] W_v                          dW_v = sum_t g[t, v] dloss[t] x_t

8,192 tokens of 131,072 logits are 2 GiB in bfloat16, and the unfused loss makes 4 GiB more in float32. Tokens go
through in chunks of 256 MiB of logits (64 in PyTorch) instead: a product, each row's maximum and sum, the logits turned
into g, and further products. The products are dense and large, so the vendor's library does them; what lies between is
a `Form`.

A frozen head gets no gradient, as with adapters: dx is then ready in the forward pass up to its factor dloss[t], and a
third of the products is saved. A trained one needs dloss before it can sum over tokens, so its backward pass makes each
chunk's logits again from the maxima and sums, and sums dW in float32: a product more, and no memory that grows with the
tokens.

The head may be cut over the ranks of `group` by vocabulary: maxima, sums and target logits are then reduced over it,
T numbers each, and dx once.

Letters: T tokens, C tokens of a chunk, V vocabulary (of this rank), H model width.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_evolve.kernels.backend import chunk_rows
from megatron_evolve.kernels.shapes import check_shapes


class Form(NamedTuple):
    """The two passes over a chunk's logits. Targets count from the whole vocabulary's first entry."""

    name: str  # of `LOSS_CHUNK_BYTES`
    # logits (C, V), target (C,), first entry: each row's maximum, its sum of exp(logit - maximum), and its target's
    # logit or 0 where another rank has it; (C,) each, float32 or wider
    statistics: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    # logits, target, maximum, sum, first entry: softmax - [v = target], which may take the place of the logits
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def _chunks(num_tokens: int, W_VH: Tensor, form: Form) -> Iterator[slice]:
    rows = chunk_rows(form.name, W_VH)
    return (slice(start, start + rows) for start in range(0, num_tokens, rows))


def _statistics(logits_CV: Tensor, target_C: Tensor, first_entry: int, group, form: Form):
    """Loss of a chunk's tokens, and each row's maximum and sum over the whole vocabulary; (C,) each."""
    max_C, sum_C, chosen_C = form.statistics(logits_CV, target_C, first_entry)
    if group is not None:
        own_C = max_C.clone()
        dist.all_reduce(max_C, dist.ReduceOp.MAX, group)
        sum_C.mul_(torch.exp(own_C - max_C))
        dist.all_reduce(sum_C, group=group)
        dist.all_reduce(chosen_C, group=group)
    # in this order: beside a maximum of 1e4 the logarithm would lose all but three digits
    return (max_C - chosen_C) + torch.log(sum_C), max_C, sum_C


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, W_VH, target_T, first_entry, group, form):
        want_dx = ctx.needs_input_grad[0]
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        loss_T = torch.empty(len(x_TH), dtype=wide, device=x_TH.device)
        dx_TH = torch.empty_like(x_TH) if want_dx else None
        for here in _chunks(len(x_TH), W_VH, form):
            logits_CV, target_C = x_TH[here] @ W_VH.t(), target_T[here]
            loss_T[here], max_C, sum_C = _statistics(logits_CV, target_C, first_entry, group, form)
            if want_dx:
                dx_TH[here] = form.gradient(logits_CV, target_C, max_C, sum_C, first_entry) @ W_VH
            del logits_CV  # or two chunks' would stand at once
        if want_dx and group is not None:
            dist.all_reduce(dx_TH, group=group)
        ctx.save_for_backward(dx_TH)
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss_T):
        (dx_TH,) = ctx.saved_tensors
        return (dx_TH * dloss_T.unsqueeze(-1)).to(dx_TH.dtype), None, None, None, None, None


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, W_VH, target_T, first_entry, group, form):
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        # three tensors: of a view autograd would refuse `loss *= mask`
        loss_T, max_T, sum_T = (torch.empty(len(x_TH), dtype=wide, device=x_TH.device) for _ in range(3))
        for here in _chunks(len(x_TH), W_VH, form):
            found = _statistics(x_TH[here] @ W_VH.t(), target_T[here], first_entry, group, form)
            loss_T[here], max_T[here], sum_T[here] = found
        ctx.save_for_backward(x_TH, W_VH, target_T, max_T, sum_T)
        ctx.first_entry, ctx.group, ctx.form = first_entry, group, form
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss_T):
        x_TH, W_VH, target_T, max_T, sum_T = ctx.saved_tensors
        dx_TH = torch.empty_like(x_TH) if ctx.needs_input_grad[0] else None
        dW_VH = torch.zeros_like(W_VH, dtype=max_T.dtype)
        for here in _chunks(len(x_TH), W_VH, ctx.form):
            x_CH, dloss_C1 = x_TH[here], dloss_T[here].unsqueeze(-1)
            given = (target_T[here], max_T[here], sum_T[here], ctx.first_entry)
            g_CV = ctx.form.gradient(x_CH @ W_VH.t(), *given)
            if dx_TH is not None:
                dx_TH[here] = (g_CV @ W_VH) * dloss_C1
            weighed_CH = (x_CH * dloss_C1).to(x_CH.dtype)  # H numbers a token, where g has V
            if dW_VH.dtype == W_VH.dtype:
                dW_VH.addmm_(g_CV.t(), weighed_CH)
            else:
                dW_VH += g_CV.t() @ weighed_CH
            del g_CV
        if dx_TH is not None and ctx.group is not None:
            dist.all_reduce(dx_TH, group=ctx.group)
        return dx_TH, dW_VH.to(W_VH.dtype), None, None, None, None


def chunked_loss(
    x_TH: Tensor, W_VH: Tensor, target_T: Tensor, first_entry: int, group: dist.ProcessGroup | None, form: Form
) -> Tensor:
    """Each token's loss (T,), float32 or wider, by this form."""
    check_shapes("x", x_TH.shape, target=(target_T, x_TH.shape[:1]))
    head = _TrainedHead if W_VH.requires_grad else _FrozenHead
    return head.apply(x_TH.contiguous(), W_VH, target_T.contiguous(), first_entry, group, form)
