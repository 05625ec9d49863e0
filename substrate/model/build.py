"""From an architecture and a seed to Megatron's `HybridModel`, in a process that is ready to run it.

Three steps, each in its own function so that a warm parent can do the slow one once: `prepare` imports (seconds),
`start` joins the process group (milliseconds for one process), `build_model` makes the weights. A parent that has
prepared may fork: the child then calls `start`. Fork before any process group exists and before torch has run anything
on several threads; gloo's and OpenMP's threads do not survive a fork, and a child would wait for them forever.
"""

import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_evolve.substrate.model.architecture import Architecture

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class Runtime:
    """Where this process stands after `start`."""

    rank: int
    world_size: int
    device: str  # "cpu" or "cuda"


def prepare() -> None:
    """Import torch and Megatron and supply what this machine lacks. Idempotent; 2.4 s once; starts no thread."""
    from megatron_evolve.substrate.model import cpu, mamba_ssm

    with warnings.catch_warnings():
        # Each of a dozen modules says that Transformer Engine and Apex are absent; `doctor` says it once and in full.
        warnings.simplefilter("ignore", UserWarning)
        cpu.install()
        mamba_ssm.supply()
        from megatron.core.models.hybrid import hybrid_model  # noqa: F401

        from megatron_evolve.substrate.model import layer_spec  # noqa: F401


def start(seed: int, *, backend: str | None = None, **sizes: Any) -> Runtime:
    """Join the process group, lay out parallelism and seed every generator.

    Under torchrun the group comes from its environment. Alone, the store is in memory and no network port is opened.
    `sizes` are arguments of Megatron's `initialize_model_parallel`, such as `tensor_model_parallel_size=2`; all are 1
    otherwise. `backend` is nccl on a GPU, and on a CPU gloo under torchrun and `alone` without, unless named. Raises
    RuntimeError if called twice in one process.
    """
    prepare()
    import torch
    from megatron.core import parallel_state

    from megatron_evolve.substrate.model import alone

    if torch.distributed.is_initialized():
        raise RuntimeError(
            "start() must be called once in a process; a process group exists already: call stop() first"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    many = "WORLD_SIZE" in os.environ
    backend = backend or ("nccl" if device == "cuda" else "gloo" if many else alone.NAME)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if many:
        torch.distributed.init_process_group(backend)
    else:
        alone.register()
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(**{"create_gloo_process_groups": False, **sizes})
    seed_generators(seed)
    return Runtime(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


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
    from megatron.core import parallel_state
    from megatron.core.activations import squared_relu
    from megatron.core.transformer.transformer_config import TransformerConfig

    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
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
        "tensor_model_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
        "sequence_parallel": tensor_parallel > 1,  # Megatron trains experts with tensor parallelism only so
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
    """A new `HybridModel` of this rank: same architecture, layout and seed, same bits.

    `fields` are added to the configuration or replace, by Megatron's names (see `transformer_config`). In a pipeline
    the layers are cut into stages of equal length; raises ValueError if they cannot be.
    """
    from megatron.core import parallel_state
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from megatron_evolve.substrate.model.layer_spec import hybrid_stack_spec

    stages = parallel_state.get_pipeline_model_parallel_world_size()
    length, rest = divmod(len(architecture.pattern), stages)
    if rest:
        raise ValueError(
            f"{stages} pipeline stages need a multiple of {stages} layers; got {len(architecture.pattern)} "
            f"({architecture.pattern}): change the layout"
        )
    segments = [architecture.pattern[stage * length : (stage + 1) * length] for stage in range(stages)]
    seed_generators(seed)
    return HybridModel(
        config=transformer_config(architecture, **fields),
        hybrid_stack_spec=hybrid_stack_spec(architecture),
        vocab_size=architecture.vocab_size,
        max_sequence_length=architecture.max_sequence_length,
        hybrid_layer_pattern="|".join(segments) + f"/{architecture.mtp_pattern}" * architecture.mtp_depths,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="none",
    )
