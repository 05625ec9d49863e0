"""The two projections of latent experts: down to the width that routed experts work in, and back up.

Megatron's MoELayer makes them as `TELinear(parallel_mode="duplicated")` by that name and asserts that Transformer
Engine is there; the shared expert and the router stay at full width (LatentMoE, Nemotron 3 Super and Ultra reports).
`install` puts the class below in its place, with or without Transformer Engine: one path for every machine. Import it
after `build.prepare`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class DuplicatedLinear(torch.nn.Module):
    """y = W x with the whole W on every rank, drawn alike on all ranks of a tensor-parallel group.

    With sequence parallelism a rank sees its part of the tokens, so the gradient of W is a part too; the mark on the
    weight has Megatron sum it over the tensor-parallel group, as for norms and the router. Expert-parallel ranks reduce
    it with the dense weights. Takes TELinear's arguments; raises ValueError for those that ask for something else.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str | None,
        config: TransformerConfig,
        init_method: Callable[[Tensor], None],
        bias: bool,
        is_expert: bool,
        skip_bias_add: bool = False,
        skip_weight_param_allocation: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if parallel_mode != "duplicated" or bias or is_expert or skip_weight_param_allocation:
            raise ValueError(
                f"a latent projection is duplicated, dense and without bias; got parallel_mode={parallel_mode!r}, "
                f"bias={bias}, is_expert={is_expert}, skip_weight_param_allocation={skip_weight_param_allocation}: "
                f"use Megatron's parallel linear layers for anything else"
            )
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, device=device, dtype=config.params_dtype))
        self.weight.allreduce = True
        self.weight.sequence_parallel = config.sequence_parallel
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):
                init_method(self.weight)

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """(..., in) to (..., out), and no bias."""
        return F.linear(input_, self.weight), None

    def backward_dw(self) -> None:
        """Weight gradients are never delayed here: nothing is left to do."""


def install() -> None:
    """Make MoELayer build its latent projections from this file. Idempotent."""
    moe_layer.HAVE_TE = True  # only asked for these projections
    moe_layer.TELinear = DuplicatedLinear
