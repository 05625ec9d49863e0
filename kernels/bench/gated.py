"""Liger's fused mixture of experts beside ours, where it is installed: another function, compared by its arithmetic.

    y[t] = sum_k p[t, k] W2_e (silu(G_e x[t]) * U_e x[t])         three products of the same widths instead of two

Its experts are gated, its probability comes after the second product, and its matrices always get gradients. So it has
an oracle of its own, and what may be compared with a row of ours is TFLOP/s at the same tokens, widths and routing,
never milliseconds.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_evolve.kernels.bench import problem as problems
from megatron_evolve.kernels.bench.problem import Prepared, Problem
from megatron_evolve.kernels.roofline import Pass, Shape

OP = "gated experts"


def liger(s: Shape, version: str, device: str) -> tuple[Problem, dict[str, tuple[str, Callable[[], Prepared]]]]:
    """The problem and its only provider."""
    v = problems.experts(s, "full", 0.0, torch.bfloat16, device)
    rng = torch.Generator(device).manual_seed(3)
    up = torch.randn(v.W1_EFH.shape, generator=rng, device=device, dtype=torch.bfloat16) * s.width**-0.5
    W1 = torch.cat((v.W1_EFH.detach(), up), 1).requires_grad_()
    leaves = {"x": v.x_TH, "p": v.p_TK, "W1": W1, "W2": v.W2_EHF}
    idx_TK = v.idx_TK.to(torch.int32)

    def prepare() -> Prepared:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        return lambda: LigerFusedMoEFunction.apply(v.x_TH, W1, v.W2_EHF, idx_TK, v.p_TK)

    moved = s.tokens_bytes * 2 + s.matrix_bytes * 3
    passes = {
        "forward": (Pass(OP, 3 * s.product, moved),),
        "backward": (Pass(f"{OP}, gradients", 6 * s.product, 2 * moved),),
    }
    found = Problem(
        op=OP,
        shape=s._asdict() | {"mode": "full", "max_vio": 0.0, "dtype": "bfloat16"},
        leaves=leaves,
        dout=v.dout_TH,
        fresh=(v.x_TH, v.dout_TH),
        given=(*v.tensors(), W1, idx_TK),
        want=lambda: oracle(v, W1),
        predicted={"liger": passes},
    )
    return found, {"liger": (version, prepare)}


def oracle(v: problems.Experts, W1: Tensor) -> dict[str, Tensor]:
    """Output and gradients one expert at a time in float64, as `problem.oracle` does for ours."""
    K = v.p_TK.size(1)
    want = {"out": torch.zeros_like(v.x_TH, dtype=torch.float64), "dx": torch.zeros_like(v.x_TH, dtype=torch.float64)}
    want |= {"dp": torch.zeros_like(v.p_TK, dtype=torch.float64)}
    want |= {"dW1": torch.zeros_like(W1, dtype=torch.float32), "dW2": torch.zeros_like(v.W2_EHF, dtype=torch.float32)}
    stop_E = v.plan.counts_E.cumsum(0).tolist()
    for e, (start, stop) in enumerate(zip([0, *stop_E[:-1]], stop_E, strict=True)):
        choice_M = v.plan.choice_of_row_M[start:stop]
        token_M = choice_M // K
        own = (v.x_TH[token_M], v.p_TK.flatten()[choice_M], W1[e], v.W2_EHF[e])
        x, p, w1, w2 = (t.detach().double().requires_grad_() for t in own)
        gate, up = (x @ w1.t()).chunk(2, -1)
        y = (torch.nn.functional.silu(gate) * up) @ w2.t() * p.unsqueeze(-1)
        dx, dp, want["dW1"][e], want["dW2"][e] = torch.autograd.grad(y, (x, p, w1, w2), v.dout_TH[token_M].double())
        want["out"].index_add_(0, token_M, y.detach())
        want["dx"].index_add_(0, token_M, dx)
        want["dp"].view(-1)[choice_M] = dp
    return want
