"""How one layer of each kind is put together, of Megatron's own modules.

`HybridModel` is Megatron's, unmodified; this file fills its spec. Import it after `build.prepare`, which readies the
process for the modules named here.
"""

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from megatron_evolve.kernels.backend import backend
from megatron_evolve.substrate import operations
from megatron_evolve.substrate.model import latent, mamba
from megatron_evolve.substrate.model.architecture import Architecture
from megatron_evolve.substrate.model.attention import CausalAttention
from megatron_evolve.substrate.model.convolution import FLA, fla_causal_conv
from megatron_evolve.substrate.model.experts import GroupedExperts
from megatron_evolve.substrate.model.layers import Layers, layers_of
from megatron_evolve.substrate.model.mamba_ssm import GatedRMSNorm, conv_and_scan
from megatron_evolve.substrate.model.packed import expect_packed
from megatron_evolve.substrate.model.router import FusedRouter


class ClampedMambaMixer(MambaMixer):
    """MambaMixer that also passes on `dt_min` and the norm's epsilon, which Megatron leaves at 0 and 1e-5.

    With `form` "triton", gate and norm after the PyTorch scan are one kernel, and `convolution` may be another's.
    mamba-ssm's scan applies the gate itself, and under context parallelism heads are dealt out anew between gate and
    norm: there they stay two.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, dt_clamp: float, form: str, convolution: str, **kwargs: Any
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self.convolution = convolution
        self.dt_limit = (dt_clamp, float("inf"))
        self.norm.eps = config.layernorm_epsilon
        if form == "triton" and isinstance(self.norm, GatedRMSNorm) and config.context_parallel_size == 1:
            self.norm.fused = backend(form).gated_rms_norm

    def _ssm_training(self, zxBCdt: Tensor, packed_seq_params: PackedSeqParams | None = None) -> Tensor:
        """Projected input (L, B, z+x+B+C+dt) to normed output (L, B, inner), both of this rank."""
        packed = expect_packed(packed_seq_params, *zxBCdt.shape[:2])
        weights = (
            self.cp.get_conv1d_weight().squeeze(1),
            self.cp.get_conv1d_bias(),
            self.cp.get_dt_bias().float(),
            -torch.exp(self.cp.get_A_log().float()),
            self.cp.get_D(),
        )
        shapes = {
            "chunk_size": self.chunk_size,
            "dt_limit": self.dt_limit,
            "headdim": self.headdim,
            "ngroups": self.cp.ngroups_local_tpcp,
        }
        if getattr(self.norm, "fused", None) is not None:
            sequence_LB = None if packed is None else packed.seq_idx.t()
            conv = partial(mamba.causal_conv, sequence_LB=sequence_LB)
            if self.convolution == FLA:
                conv = partial(fla_causal_conv, packed=packed)
            return self.norm(*conv_and_scan(zxBCdt, *weights, conv=conv, sequence_LB=sequence_LB, **shapes))
        y = mamba_mixer.mamba_split_conv1d_scan_combined(
            zxBCdt.transpose(0, 1),
            *weights,
            seq_idx=None if packed is None else packed.seq_idx,
            activation=self.activation,
            norm_before_gate=self.norm_before_gate,
            **shapes,
        )
        return self.norm(self.cp.post_conv_ssm(y.transpose(0, 1), packed_seq_params))


class RecomputableStack(HybridStack):
    """HybridStack whose layers keep their gradients under activation recompute when what lies before them is frozen.

    Megatron's checkpoint gives no gradient to a layer none of whose inputs asks for one, its parameters
    notwithstanding: adapters over a frozen embedding would silently not be trained.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        if config.recompute_granularity == "selective" and "layernorm" in config.recompute_modules and not HAVE_TE:
            # Megatron 0.19 asks Transformer Engine for its fp8 state there, fp8 or not, and fails with a NameError
            raise ValueError(
                f"recompute_modules may name core_attn, moe and shared_experts without Transformer Engine; "
                f"got {config.recompute_modules}: leave layernorm out"
            )
        super().__init__(config, *args, **kwargs)

    def forward(self, hidden_states: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """As the base class: (L, B, D) to (L, B, D); None where a pipeline stage was given its input before."""
        if self.config.recompute_granularity and torch.is_tensor(hidden_states) and torch.is_grad_enabled():
            hidden_states = hidden_states if hidden_states.requires_grad else hidden_states.detach().requires_grad_()
        return super().forward(hidden_states, *args, **kwargs)


def hybrid_stack_spec(architecture: Architecture, form: str, asked: str = "auto") -> ModuleSpec:
    """The spec that `HybridModel` builds its layers from.

    `form` is the backend of the maths (`kernels.backend`); norms and linears are those `asked` for (`layers_of`).
    """
    layers = layers_of(asked)
    # Megatron names its final norm and latent projections itself, outside the spec, and means Transformer Engine's.
    hybrid_block.TENorm = layers.norm
    latent.install()
    attends = "*" in architecture.pattern + architecture.mtp_pattern
    return ModuleSpec(
        module=RecomputableStack,
        submodules=HybridStackSubmodules(
            mamba_layer=_mamba_layer(architecture, form, layers),
            **({"attention_layer": _attention_layer(layers)} if attends else {}),
            moe_layer=_moe_layer(form, layers),
            mtp_block_spec=_prediction_heads(layers),
        ),
    )


def _mamba_layer(architecture: Architecture, form: str, layers: Layers) -> ModuleSpec:
    mixer = ModuleSpec(
        module=ClampedMambaMixer,
        params={
            "dt_clamp": architecture.dt_min,
            "form": form,
            "convolution": operations.convolution(operations.machine(torch.cuda.is_available())).path,
            "d_conv": architecture.mamba_conv_kernel,
            "chunk_size": architecture.mamba_chunk_size,
        },
        submodules=MambaMixerSubmodules(in_proj=layers.column, out_proj=layers.row),
    )
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(norm=layers.norm, mixer=mixer, mamba_bda=get_bias_dropout_add),
    )


