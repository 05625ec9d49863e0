"""A small model whose weights are large enough that every part of it is seen in the logits.

At Megatron's initialisation the scan's term is negligible and a wrong one passes at 4e-7.
"""

from typing import Any

import torch

from megatron_evolve.substrate.model import build, weights
from megatron_evolve.substrate.model.architecture import NANO_CPU, Architecture

# chunks of 16, so that sequences of a test span several
SMALL = Architecture.model_validate(NANO_CPU.model_dump() | {"name": "small", "mamba_chunk_size": 16})


def build_enlarged(architecture: Architecture = SMALL, *, seed: int = 1, **fields: Any) -> torch.nn.Module:
    """Matrices times 6 (input projection and router 10), norms and D by 0.5 to 1.5, a routing bias up to 0.4."""
    model = build.build_model(architecture, seed=seed, **fields)
    rng = torch.Generator().manual_seed(5)
    for name, value in weights.state_of(model).items():
        if name.endswith("expert_bias"):
            value.copy_(torch.rand(value.shape, generator=rng) * 0.4)
        elif name.endswith(("in_proj.weight", "router.weight")):
            value.mul_(10)
        elif value.dim() == 2:
            value.mul_(6)
        elif name.endswith(("norm.weight", ".D")):
            value.mul_(0.5 + torch.rand(value.shape, generator=rng))
    return model
