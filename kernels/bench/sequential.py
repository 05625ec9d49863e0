"""Megatron's SequentialMLP beside ours: one MLP an expert, each on its own slice of the sorted rows, one after another.

It is what Megatron-Core runs where nothing else is installed, and it asks the device for the rows of each expert. It is
given this package's permutation, as the unfused path is. Megatron's process groups are started for one rank where they
are not; on a CPU the caller has to have supplied what Megatron takes for granted of CUDA.
"""

import torch.distributed as dist
from torch import Tensor

from megatron_evolve.kernels import eager
from megatron_evolve.kernels.backend import backend
from megatron_evolve.kernels.bench.problem import Experts, Prepared


def sequential_mlp(v: Experts) -> Prepared:
    """Raises ValueError for adapters, which Megatron-Core does not bring."""
    from megatron.core.activations import squared_relu
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.transformer_config import TransformerConfig

    if v.loras:
        raise ValueError("Megatron-Core has no adapters: compare frozen or fully trained matrices")
    _start_alone(v.x_TH.is_cuda)
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
        gradient_accumulation_fusion=False,
        perform_initialization=False,
        params_dtype=v.x_TH.dtype,
        use_cpu_initialization=not v.x_TH.is_cuda,
    )
    layers = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    experts = SequentialMLP(num_experts, config, layers, groups)
    ops = backend("triton") if v.x_TH.is_cuda else eager
    plan = ops.route_plan(v.idx_TK, num_experts)
    for expert in experts.local_experts:  # the problem's own matrices take their place, so that gradients reach them
        del expert.linear_fc1.weight, expert.linear_fc2.weight

    def run() -> Tensor:
        for expert, W1, W2 in zip(experts.local_experts, v.W1_EFH.unbind(), v.W2_EHF.unbind(), strict=True):
            expert.linear_fc1.weight, expert.linear_fc2.weight = W1, W2
        rows, p_M = ops.permute(v.x_TH, v.p_TK, plan)
        out, _ = experts(rows, plan.counts_E, p_M)
        return ops.unpermute(out, plan)

    return run


def _start_alone(on_gpu: bool) -> None:
    """Megatron's groups and generators for one rank, where the process has none."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
