"""The oracle of the gated experts that Liger is held to, against their definition; Liger itself needs a GPU."""

import pytest
import torch
import torch.nn.functional as F

from megatron_evolve.kernels.bench import gated
from megatron_evolve.kernels.roofline import Shape


def test_the_oracle_is_the_definition():
    problem, prepare = gated.liger(Shape("tiny", 12, 4, 2, 16, 24), "none", "cpu")
    assert list(prepare) == ["liger"]
    x, p, W1, W2 = (problem.leaves[n].detach().double().requires_grad_() for n in ("x", "p", "W1", "W2"))
    idx_TK = problem.given[-1].long()
    gate, up = torch.einsum("th,tkfh->tkf", x, W1[idx_TK]).chunk(2, -1)
    out = torch.einsum("tkf,tkhf,tk->th", F.silu(gate) * up, W2[idx_TK], p)
    grads = torch.autograd.grad(out, (x, p, W1, W2), problem.dout.double())
    want = problem.want()
    for name, value in zip(("out", "dx", "dp", "dW1", "dW2"), (out.detach(), *grads), strict=True):
        assert (want[name].double() - value).norm() <= 1e-6 * value.norm(), name


def test_forward_is_three_products_and_backward_six():
    problem, _ = gated.liger(Shape("tiny", 12, 4, 2, 16, 24), "none", "cpu")
    forward, backward = (problem.predicted["liger"][part][0].flops for part in ("forward", "backward"))
    assert forward == pytest.approx(3 * 2 * 24 * 16 * 24) and backward == 2 * forward
