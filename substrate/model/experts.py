"""The routed experts of one layer as one Megatron module: grouped squared-ReLU matrices over rows sorted by expert.

It takes the place of Megatron's `SequentialMLP` or `TEGroupedMLP` in `MoESubmodules(experts=GroupedExperts)`: same
arguments, same result, parameters under the names of `TEGroupedMLP` (`linear_fc1.weight0`, ...), and distributed
checkpoints that both of Megatron's classes can read and write. The maths is `kernels.reference`, in a faster form.

Import it after `build.prepare`: it needs Megatron.
"""

from collections.abc import Callable

import torch
from megatron.core.activations import squared_relu
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch import Tensor

from megatron_evolve.kernels.backend import AUTO, resolved
from megatron_evolve.kernels.backend import backend as named_backend
from megatron_evolve.kernels.reference import GroupedLora


class _AddedToMainGrad(torch.autograd.Function):
    """The matrices unchanged; backward marks their gradients as standing in `main_grad` already.

    Megatron's wrapper learns from autograd that a parameter is done, and with overlap_grad_reduce it insists on a
    gradient, which it then drops unread. So each gets one, of memory that nobody fills and all share.
    """

    @staticmethod
    def forward(ctx, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.weights = weights
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx, *_: None) -> tuple[Tensor, ...]:
        for weight in ctx.weights:
            weight.grad_added_to_main_grad = True
        unread = torch.empty_like(ctx.weights[0])
        # one tensor object each: autograd takes what nobody else holds, and would copy the same one E times
        return tuple(unread.detach() for _ in ctx.weights)


