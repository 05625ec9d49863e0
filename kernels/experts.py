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
    matrices_of,
    parts_of,
)
from megatron_evolve.kernels.grouped_product import Rows, product, rows
from megatron_evolve.kernels.matrices import Matrices, matrices
from megatron_evolve.kernels.permute import combine, gather
from megatron_evolve.kernels.reference import GroupedLora, RoutePlan, check_clamp
from megatron_evolve.kernels.shapes import check_shapes, lora_shapes, shape_of
from megatron_evolve.kernels.tiles import Tiling, tiling

Weights = Tensor | Sequence[Tensor]
Loras = tuple[GroupedLora | None, GroupedLora | None]
MainGrads = tuple[Sequence[Tensor], Sequence[Tensor]]


class _Call(NamedTuple):
    """What the function needs to know besides its tensors."""

    tiles: Tiling
    plan: RoutePlan | None
    scales: tuple[float, float]
    num_first: int  # of the matrices that follow, these are fc1's
    main_grads: MainGrads | None
    clamp: float | None

    def rows(self, x: Tensor, *, sort: bool = False) -> Rows:
        """Sorted rows, or tokens read by choice; with `sort` tokens are copied to sorted rows."""
        if self.plan is None:
            return rows(x)
        if sort:
            return rows(gather(x, self.plan))
        return rows(x, self.plan.choice_of_row_M, self.plan.row_of_choice_TK.size(1))

    def tokens(self, y_MH: Tensor) -> Tensor:
        return y_MH if self.plan is None else combine(y_MH, self.plan)