def core_attention(context_parallel: int) -> type[torch.nn.Module]:
    """Torch's, or for a sequence split over ranks Transformer Engine's. Raises ValueError where that cannot be had."""
    if context_parallel == 1:
        return CausalAttention
    choice = operations.context_parallel(operations.machine(torch.cuda.is_available()))
    if not choice.serves:
        raise ValueError(f"cp={context_parallel} needs Transformer Engine's attention, and {choice.why}: set cp=1")
    if not HAVE_TE:  # Megatron then puts a mock in its place, which would be built without a word
        raise ValueError(f"cp={context_parallel}: {choice.why}, but Megatron could not import it: mend it or set cp=1")
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention


def _attention_layer(layers: Layers) -> ModuleSpec:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=layers.column,
            core_attention=core_attention(parallel_state.get_context_parallel_world_size()),
            linear_proj=layers.row,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=layers.norm, self_attention=attention, self_attn_bda=get_bias_dropout_add
        ),
    )


def _moe_layer(form: str, layers: Layers) -> ModuleSpec:
    shared = MLPSubmodules(linear_fc1=layers.column, linear_fc2=layers.row)
    experts = MoESubmodules(
        experts=partial(GroupedExperts, backend=form),
        shared_experts=partial(SharedExpertMLP, submodules=shared),
        router=FusedRouter if form == "triton" else TopKRouter,  # fused with the experts, or not
    )
    return ModuleSpec(
        module=MoETransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=layers.norm, mlp=partial(MoELayer, submodules=experts), mlp_bda=get_bias_dropout_add
        ),
    )


def _prediction_heads(layers: Layers) -> ModuleSpec:
    """Multi-token prediction, built only where the pattern has it; its layers come from the stack's own specs."""
    head = MultiTokenPredictionLayerSubmodules(
        enorm=layers.norm, hnorm=layers.norm, eh_proj=layers.column, mtp_model_layer=None, layer_norm=layers.norm
    )
    return ModuleSpec(
        module=MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(
            layer_specs=[ModuleSpec(module=MultiTokenPredictionLayer, submodules=head)]
        ),
    )