class ExpertWeights(torch.nn.Module):
    """One matrix per local expert, `weight0`, `weight1`, ..., each (rows, columns), and room for one adapter over all.

    `partition_dim` is the axis that expert tensor parallelism has split: 0 for fc1, 1 for fc2.
    """

    def __init__(
        self,
        num_local_experts: int,
        rows: int,
        columns: int,
        *,
        partition_dim: int,
        config: TransformerConfig,
        init_method: Callable[[Tensor], None],
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__()
        self.num_local_experts = num_local_experts
        self.partition_dim = partition_dim
        self.pg_collection = pg_collection
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        # One allocation, so that a GPU's copy engine can fetch blocks of any expert (`kernels.matrices`). Data
        # parallelism moves what is trained into its own buffer, where they are evenly spaced too.
        stack = torch.empty(num_local_experts, rows, columns, device=device, dtype=config.params_dtype)
        for e in range(num_local_experts):
            weight = torch.nn.Parameter(stack[e])
            set_tensor_model_parallel_attributes(weight, True, partition_dim, 1)
            # Reduced over the expert data-parallel group also where that is the dense one: so experts have an optimizer
            # of their own in every layout, and its state moves between all of them.
            weight.allreduce = False
            if config.perform_initialization:
                # the expert generator is seeded by expert-parallel rank: ranks hold different experts
                with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                    init_method(weight)
            self.register_parameter(f"weight{e}", weight)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.lora_scale = 1.0

    def forward(self) -> tuple[list[Tensor], GroupedLora | None]:
        """The E local matrices and the adapter over them, for a product to be taken now.

        Whoever multiplies with them gets them by this call: with overlap_param_gather Megatron's data-parallel wrapper
        waits for a module's parameters before its forward, and as attributes they may still be those of a step ago.
        """
        return self.weights, self.lora

    @property
    def weights(self) -> list[Tensor]:
        """The E local matrices."""
        return [getattr(self, f"weight{e}") for e in range(self.num_local_experts)]

    @property
    def main_grads(self) -> list[Tensor] | None:
        """Megatron's buffers of the matrices' gradients, if its data-parallel wrapper gave each one, in float32."""
        found = [w.main_grad for w in self.weights if hasattr(w, "grad_added_to_main_grad") and hasattr(w, "main_grad")]
        ready = len(found) == self.num_local_experts and all(buffer.dtype == torch.float32 for buffer in found)
        return found if ready else None

    @property
    def lora(self) -> GroupedLora | None:
        """The adapter over all local experts, if one was added."""
        return None if self.lora_A is None else GroupedLora(self.lora_A, self.lora_B, self.lora_scale)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Each local expert as a slice of one global tensor `{prefix}weight` with the expert as its first axis."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        if metadata.get("singleton_local_shards"):
            raise ValueError("experts are saved as slices of one tensor; got singleton_local_shards=True: leave it out")
        groups = self.pg_collection
        first, total = groups.ep.rank() * self.num_local_experts, groups.ep.size() * self.num_local_experts
        axis = len(sharded_offsets)
        sharded = {}
        for e, weight in enumerate(self.weights):
            entry = make_sharded_tensors_for_checkpoint(
                {"weight": weight},
                prefix,
                {"weight": self.partition_dim},
                (*sharded_offsets, (axis, first + e, total)),
                tp_group=groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )[f"{prefix}weight"]
            entry.replica_id = (*entry.replica_id[:2], groups.expt_dp.rank())
            sharded[f"{prefix}weight{e}"] = entry
        for name, adapter in (("lora_A", self.lora_A), ("lora_B", self.lora_B)):
            if adapter is not None:
                sharded[f"{prefix}{name}"] = ShardedTensor.from_rank_offsets(
                    f"{prefix}{name}",
                    adapter,
                    *sharded_offsets,
                    (axis, groups.ep.rank(), groups.ep.size()),
                    replica_id=(0, groups.expt_tp.rank(), groups.expt_dp.rank()),
                    prepend_axis_num=axis,
                )
        return sharded


class GroupedExperts(MegatronModule):
    """All local experts of one layer; an `ExpertsBuilder` and `ExpertsInterface` of Megatron's moe_layer.py.

    `backend` names the form of the maths (`kernels.backend`): "auto", "eager", "triton" on a GPU, or "reference" to
    hold a suspect result against the definition; the attribute says which was taken. Raises ValueError for a backend
    that cannot run here, or a configuration whose experts would compute something else.

    Inside Megatron's data-parallel wrapper with float32 gradients the triton backend adds weight gradients into
    `main_grad` itself, unrounded. gradient_accumulation_fusion asks the same of Megatron's linear layers, which need
    Apex or Transformer Engine for it; nothing is needed here, so the buffers alone decide.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
        backend: str = AUTO,
    ) -> None:
        super().__init__(config=config)
        _check(config)
        self.backend = resolved(backend)
        self.compute = named_backend(self.backend).grouped_experts
        width = config.moe_latent_size or config.hidden_size
        hidden = divide(config.moe_ffn_hidden_size, pg_collection.expt_tp.size())
        common = {"config": config, "pg_collection": pg_collection}
        self.linear_fc1 = ExpertWeights(
            num_local_experts, hidden, width, partition_dim=0, init_method=config.init_method, **common
        )
        self.linear_fc2 = ExpertWeights(
            num_local_experts, width, hidden, partition_dim=1, init_method=config.output_layer_init_method, **common
        )

    def forward(
        self, dispatched_input: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Rows (M, H) sorted by local expert, rows per expert (E,), probability of each row (M,): (M, H), no bias.

        With expert tensor parallelism the result is this rank's partial sum, which Megatron's dispatcher adds up.
        """
        fc1, fc2 = self.linear_fc1, self.linear_fc2
        (W1, lora1), (W2, lora2), buffers = fc1(), fc2(), {}
        if self.backend == "triton" and fc1.main_grads is not None and fc2.main_grads is not None:
            W1, W2 = _AddedToMainGrad.apply(*W1), _AddedToMainGrad.apply(*W2)
            buffers = {"main_grads": (fc1.main_grads, fc2.main_grads)}
        output = self.compute(dispatched_input, tokens_per_expert, permuted_probs, W1, W2, lora1, lora2, **buffers)
        return output, None

    def backward_dw(self) -> None:
        """Weight gradients are never delayed here: nothing is left to do."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Keys of the module, tensors under `{prefix}experts.linear_fc1.weight` as in Megatron's expert classes."""
        sharded = {}
        for name, weights in (("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2)):
            entries = weights.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata)
            for entry in entries.values():
                entry.key = f"{prefix}experts.{entry.key.removeprefix(prefix)}"
            sharded.update(entries)
        return sharded


def _check(config: TransformerConfig) -> None:
    wanted = {
        "activation_func": squared_relu,
        "gated_linear_unit": False,
        "add_bias_linear": False,
        "moe_apply_probs_on_input": False,
        "fp8": None,
        "fp4": None,
    }
    for field, value in wanted.items():
        if getattr(config, field) != value:
            raise ValueError(
                f"grouped experts need {field}={getattr(value, '__name__', value)}; "
                f"got {getattr(config, field)}: change the configuration or use Megatron's TEGroupedMLP"
            )
