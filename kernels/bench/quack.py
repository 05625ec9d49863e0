"""QuACK's products beside ours, where it is installed (the package quack-kernels; 0.6.5 was read), on Hopper and later.

It has every product that an expert layer takes, over rows sorted by expert and read by an index where they are not,
and two with an epilogue: squared ReLU after the first, and the way back through it, with a weight for each row and the
row's gradient of that weight. What it has no product for is done in passes: the weight forward, in PyTorch, and the sum
over a token's choices, by this package.

    forward    h, a = x[token] W1^T, relu(h)^2       a <- p a            out = combine(a W2^T)               keeps h
    backward   dh, p a, dp = through relu^2 of dout[token] W2            dx = combine(dh W1)
               dW1 = dh^T x[token]                   dW2 = dout[token]^T (p a)

Its tuner is left on: it times its own configurations at the first run of a shape, which is not counted.
"""

from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_evolve.kernels import eager
from megatron_evolve.kernels.backend import backend
from megatron_evolve.kernels.bench.problem import Experts, Prepared
from megatron_evolve.kernels.reference import RoutePlan

ACTIVATION = "relu_sq"


class _Rows(NamedTuple):
    """The plan as these products read it, int32."""

    plan: RoutePlan
    start_E1: Tensor  # first row of each expert, then M
    token_M: Tensor

    def combined(self, y_MH: Tensor) -> Tensor:
        return (backend("triton") if y_MH.is_cuda else eager).unpermute(y_MH, self.plan)


class _Experts(torch.autograd.Function):
    """`products` is the package's interface: gemm, gemm_act, gemm_dact. A matrix of theirs is (E, in, out)."""

    @staticmethod
    def forward(ctx, x_TH, p_TK, W1_EFH, W2_EHF, rows, products):
        h_MF, a_MF = products.gemm_act(
            x_TH, W1_EFH.transpose(1, 2), activation=ACTIVATION, cu_seqlens_m=rows.start_E1, A_idx=rows.token_M
        )
        p_M = p_TK.flatten()[rows.plan.choice_of_row_M]
        a_MF.mul_(p_M.unsqueeze(-1))
        y_MH = products.gemm(a_MF, W2_EHF.transpose(1, 2), cu_seqlens_m=rows.start_E1)
        ctx.save_for_backward(x_TH, p_M, W1_EFH, W2_EHF, h_MF)
        ctx.rows, ctx.products = rows, products
        return rows.combined(y_MH)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TH):
        x_TH, p_M, W1_EFH, W2_EHF, h_MF = ctx.saved_tensors
        rows, products = ctx.rows, ctx.products
        dh_MF, a_MF, dp_M = products.gemm_dact(
            dout_TH, W2_EHF, h_MF, activation=ACTIVATION, colvec_scale=p_M, colvec_reduce=True,
            cu_seqlens_m=rows.start_E1, A_idx=rows.token_M,
        )  # fmt: skip
        dx_TH = rows.combined(products.gemm(dh_MF, W1_EFH, cu_seqlens_m=rows.start_E1))
        dW1_EFH = dW2_EHF = None
        over_rows = {"cu_seqlens_k": rows.start_E1, "A_idx": rows.token_M}
        if ctx.needs_input_grad[2]:
            dW1_EFH = torch.empty_like(W1_EFH)  # written as dW1^T, since the operand by index comes first
            products.gemm(x_TH.t(), dh_MF, out=dW1_EFH.transpose(1, 2), **over_rows)
        if ctx.needs_input_grad[3]:
            dW2_EHF = torch.empty_like(W2_EHF)
            products.gemm(dout_TH.t(), a_MF, out=dW2_EHF, **over_rows)
        return dx_TH, dp_M[rows.plan.row_of_choice_TK], dW1_EFH, dW2_EHF, None, None


def quack(v: Experts, products: ModuleType | SimpleNamespace | None = None) -> Prepared:
    """Raises ImportError where the package is not installed, ValueError for adapters."""
    if v.loras:
        raise ValueError("QuACK's products take no adapter: compare frozen or fully trained matrices")
    if products is None:
        from quack import gemm_interface as products
    start_E1 = torch.nn.functional.pad(v.plan.counts_E.cumsum(0), (1, 0)).to(torch.int32)
    rows = _Rows(v.plan, start_E1, v.plan.token_of_row_M.to(torch.int32))
    return lambda: _Experts.apply(v.x_TH, v.p_TK, v.W1_EFH, v.W2_EHF, rows, products)
