"""From an architecture and a seed to Megatron's `HybridModel`, in a process that is ready to run it.

Three steps, each in its own function so that a warm parent can do the slow one once: `prepare` imports (seconds),
`start` joins the process group (milliseconds for one process), `build_model` makes the weights. A parent that has
prepared may fork: the child then calls `start`. Fork before any process group exists and before torch has run anything
on several threads; gloo's and OpenMP's threads do not survive a fork, and a child would wait for them forever.
"""

import os
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_evolve.kernels.backend import AUTO, resolved
from megatron_evolve.substrate import operations
from megatron_evolve.substrate.layout import Layout
from megatron_evolve.substrate.model.architecture import Architecture
from megatron_evolve.substrate.ranks import place_in

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.transformer_config import TransformerConfig

ALONE = Layout()
# What `recompute` of a training run means in Megatron's words: nothing, expert layers, or every layer from its input.
# Norms could be computed again with Transformer Engine's alone (see `layer_spec.RecomputableStack`).
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@dataclass(frozen=True)
class Runtime:
    """Where this process stands after `start`."""

    rank: int
    world_size: int
    device: str  # "cpu" or "cuda"


def prepare() -> None:
    """Import torch and Megatron and supply what this machine lacks. Idempotent; 2.4 s once; starts no thread."""
    from megatron_evolve.substrate.model import cpu, mamba_ssm

    for name in operations.unfit(operations.machine(gpu=False)):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # an import of it now fails, and Megatron goes on
    with warnings.catch_warnings():
        # Each of a dozen modules says that Transformer Engine and Apex are absent; `doctor` says it once and in full.
        warnings.simplefilter("ignore", UserWarning)
        cpu.install()
        mamba_ssm.supply()
        from megatron.core.models.hybrid import hybrid_model  # noqa: F401

        from megatron_evolve.substrate.model import layer_spec  # noqa: F401


def start(seed: int, layout: Layout = ALONE, *, backend: str | None = None) -> Runtime:
    """Join the process group, lay out parallelism and seed every generator.

    Under torchrun or srun the group comes from the environment (see `substrate.ranks`). Alone, the store is in memory
    and no network port is opened. `backend` is nccl on a GPU, and on a CPU gloo among several and `alone` alone, unless
    named. Raises RuntimeError if called twice in one process, ValueError if the layout does not fit the ranks.
    """
    prepare()
    import torch
    from megatron.core import parallel_state

    from megatron_evolve.substrate.model import alone

    if torch.distributed.is_initialized():
        raise RuntimeError(
            "start() must be called once in a process; a process group exists already: call stop() first"
        )
    place = place_in(os.environ)
    layout.data_parallel(place.world_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = backend or ("nccl" if device == "cuda" else alone.NAME if place.alone else "gloo")
    if device == "cuda":
        torch.cuda.set_device(place.local_rank)
    if place.alone:
        alone.register()
        meeting: dict[str, Any] = {"store": torch.distributed.HashStore()}
    else:
        meeting = {"init_method": place.meet}
    torch.distributed.init_process_group(backend, rank=place.rank, world_size=place.world_size, **meeting)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,
    )
    seed_generators(seed)
    return Runtime(place.rank, place.world_size, device)


def running_layout() -> Layout:
    """The layout that `start` laid out in this process."""
    from megatron.core import parallel_state as ps

    return Layout(
        tp=ps.get_tensor_model_parallel_world_size(),
        pp=ps.get_pipeline_model_parallel_world_size(),
        vp=ps.get_virtual_pipeline_model_parallel_world_size() or 1,
        ep=ps.get_expert_model_parallel_world_size(),
        etp=ps.get_expert_tensor_parallel_world_size(),
        cp=ps.get_context_parallel_world_size(),
    )


