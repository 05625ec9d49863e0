"""Who computes the experts: ours, plain PyTorch in three forms, and other people's packages where they are installed.

Each provider is prepared once for the tensors of a problem (its plan, its layout of the weights), outside the timed
part, and then takes tokens to tokens. The plan is given to all: routing is another op.

    triton    the fused kernels
    eager     the CPU path of this package: slices of sorted rows
    loop      a Python loop over experts, as model code on the Hugging Face hub has it
    unfused   what Megatron-Core runs on Hopper, pass by pass: permute, torch._grouped_mm, weighted squared ReLU,
              torch._grouped_mm, unpermute; adapters as Megatron-Bridge has them: two skinny products, scale, add
    sequential-mlp   Megatron-Core's own module for where nothing else is installed
    te-grouped-mlp   Megatron-Core's module over Transformer Engine's grouped linear layers
    scattermoe, quack   other people's products of sorted rows; none of these four has adapters

The unfused path is given good parts, so that a ratio to it is no flattery: the permutation kernels of this package
where there is a GPU (Megatron's `moe_permute_fusion`), and an activation compiled by torch, forward and backward.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_evolve.kernels import eager
from megatron_evolve.kernels.backend import backend
from megatron_evolve.kernels.bench.megatron import sequential_mlp, te_grouped_mlp
from megatron_evolve.kernels.bench.problem import Experts, Prepared
from megatron_evolve.kernels.bench.quack import quack
from megatron_evolve.kernels.bench.scattermoe import scattermoe
from megatron_evolve.kernels.reference import GroupedLora


class Provider(NamedTuple):
    version: Callable[[], str]
    prepare: Callable[[Experts], Prepared]


def triton(v: Experts) -> Prepared:
    ops = backend("triton")
    plan = ops.route_plan(v.idx_TK, len(v.W1_EFH))
    return lambda: ops.routed_experts(v.x_TH, v.p_TK, plan, v.W1_EFH, v.W2_EHF, *v.loras)


def sliced(v: Experts) -> Prepared:
    def run() -> Tensor:
        rows, p_M = eager.permute(v.x_TH, v.p_TK, v.plan)
        y_MH = eager.grouped_experts(rows, v.plan.counts_E, p_M, v.W1_EFH, v.W2_EHF, *v.loras)
        return eager.unpermute(y_MH, v.plan)

    return run


def loop(v: Experts) -> Prepared:
    def linear(x: Tensor, W: Tensor, adapter: tuple[Tensor, Tensor] | None, scale: float) -> Tensor:
        y = F.linear(x, W)
        return y if adapter is None else y + scale * F.linear(F.linear(x, adapter[0]), adapter[1])

    def run() -> Tensor:
        # taken apart once: indexing with [e] would make autograd fill a stacked gradient for every expert
        W1, W2 = v.W1_EFH.unbind(), v.W2_EHF.unbind()
        adapters = [list(zip(lora.A_ERI.unbind(), lora.B_EOR.unbind(), strict=True)) for lora in v.loras]
        first, second = adapters or [[None] * len(W1)] * 2
        scales = [lora.scale for lora in v.loras] or [1.0, 1.0]
        out_TH = torch.zeros_like(v.x_TH)
        for e in range(len(W1)):
            token_M, k_M = torch.where(v.idx_TK == e)
            h_MF = linear(v.x_TH[token_M], W1[e], first[e], scales[0])
            a_MF = (v.p_TK[token_M, k_M, None] * torch.relu(h_MF).float() ** 2).to(h_MF.dtype)
            out_TH.index_add_(0, token_M, linear(a_MF, W2[e], second[e], scales[1]))
        return out_TH

    return run


def _activation(h_MF: Tensor, p_M1: Tensor) -> Tensor:
    return (torch.relu(h_MF).float().square() * p_M1).to(h_MF.dtype)


def _activation_gradient(da_MF: Tensor, h_MF: Tensor, p_M1: Tensor) -> tuple[Tensor, Tensor]:
    r_MF, da_wide_MF = torch.relu(h_MF).float(), da_MF.float()
    return (2 * p_M1 * r_MF * da_wide_MF).to(h_MF.dtype), (r_MF.square() * da_wide_MF).sum(-1, keepdim=True)


@lru_cache(maxsize=1)
def _compiled() -> tuple[Callable, Callable]:
    """One kernel each, for any number of rows."""
    return torch.compile(_activation, dynamic=True), torch.compile(_activation_gradient, dynamic=True)


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_MF, p_M1):
        ctx.save_for_backward(h_MF, p_M1)
        return (_compiled()[0] if h_MF.is_cuda else _activation)(h_MF, p_M1)

    @staticmethod
    @once_differentiable
    def backward(ctx, da_MF):
        gradient = _compiled()[1] if da_MF.is_cuda else _activation_gradient
        return gradient(da_MF, *ctx.saved_tensors)


def unfused(v: Experts) -> Prepared:
    ops = backend("triton") if v.x_TH.is_cuda else eager
    plan = ops.route_plan(v.idx_TK, len(v.W1_EFH))
    stop_E = plan.counts_E.cumsum(0).to(torch.int32)

    def linear(x: Tensor, W_EOI: Tensor, lora: GroupedLora | None) -> Tensor:
        y = torch._grouped_mm(x, W_EOI.transpose(-2, -1), offs=stop_E)
        if lora is None:
            return y
        u = torch._grouped_mm(x, lora.A_ERI.transpose(-2, -1), offs=stop_E)
        return y + lora.scale * torch._grouped_mm(u, lora.B_EOR.transpose(-2, -1), offs=stop_E)

    def run() -> Tensor:
        lora1, lora2 = v.loras or (None, None)
        rows, p_M = ops.permute(v.x_TH, v.p_TK, plan)
        a_MF = _SquaredRelu.apply(linear(rows, v.W1_EFH, lora1), p_M.unsqueeze(-1))
        return ops.unpermute(linear(a_MF, v.W2_EHF, lora2), plan)

    return run


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def own_version() -> str:
    """This package's, with the compiler's."""
    return f"megatron-evolve {_version('megatron-evolve') or 'checkout'}, triton {_version('triton') or 'none'}"


def torch_version() -> str:
    return f"torch {torch.__version__}"


def _both_versions(*packages: str) -> Callable[[], str]:
    return lambda: ", ".join(f"{package} {_version(package) or 'none'}" for package in packages)


PROVIDERS = {
    "triton": Provider(own_version, triton),
    "unfused": Provider(torch_version, unfused),
    "eager": Provider(own_version, sliced),
    "loop": Provider(torch_version, loop),
    "sequential-mlp": Provider(_both_versions("megatron-core"), sequential_mlp),
    "te-grouped-mlp": Provider(_both_versions("megatron-core", "transformer-engine"), te_grouped_mlp),
    "scattermoe": Provider(_both_versions("scattermoe"), scattermoe),
    "quack": Provider(_both_versions("quack-kernels"), quack),
}

# Packages that are asked only where they are installed; Liger's experts are another function, in `gated`.
PEERS = {
    "sequential-mlp": "megatron-core",
    "te-grouped-mlp": "transformer-engine",
    "liger": "liger-kernel",
    "scattermoe": "scattermoe",
    "quack": "quack-kernels",
}


def peers() -> dict[str, str | None]:
    """Name -> version of its package, None where it is not installed."""
    return {name: _version(package) for name, package in PEERS.items()}
