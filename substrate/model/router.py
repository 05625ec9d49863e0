"""The router of one layer as a Megatron module: choice and shares by the fused kernel, all that follows by Megatron.

It takes the place of Megatron's `TopKRouter` in `MoESubmodules(router=FusedRouter)`: same parameters, same buffers,
same result. Between logits and probabilities Megatron has a sigmoid, a bias, a top-k, a share and a scale, each a pass
over (tokens, experts); here they are one kernel. Jitter, logits, z-loss, auxiliary losses and their logging, and the
counts by which the bias is moved are the base class's own code, run in its order. Among equal scores the lowest expert
is chosen, where torch.topk promises nothing.

Letters: L sequence, B batch, T = L * B tokens, E experts, K chosen. Import it after `build.prepare`: it needs Megatron.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_evolve.kernels.backend import backend

# What the kernel computes. A single group is no limit on the choice.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "moe_router_score_function": ("sigmoid",),
    "moe_router_dtype": ("fp32", None),
    "moe_router_num_groups": (None, 1),
    "moe_router_group_topk": (None, 1),
    "moe_router_fusion": (False,),
    "moe_enable_routing_replay": (False,),
    "moe_expert_capacity_factor": (None,),
}
OTHER_CHOICES = ("sinkhorn", "quantile_balancing")


class FusedRouter(TopKRouter):
    """TopKRouter with `kernels.router`. Raises ValueError for a configuration that asks for another choice."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        _check(config)
        super().__init__(config, *args, **kwargs)
        self.compute = backend("triton").router

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (L, B, E), mask (L, B) of padding: probabilities (T, E), 0 where not chosen, and the choice (T, E)."""
        length, batch, num_experts = logits.shape
        mask_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TE = self.apply_z_loss(logits.reshape(-1, num_experts), padding_mask=mask_T)
        probs_TE, map_TE = self._choose(logits_TE)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            balance_TE, scores_TE = compute_routing_scores_for_aux_loss(
                logits_TE, self.topk, self.score_function, padding_mask=mask_T
            )
            masked = mask_T is not None
            probs_TE = self._apply_aux_loss(probs_TE, scores_TE, balance_TE, masked)
            probs_TE = self._apply_seq_aux_loss(probs_TE, scores_TE, balance_TE, length, batch, masked)
            probs_TE = self._apply_global_aux_loss(probs_TE, scores_TE, balance_TE, masked)
        self._apply_expert_bias(map_TE, padding_mask=mask_T)
        return probs_TE, map_TE

    def _choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Dense, as Megatron's dispatchers read it; in the dtype of the logits."""
        bias_E = self.expert_bias
        if bias_E is None:
            bias_E = torch.zeros(logits_TE.size(1), device=logits_TE.device)
        idx_TK, p_TK = self.compute(logits_TE, bias_E, self.topk, self.config.moe_router_topk_scaling_factor or 1.0)
        # index_put, for scatter has no deterministic form on a GPU, though the experts of a token differ
        where = torch.arange(len(idx_TK), device=idx_TK.device).unsqueeze(1), idx_TK.long()
        probs_TE = torch.zeros_like(logits_TE).index_put(where, p_TK.to(logits_TE.dtype))
        chosen = torch.ones((), dtype=torch.bool, device=idx_TK.device)
        return probs_TE, torch.zeros_like(logits_TE, dtype=torch.bool).index_put(where, chosen)


def _check(config: TransformerConfig) -> None:
    for field, values in ALLOWED.items():
        if getattr(config, field) not in values:
            raise ValueError(
                f"the fused router needs {field} to be {' or '.join(map(repr, values))}; got "
                f"{getattr(config, field)!r}: change it, or build with eager experts, whose router is Megatron's"
            )
    if config.moe_router_load_balancing_type in OTHER_CHOICES:
        raise ValueError(
            f"the fused router balances by bias and auxiliary losses; got moe_router_load_balancing_type="
            f"{config.moe_router_load_balancing_type!r}: build with eager experts, whose router is Megatron's"
        )
