"""Megatron-Core's own modules of experts beside ours, on the problem's own matrices.

SequentialMLP is what runs where nothing else is installed: one MLP an expert, one after another. TEGroupedMLP is what
runs on NVIDIA's GPUs: Transformer Engine's grouped linear layers around Megatron's weighted squared ReLU. Both ask the
device for the rows of each expert, and both are given this package's permutation, as the unfused path is. Megatron's
process groups are started for one rank where they are not; on a CPU the caller has to have supplied what Megatron takes
for granted of CUDA.
"""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn

from megatron_evolve.kernels import eager
from megatron_evolve.kernels.backend import backend
from megatron_evolve.kernels.bench.problem import Experts, Prepared


def sequential_mlp(v: Experts) -> Prepared:
    """Raises ValueError for adapters, which Megatron-Core does not bring."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    config, groups = _alone(v)
    layers = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = SequentialMLP(len(v.W1_EFH), config, layers, groups)
    for expert in experts.local_experts:
        del expert.linear_fc1.weight, expert.linear_fc2.weight

    def place() -> None:
        for expert, W1, W2 in zip(experts.local_experts, v.W1_EFH.unbind(), v.W2_EHF.unbind(), strict=True):
            expert.linear_fc1.weight, expert.linear_fc2.weight = W1, W2

    return _around(experts, place, v)


def te_grouped_mlp(v: Experts, layers: tuple[Callable, Callable] | None = None) -> Prepared:
    """`layers` build fc1 and fc2; Transformer Engine's otherwise, as Megatron wraps them.

    Raises ImportError where Transformer Engine is not installed, ValueError for adapters.
    """
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP

    if layers is None:
        if not transformer_engine.HAVE_TE:
            raise ImportError("transformer-engine is not installed: TEGroupedMLP's products are its own")
        layers = (
            transformer_engine.TEColumnParallelGroupedLinear,
            transformer_engine.TERowParallelGroupedLinear,
        )
    config, groups = _alone(v)
    experts = TEGroupedMLP(len(v.W1_EFH), config, GroupedMLPSubmodules(*layers), groups)
    for e in range(len(v.W1_EFH)):
        delattr(experts.linear_fc1, f"weight{e}")
        delattr(experts.linear_fc2, f"weight{e}")

    def place() -> None:
        for e, (W1, W2) in enumerate(zip(v.W1_EFH.unbind(), v.W2_EHF.unbind(), strict=True)):
            setattr(experts.linear_fc1, f"weight{e}", W1)
            setattr(experts.linear_fc2, f"weight{e}", W2)

    return _around(experts, place, v)


def _around(experts: nn.Module, place: Callable[[], None], v: Experts) -> Prepared:
    """Permutation, Megatron's module, and back. `place` puts the problem's matrices where its parameters were, in each
    run anew: views of one stack, so that its gradient arrives."""
    ops = backend("triton") if v.x_TH.is_cuda else eager
    plan = ops.route_plan(v.idx_TK, len(v.W1_EFH))

    def run() -> Tensor:
        place()
        rows, p_M = ops.permute(v.x_TH, v.p_TK, plan)
        out, _ = experts(rows, plan.counts_E, p_M)
        return ops.unpermute(out, plan)

    return run


def _alone(v: Experts):
    """Megatron's configuration of such a layer, and its groups and generators for one rank."""
    from megatron.core import parallel_state
    from megatron.core.activations import squared_relu
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    if v.loras:
        raise ValueError("Megatron-Core has no adapters: compare frozen or fully trained matrices")
    on_gpu = v.x_TH.is_cuda
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
    num_experts, hidden, width = v.W1_EFH.shape
    config = TransformerConfig(
        num_layers=1,
        hidden_size=width,
        num_attention_heads=1,
        ffn_hidden_size=hidden,
        moe_ffn_hidden_size=hidden,
        num_moe_experts=num_experts,
        moe_router_topk=v.p_TK.size(1),
        activation_func=squared_relu,
        gated_linear_unit=False,
        add_bias_linear=False,
        bias_activation_fusion=False,
        use_fused_weighted_squared_relu=on_gpu,  # one kernel there; on a CPU its compilation takes seconds
        gradient_accumulation_fusion=False,
        perform_initialization=False,
        params_dtype=v.x_TH.dtype,
        use_cpu_initialization=not on_gpu,
    )
    return config, ProcessGroupCollection.use_mpu_process_groups()
