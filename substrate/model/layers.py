"""Norms and dense linear layers: torch's norm and Megatron's own linears, or Transformer Engine's.

Which, `operations.norm` and `operations.linear` say. Transformer Engine's linears are taken unfused, a norm by itself
and a matrix by itself, so weights keep the names of `weight_map`, and adapters go on either (`lora`). Experts, latent
projections, embedding and output table are the same with both. Import it after `build.prepare`: it needs Megatron.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_evolve.substrate import operations


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMS norm with Megatron's signature.

    Megatron's own wrapper refuses sequence parallelism. Its mark on the weight is all that is needed: each rank then
    sees part of the sequence, and the gradient is summed over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel


class Layers(NamedTuple):
    """What a layer's spec is filled with."""

    norm: Callable[..., Any]
    column: type[torch.nn.Module]
    row: type[torch.nn.Module]


def layers_of(asked: str) -> Layers:
    """Those that `operations` names for `asked` (`operations.LAYERS`) on this machine.

    Raises ValueError where Transformer Engine is asked for and cannot be had.
    """
    here = operations.machine(torch.cuda.is_available())
    operations.check_layers(here, asked)
    if operations.linear(here, asked).path != operations.TRANSFORMER_ENGINE:
        return Layers(RMSNorm, ColumnParallelLinear, RowParallelLinear)
    if not HAVE_TE:  # Megatron then puts a mock in its place, which would be built without a word
        raise ValueError(
            f"layers {asked}: {here.names('transformer_engine')} is installed, but Megatron could not import it: mend "
            "it, or take layers pytorch"
        )
    from megatron.core.extensions import transformer_engine as theirs

    return Layers(theirs.TENorm, theirs.TEColumnParallelLinear, theirs.TERowParallelLinear)
