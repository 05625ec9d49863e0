"""The routed experts of a layer as one differentiable function over the fused kernels.

    forward    fc1 (gather, product, p relu^2) -> product -> combine                      keeps x, p and h
    backward   fc2_gradient (product, relu^2, p) -> product -> combine,  and weight gradients where they are wanted

Megatron's path keeps the permuted rows, h and a, 76,800 bytes a token of Nemotron-3-Nano; this keeps h, 22,272, and the
tokens themselves, which the layer before holds anyway. Nothing here waits for the device; every sum has a fixed order.

Two doors. `grouped_experts` takes rows that a dispatcher has sorted (Megatron's, with experts on several ranks);
`routed_experts` takes tokens and their plan, so that nothing is permuted in memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_evolve.kernels.fc1 import fc1_squared_relu
from megatron_evolve.kernels.fc2_gradient import fc2_gradient
from megatron_evolve.kernels.grouped_linear import (
    adapter_of,
    counts_on_device,
    gradient_of,
    input_adapter_of,
    matrices_of,
    parts_of,
)
from megatron_evolve.kernels.grouped_product import Rows, product, rows
from megatron_evolve.kernels.permute import combine
from megatron_evolve.kernels.reference import GroupedLora, RoutePlan
from megatron_evolve.kernels.tiles import Tiling, tiling

Weights = Tensor | Sequence[Tensor]
MainGrads = tuple[Sequence[Tensor], Sequence[Tensor]]


class _Call(NamedTuple):
    """What the function needs to know besides its tensors."""

    tiles: Tiling
    plan: RoutePlan | None
    scales: tuple[float, float]
    num_first: int  # of the matrices that follow, these are fc1's
    main_grads: MainGrads | None

    def rows(self, x: Tensor) -> Rows:
        """Sorted rows, or tokens read by choice."""
        return rows(x) if self.plan is None else rows(x, self.plan.choice_of_row_M, self.plan.row_of_choice_TK.size(1))

    def tokens(self, y_MH: Tensor) -> Tensor:
        return y_MH if self.plan is None else combine(y_MH, self.plan)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, call, A1, B1, A2, B2, *W):
        W1, W2, tiles = W[: call.num_first], W[call.num_first :], call.tiles
        x_rows = call.rows(x)
        first = None if A1 is None else adapter_of(x_rows, A1, B1, call.scales[0], tiles)
        h_MF, a_MF = fc1_squared_relu(x_rows, p, matrices_of(W1), tiles, first)
        second = None if A2 is None else adapter_of(rows(a_MF), A2, B2, call.scales[1], tiles)
        y_MH = product(rows(a_MF), matrices_of(W2), tiles, second)
        ctx.call = call
        u1, u2 = (None if adapter is None else adapter.u.base for adapter in (first, second))
        ctx.save_for_backward(x, p, h_MF, u1, u2, A1, B1, A2, B2, *W)
        return call.tokens(y_MH)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, p, h_MF, u1, u2, A1, B1, A2, B2, *W = ctx.saved_tensors
        need_x, need_p, _, need_A1, need_B1, need_A2, need_B2, *need_W = ctx.needs_input_grad
        call, tiles = ctx.call, ctx.call.tiles
        W1, W2 = W[: call.num_first], W[call.num_first :]
        need_W1, need_W2 = any(need_W[: call.num_first]), any(need_W[call.num_first :])
        x_rows, dy_rows = call.rows(x), call.rows(dout)
        main1, main2 = call.main_grads or (None, None)

        back2 = None if A2 is None else input_adapter_of(dy_rows, A2, B2, call.scales[1], tiles)
        dh_MF, dp_M, a_MF = fc2_gradient(
            dy_rows, p, h_MF, matrices_of(W2).transposed, tiles, back2, keep_a=need_W2 or need_A2
        )
        dW2 = gradient_of(W2, dy_rows, rows(a_MF), tiles, main2) if need_W2 else (None,) * len(W2)
        (dA2,) = gradient_of([A2], back2.u, rows(a_MF), tiles) if need_A2 else (None,)
        (dB2,) = gradient_of([B2], dy_rows, rows(u2), tiles) if need_B2 else (None,)

        dh_rows = rows(dh_MF)
        back1 = None if A1 is None else input_adapter_of(dh_rows, A1, B1, call.scales[0], tiles)
        dx = call.tokens(product(dh_rows, matrices_of(W1).transposed, tiles, back1)) if need_x else None
        dW1 = gradient_of(W1, dh_rows, x_rows, tiles, main1) if need_W1 else (None,) * len(W1)
        (dA1,) = gradient_of([A1], back1.u, x_rows, tiles) if need_A1 else (None,)
        (dB1,) = gradient_of([B1], dh_rows, rows(u1), tiles) if need_B1 else (None,)

        dp = dp_M.to(p.dtype) if need_p else None
        if dp is not None and call.plan is not None:
            dp = dp[call.plan.row_of_choice_TK]
        return dx, dp, None, dA1, dB1, dA2, dB2, *dW1, *dW2


def grouped_experts(
    x_MH: Tensor,
    counts_E: Tensor | Sequence[int],
    p_M: Tensor,
    W1_EFH: Weights,
    W2_EHF: Weights,
    lora1: GroupedLora | None = None,
    lora2: GroupedLora | None = None,
    *,
    main_grads: MainGrads | None = None,
) -> Tensor:
    """fc1, weighted squared ReLU, fc2 on rows sorted by expert: (M, H), each row weighted by its probability.

    With `main_grads`, E float32 buffers for fc1 and E for fc2, weight gradients are added there and autograd gets none
    for the matrices; whoever owns the parameters then marks them as done (Megatron's `grad_added_to_main_grad`).
    """
    W1, W2 = parts_of(W1_EFH), parts_of(W2_EHF)
    tiles = tiling(counts_on_device(counts_E, x_MH, len(x_MH), W1), len(x_MH), W1[0].shape[-2:])
    return _apply(x_MH, p_M, tiles, None, W1, W2, (lora1, lora2), main_grads)


def routed_experts(
    x_TH: Tensor,
    p_TK: Tensor,
    plan: RoutePlan,
    W1_EFH: Weights,
    W2_EHF: Weights,
    lora1: GroupedLora | None = None,
    lora2: GroupedLora | None = None,
    *,
    main_grads: MainGrads | None = None,
) -> Tensor:
    """The same from tokens to tokens (T, H): `permute`, `grouped_experts` and `unpermute` without the copies."""
    W1, W2 = parts_of(W1_EFH), parts_of(W2_EHF)
    num_rows = plan.row_of_choice_TK.numel()
    tiles = tiling(counts_on_device(plan.counts_E, x_TH, num_rows, W1), num_rows, W1[0].shape[-2:])
    return _apply(x_TH, p_TK, tiles, plan, W1, W2, (lora1, lora2), main_grads)


def _apply(
    x: Tensor,
    p: Tensor,
    tiles: Tiling,
    plan: RoutePlan | None,
    W1: tuple[Tensor, ...],
    W2: tuple[Tensor, ...],
    loras: tuple[GroupedLora | None, GroupedLora | None],
    main_grads: MainGrads | None,
) -> Tensor:
    (A1, B1, scale1), (A2, B2, scale2) = (lora if lora is not None else (None, None, 1.0) for lora in loras)
    call = _Call(tiles, plan, (scale1, scale2), len(W1), main_grads)
    return _Experts.apply(x, p, call, A1, B1, A2, B2, *W1, *W2)
