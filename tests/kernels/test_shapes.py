"""Operands that do not fit each other are refused before a kernel reads beside one, and those that fit are not."""

import re

import pytest
import torch
from torch import Tensor

from megatron_evolve.kernels import fused, reference
from megatron_evolve.kernels.reference import GroupedLora
from megatron_evolve.kernels.shapes import shape_of
from tests.kernels.expert_cases import DEVICE, FLOAT32, error

T, E, K, H, F, R = 6, 3, 2, 16, 24, 4
M = T * K


def new(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(0)).to(DEVICE)


COUNTS = torch.tensor([4, 4, 4], device=DEVICE)
IDX = (torch.arange(M, device=DEVICE) % E).view(T, K)
W, W1, W2 = new(E, F, H), new(E, F, H), new(E, H, F)


def linear(ops, x=(M, H), A=(E, R, H), B=(E, F, R)):
    return ops.grouped_linear(new(*x), COUNTS, W, GroupedLora(new(*A), new(*B), 1.0))


def experts(ops, x=(M, H), p=(M,), W2=(E, H, F), A1=(E, R, H), B1=(E, F, R), A2=(E, R, F), B2=(E, H, R)):
    loras = GroupedLora(new(*A1), new(*B1), 1.0), GroupedLora(new(*A2), new(*B2), 1.0)
    return ops.grouped_experts(new(*x), COUNTS, new(*p), W1, new(*W2), *loras)


def from_tokens(ops, x=(T, H), bias=(E,), chosen=K):
    return ops.router_from_tokens(new(*x), W1[:, 0], new(*bias), chosen, 1.0)[1]


def router(ops, bias=(E,), chosen=K):
    return ops.router(new(T, E), new(*bias), chosen, 1.0)[1]


def permute(ops, x=(T, H), p=(T, K)):
    return torch.cat([part.flatten() for part in ops.permute(new(*x), new(*p), ops.route_plan(IDX, E))])


def unpermute(ops, y=(M, H)):
    return ops.unpermute(new(*y), ops.route_plan(IDX, E))


def loss(ops, target=(T,)):
    return ops.linear_cross_entropy(new(T, H), W1[0], torch.zeros(target, dtype=torch.long, device=DEVICE))


def routed(ops, x=(T, H), p=(T, K), main1=(E, F, H), main2=(E, H, F)):
    plan = ops.route_plan(IDX, E)
    return ops.routed_experts(new(*x), new(*p), plan, W1.unbind(), W2.unbind(), main_grads=(new(*main1), new(*main2)))


# Some of them PyTorch takes: a tensor whose end it never reads, a bias for all experts.
MISFITS = [
    (linear, {"x": (M, 2 * H)}),
    (linear, {"x": (M, H // 2)}),
    (linear, {"A": (1, R, H)}),
    (linear, {"A": (E, R, H - 8)}),
    (linear, {"B": (E, F - 8, R)}),
    (linear, {"B": (E + 1, F, R)}),
    (experts, {"x": (M, H - 8)}),
    (experts, {"x": (M, H, 1)}),
    (experts, {"p": (5,)}),
    (experts, {"p": (M, 1)}),
    (experts, {"W2": (E, H, F - 8)}),
    (experts, {"W2": (E, H + 1, F)}),
    (experts, {"W2": (E - 1, H, F)}),
    (experts, {"A1": (E, R, F)}),
    (experts, {"B1": (E - 1, F, R)}),
    (experts, {"A2": (E, R, H)}),
    (experts, {"B2": (E, F, R)}),
    (routed, {"x": (T - 1, H)}),
    (routed, {"p": (M,)}),
    (routed, {"main1": (E, H, F)}),
    (routed, {"main2": (E - 1, H, F)}),
    (permute, {"x": (T - 1, H)}),
    (permute, {"p": (T - 1, K)}),
    (unpermute, {"y": (M - 1, H)}),
    (router, {"bias": (E - 1,)}),
    (router, {"bias": (1,)}),
    (from_tokens, {"x": (T, H - 8)}),
    (from_tokens, {"bias": (E + 1,)}),
    (loss, {"target": (T - 1,)}),
    (loss, {"target": (T, 1)}),
]


@pytest.mark.parametrize(("op", "change"), MISFITS, ids=lambda one: one.__name__ if callable(one) else str(one))
def test_misfits_are_named_before_a_kernel_reads_them(op, change):
    ((operand, size),) = change.items()
    name = {"main1": r"main_grads\[0\]", "main2": r"main_grads\[1\]"}.get(operand, operand)
    with pytest.raises(ValueError, match=rf"{name} must have shape .*; got {re.escape(str(size))}: pass tensors that"):
        op(fused, **change)


def test_matrices_elsewhere_are_refused():
    with pytest.raises(ValueError, match=f"must share a device; got {DEVICE}.* and meta: move one of them"):
        fused.grouped_linear(new(M, H), COUNTS, W.to("meta"))


@pytest.mark.parametrize("chosen", [0, E + 1])
@pytest.mark.parametrize("op", [router, from_tokens])
def test_more_experts_than_there_are_cannot_be_chosen(op, chosen):
    with pytest.raises(ValueError, match=f"between 1 and 3 of 3 experts; got {chosen}"):
        op(fused, chosen=chosen)


@pytest.mark.parametrize("op", [linear, experts, permute, unpermute, router, loss], ids=lambda op: op.__name__)
def test_what_fits_is_what_the_definition_takes(op):
    assert error(op(fused), op(reference).double()) <= FLOAT32


def test_stacked_and_apart_are_one_shape():
    assert shape_of(W) == shape_of((W,)) == shape_of(W.unbind()) == (E, F, H)
