"""The grouped product as a differentiable function: rows times their expert's matrix, with an adapter or without.

    y = x W_e^T + u B_e^T,       u = scale x A_e^T
    dx = dy W_e + du A_e,        du = scale dy B_e
    dW_e = dy_e^T x_e            dA_e = du_e^T x_e            dB_e = dy_e^T u_e

A gradient is computed where it is wanted and nowhere else: a frozen W costs a third of the products less. The products
themselves are `grouped_product`'s; here is what follows what.

Letters as in `reference`: E experts, M rows sorted by expert, I and O input and output width, R adapter rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_evolve.kernels.grouped_product import Adapter, Rows, product, rows
from megatron_evolve.kernels.matrices import Matrices, matrices
from megatron_evolve.kernels.reference import GroupedLora
from megatron_evolve.kernels.shapes import check_shapes, lora_shapes, shape_of
from megatron_evolve.kernels.tiles import Tiling, tiling
from megatron_evolve.kernels.weight_gradient import weight_gradient


def parts_of(W: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors that autograd sees: one stacked (E, O, I), or E of (O, I)."""
    return (W,) if isinstance(W, Tensor) else tuple(W)


def matrices_of(parts: Sequence[Tensor]) -> Matrices:
    return matrices(parts[0] if parts[0].dim() == 3 else parts)


def counts_on_device(counts_E: Tensor | Sequence[int], x: Tensor, num_rows: int, W: Sequence[Tensor]) -> Tensor:
    """The counts beside the rows. Megatron's dispatchers give them on the host or on the device; neither waits here.

    Raises ValueError when they do not name the experts, or, where the host holds them, do not sum to the rows.
    """
    num_experts = shape_of(W)[0]
    counts_E = counts_E if isinstance(counts_E, Tensor) else torch.tensor(counts_E, dtype=torch.int32)
    total = counts_E.sum().item() if counts_E.device.type == "cpu" else num_rows
    if counts_E.numel() != num_experts or total != num_rows:
        raise ValueError(
            f"counts must give the rows of {num_experts} experts and sum to {num_rows}; got {counts_E.numel()} counts "
            f"that sum to {total}: pass rows sorted by expert with the counts they were sorted by"
        )
    if W[0].dtype != x.dtype:
        raise ValueError(f"rows and matrices must share a dtype; got {x.dtype} and {W[0].dtype}: cast one of them")
    if W[0].device != x.device:
        raise ValueError(f"rows and matrices must share a device; got {x.device} and {W[0].device}: move one of them")
    return counts_E.to(x.device, non_blocking=True)


def adapter_of(x: Rows, A: Matrices, B: Matrices, scale: float, tiles: Tiling) -> Adapter:
    """u = scale x A^T, rounded to the dtype of the rows, and the matrices that widen it.

    For an input gradient: dy, B and A transposed, and the scale give du = scale dy B, widened by A.
    """
    return Adapter(rows(product(x, A, tiles, scale=scale)), B)


def gradient_of(
    W: Sequence[Tensor], dy: Rows, x: Rows, tiles: Tiling, main_grad: Sequence[Tensor] | None = None
) -> tuple[Tensor | None, ...]:
    """Each matrix's gradient; or None for each, and the gradients added into `main_grad`, float32, in place."""
    if main_grad is not None:
        weight_gradient(dy, x, tiles, matrices_of(main_grad), accumulate=True)
        return (None,) * len(W)
    stacked = W[0].dim() == 3
    dW_EOI = W[0].new_empty(W[0].shape if stacked else (len(W), *W[0].shape))
    weight_gradient(dy, x, tiles, matrices(dW_EOI), accumulate=False)
    return (dW_EOI,) if stacked else dW_EOI.unbind()


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MI, counts_E, scale, A_ERI, B_EOR, *W):
        ctx.tiles, ctx.scale = tiling(counts_E, len(x_MI), W[0].shape[-2:]), scale
        x = rows(x_MI)
        adapter = None
        if A_ERI is not None:
            adapter = adapter_of(x, matrices(A_ERI), matrices(B_EOR), scale, ctx.tiles)
        ctx.save_for_backward(x_MI, None if adapter is None else adapter.u.base, A_ERI, B_EOR, *W)
        return product(x, matrices_of(W), ctx.tiles, adapter)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_MO):
        x_MI, u_MR, A_ERI, B_EOR, *W = ctx.saved_tensors
        need_x, _, _, need_A, need_B, *need_W = ctx.needs_input_grad
        tiles, x, dy = ctx.tiles, rows(x_MI), rows(dy_MO)
        back = None
        if A_ERI is not None and (need_x or need_A):
            back = adapter_of(dy, matrices(B_EOR).transposed, matrices(A_ERI).transposed, ctx.scale, tiles)
        dx_MI = product(dy, matrices_of(W).transposed, tiles, back) if need_x else None
        (dA_ERI,) = gradient_of([A_ERI], back.u, x, tiles) if need_A else (None,)
        (dB_EOR,) = gradient_of([B_EOR], dy, rows(u_MR), tiles) if need_B else (None,)
        dW = gradient_of(W, dy, x, tiles) if any(need_W) else (None,) * len(W)
        return dx_MI, None, None, dA_ERI, dB_EOR, *dW


def grouped_linear(
    x_MI: Tensor,
    counts_E: Tensor | Sequence[int],
    W_EOI: Tensor | Sequence[Tensor],
    lora: GroupedLora | None = None,
) -> Tensor:
    """Each row times its expert's matrix: (M, O). Rows stand sorted by expert; W is stacked or E matrices."""
    W = parts_of(W_EOI)
    shape = shape_of(W)
    check_shapes("W", shape, x=(x_MI, (len(x_MI), shape[-1])), **lora_shapes("", lora, *shape))
    counts_E = counts_on_device(counts_E, x_MI, len(x_MI), W)
    A_ERI, B_EOR, scale = lora if lora is not None else (None, None, 1.0)
    return _GroupedLinear.apply(x_MI, counts_E, scale, A_ERI, B_EOR, *W)