def stop() -> None:
    """Leave the process group, so that `start` may be called again: for tests and workers that serve several jobs."""
    import torch
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def seed_generators(seed: int) -> None:
    """Seed torch and Megatron's tracked generators (data-, tensor- and expert-parallel) from one number."""
    import torch
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def transformer_config(architecture: Architecture, **fields: Any) -> "TransformerConfig":
    """Megatron's configuration of this architecture in float32. `fields` are added or replace, by Megatron's names.

    Parallel sizes are those of `start`. Fusions that need Transformer Engine, Apex or a GPU are off.
    """
    import torch
    from megatron.core.activations import squared_relu
    from megatron.core.transformer.transformer_config import TransformerConfig

    running = running_layout()
    kind = {
        "is_hybrid_model": True,
        "normalization": "RMSNorm",
        "activation_func": squared_relu,
        "gated_linear_unit": False,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
    }
    unfused = {
        "moe_grouped_gemm": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
        "cuda_graph_modules": [],
    }
    layout = {
        "tensor_model_parallel_size": running.tp,
        "pipeline_model_parallel_size": running.pp,
        "virtual_pipeline_model_parallel_size": running.vp if running.vp > 1 else None,
        "context_parallel_size": running.cp,
        "expert_model_parallel_size": running.ep,
        "expert_tensor_parallel_size": running.etp,
        "sequence_parallel": running.tp > 1,  # Megatron trains experts with tensor parallelism only so
        "variable_seq_lengths": running.pp > 1,  # micro-batches are as wide as their own longest row
        "pipeline_dtype": fields.get("params_dtype", torch.float32),
        "params_dtype": torch.float32,
        "bf16": fields.get("params_dtype") == torch.bfloat16,
        "use_cpu_initialization": not torch.cuda.is_available(),
    }
    return TransformerConfig(**{**_shapes(architecture), **kind, **unfused, **layout, **fields})


def _shapes(a: Architecture) -> dict[str, Any]:
    return {
        "num_layers": len(a.pattern),
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.expert_ffn_size,
        "num_attention_heads": a.num_attention_heads,
        "num_query_groups": a.num_query_groups,
        "kv_channels": a.head_dim,
        "mamba_num_heads": a.mamba_num_heads,
        "mamba_head_dim": a.mamba_head_dim,
        "mamba_state_dim": a.mamba_state_dim,
        "mamba_num_groups": a.mamba_num_groups,
        "num_moe_experts": a.num_experts,
        "moe_router_topk": a.top_k,
        "moe_ffn_hidden_size": a.expert_ffn_size,
        "moe_latent_size": a.latent_size,
        "moe_shared_expert_intermediate_size": a.shared_ffn_size,
        "moe_router_topk_scaling_factor": a.topk_scaling_factor,
        "mtp_num_layers": a.mtp_depths or None,
        "mtp_use_repeated_layer": True,  # one head for every depth
        "mtp_loss_scaling_factor": 0.3,  # Nemotron 3 Super report; divided among the depths
        "layernorm_epsilon": a.norm_eps,
        "init_method_std": a.init_std,
    }


def build_model(architecture: Architecture, *, seed: int, **fields: Any) -> "HybridModel":
    """`build_chunks` where this rank holds one chunk, as it does without virtual pipeline stages."""
    (chunk,) = build_chunks(architecture, seed=seed, **fields)
    return chunk


def build_chunks(
    architecture: Architecture, *, seed: int, experts: str = AUTO, layers: str = AUTO, **fields: Any
) -> "list[HybridModel]":
    """This rank's part of a new `HybridModel`, one chunk per virtual pipeline stage, in order of the layers.

    Same architecture, layout and seed, same bits. `experts` names the backend of the maths (`kernels.backend`): of the
    routed experts, and with them of router, gated norm and loss; `layers` the norms and dense linear layers
    (`operations.LAYERS`). `fields` are added to the configuration or replace, by Megatron's names (see
    `transformer_config`). The layers are cut as `Layout.stages` says; raises ValueError if they cannot be, or for
    layers that cannot be had.
    """
    from megatron.core import parallel_state

    from megatron_evolve.substrate.model.head import LossModel
    from megatron_evolve.substrate.model.layer_spec import hybrid_stack_spec

    layout, form = running_layout(), resolved(experts)
    stages = layout.stages(architecture.pattern)
    seed_generators(seed)
    chunks = []
    for number in range(layout.vp):
        virtual = number if layout.vp > 1 else None
        where = {"ignore_virtual": False, "vp_stage": virtual}
        chunk = LossModel(
            form=form,
            config=transformer_config(architecture, **fields),
            hybrid_stack_spec=hybrid_stack_spec(architecture, form, layers),
            vocab_size=architecture.vocab_size,
            max_sequence_length=architecture.max_sequence_length,
            hybrid_layer_pattern="|".join(stages) + f"/{architecture.mtp_pattern}" * architecture.mtp_depths,
            pre_process=parallel_state.is_pipeline_first_stage(**where),
            post_process=parallel_state.is_pipeline_last_stage(**where),
            share_embeddings_and_output_weights=False,
            position_embedding_type="none",
            vp_stage=virtual,
        )
        chunks.append(chunk)
    return chunks
