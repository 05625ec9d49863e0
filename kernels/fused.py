"""The expert path in Triton: the functions that every backend has, with the same arguments, from their own files.

Besides: `gated_rms_norm`, and the layer and its router from tokens, with no logits or sorted rows between.

`backend.backend` imports this: whether kernels are then compiled or interpreted is decided by Triton's own switch.
"""

from megatron_evolve.kernels.experts import grouped_experts, routed_experts
from megatron_evolve.kernels.gated_norm import gated_rms_norm
from megatron_evolve.kernels.grouped_linear import grouped_linear
from megatron_evolve.kernels.linear_cross_entropy import linear_cross_entropy
from megatron_evolve.kernels.permute import permute, unpermute
from megatron_evolve.kernels.reference import GroupedLora, RoutePlan, experts_of_chunks
from megatron_evolve.kernels.route_plan import route_plan
from megatron_evolve.kernels.router import router, router_from_tokens

__all__ = [
    "GroupedLora",
    "RoutePlan",
    "experts_of_chunks",
    "gated_rms_norm",
    "grouped_experts",
    "grouped_linear",
    "linear_cross_entropy",
    "permute",
    "route_plan",
    "routed_experts",
    "router",
    "router_from_tokens",
    "unpermute",
]