class _Layer(NamedTuple):
    """The matrices of the layer as kernels take them, found once for both directions."""

    W1: Matrices
    W2: Matrices
    A1: Matrices | None
    B1: Matrices | None
    A2: Matrices | None
    B2: Matrices | None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, call, A1, B1, A2, B2, *W):
        tiles, loras = call.tiles, [None if t is None else matrices(t) for t in (A1, B1, A2, B2)]
        of = _Layer(matrices_of(W[: call.num_first]), matrices_of(W[call.num_first :]), *loras)
        x_rows = call.rows(x)
        first = None if A1 is None else adapter_of(x_rows, of.A1, of.B1, call.scales[0], tiles)
        h_MF, a_MF = fc1_squared_relu(x_rows, p, of.W1, tiles, first, call.clamp)
        a_rows = rows(a_MF)
        second = None if A2 is None else adapter_of(a_rows, of.A2, of.B2, call.scales[1], tiles)
        y_MH = product(a_rows, of.W2, tiles, second)
        ctx.call, ctx.layer = call, of
        u1, u2 = (None if adapter is None else adapter.u.base for adapter in (first, second))
        ctx.save_for_backward(x, p, h_MF, u1, u2, A1, B1, A2, B2, *W)
        return call.tokens(y_MH)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, p, h_MF, u1, u2, A1, B1, A2, B2, *W = ctx.saved_tensors
        need_x, need_p, _, need_A1, need_B1, need_A2, need_B2, *need_W = ctx.needs_input_grad
        call, of, tiles = ctx.call, ctx.layer, ctx.call.tiles
        W1, W2 = W[: call.num_first], W[call.num_first :]
        need_W1, need_W2 = any(need_W[: call.num_first]), any(need_W[call.num_first :])
        main1, main2 = call.main_grads or (None, None)

        # a weight gradient wants its rows sorted in memory; then all that reads them reads the copy
        dy_rows = call.rows(dout, sort=need_W2 or need_B2)
        back2 = None
        if A2 is not None:
            back2 = adapter_of(dy_rows, of.B2.transposed, of.A2.transposed, call.scales[1], tiles)
        place = {"choice_of_row": call.plan.choice_of_row_M if call.plan else None, "keep_a": need_W2 or need_A2}
        dh_MF, dp_M, a_MF = fc2_gradient(dy_rows, p, h_MF, of.W2.transposed, tiles, back2, call.clamp, **place)
        a_rows = None if a_MF is None else rows(a_MF)
        dW2 = gradient_of(W2, dy_rows, a_rows, tiles, main2) if need_W2 else (None,) * len(W2)
        (dA2,) = gradient_of([A2], back2.u, a_rows, tiles) if need_A2 else (None,)
        (dB2,) = gradient_of([B2], dy_rows, rows(u2), tiles) if need_B2 else (None,)

        dh_rows, x_rows = rows(dh_MF), call.rows(x, sort=True) if need_W1 or need_A1 else None
        back1 = None
        if A1 is not None:
            back1 = adapter_of(dh_rows, of.B1.transposed, of.A1.transposed, call.scales[0], tiles)
        dx = call.tokens(product(dh_rows, of.W1.transposed, tiles, back1)) if need_x else None
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
    clamp: float | None = None,
) -> Tensor:
    """fc1, weighted squared ReLU, fc2 on rows sorted by expert: (M, H), each row weighted by its probability.

    `clamp` is the s of a soft bound, (s tanh(relu(h) / s))^2; None for none.
    With `main_grads`, E float32 buffers for fc1 and E for fc2, weight gradients are added there and autograd gets none
    for the matrices; whoever owns the parameters then marks them as done (Megatron's `grad_added_to_main_grad`).
    """
    W1, W2 = parts_of(W1_EFH), parts_of(W2_EHF)
    _check(x_MH, p_M, x_MH.shape[:1], W1, W2, (lora1, lora2), main_grads)
    tiles = tiling(counts_on_device(counts_E, x_MH, len(x_MH), W1), len(x_MH), W1[0].shape[-2:])
    return _apply(x_MH, p_M, tiles, None, W1, W2, (lora1, lora2), main_grads, clamp)


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
    clamp: float | None = None,
) -> Tensor:
    """The same from tokens to tokens (T, H): `permute`, `grouped_experts` and `unpermute` without the copies."""
    W1, W2 = parts_of(W1_EFH), parts_of(W2_EHF)
    _check(x_TH, p_TK, plan.row_of_choice_TK.shape, W1, W2, (lora1, lora2), main_grads)
    num_rows = plan.row_of_choice_TK.numel()
    tiles = tiling(counts_on_device(plan.counts_E, x_TH, num_rows, W1), num_rows, W1[0].shape[-2:])
    return _apply(x_TH, p_TK, tiles, plan, W1, W2, (lora1, lora2), main_grads, clamp)


def _check(
    x: Tensor,
    p: Tensor,
    choices: Sequence[int],
    W1: tuple[Tensor, ...],
    W2: tuple[Tensor, ...],
    loras: Loras,
    main_grads: MainGrads | None,
) -> None:
    """All operands fit W1 and the shape of `choices`: (M,) for sorted rows, (T, K) for tokens."""
    E, F, H = shape_of(W1)
    operands = {"x": (x, (choices[0], H)), "p": (p, choices), "W2": (W2, (E, H, F))}
    if main_grads is not None:
        operands |= {"main_grads[0]": (main_grads[0], (E, F, H)), "main_grads[1]": (main_grads[1], (E, H, F))}
    check_shapes(
        "W1", (E, F, H), **operands, **lora_shapes("1", loras[0], E, F, H), **lora_shapes("2", loras[1], E, H, F)
    )


def _apply(
    x: Tensor,
    p: Tensor,
    tiles: Tiling,
    plan: RoutePlan | None,
    W1: tuple[Tensor, ...],
    W2: tuple[Tensor, ...],
    loras: Loras,
    main_grads: MainGrads | None,
    clamp: float | None,
) -> Tensor:
    check_clamp(clamp)
    (A1, B1, scale1), (A2, B2, scale2) = (lora if lora is not None else (None, None, 1.0) for lora in loras)
    call = _Call(tiles, plan, (scale1, scale2), len(W1), main_grads, clamp)
    return _Experts.apply(x, p, call, A1, B1, A2, B2, *W1, *W2)
