"""The shapes of a Nemotron-3 hybrid: one frozen value from which every other form of the model is made.

Pattern letters are Megatron's: M Mamba-2, E mixture of experts, * attention. Attention has no position embedding,
linear layers have no bias, experts compute relu(x)^2, routing is a sigmoid with a bias that chooses but does not weigh
(Nemotron 3 report; Megatron-LM `examples/post_training/modelopt/conf/nvidia`). Imports without torch.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from megatron_evolve.substrate.frozen import nearest

VOCAB_MULTIPLE = 16  # embedding rows split evenly over up to 16 tensor-parallel ranks


class Architecture(BaseModel):
    """Every shape of the model. Two equal values describe exchangeable checkpoints.

    `vocab_size` is the padded one: `with_vocab` rounds a tokenizer's size up.

    `dt_min` clamps the Mamba step size from below *after* the softplus. It is 0 for the published checkpoints:
    Megatron-Core, which trained them, never clamps, nor does vLLM, and the hub's own code clamps at `time_step_limit`,
    which is (0, inf). transformers 5 alone takes `time_step_min` for it, 1e-3, from which new steps are drawn: of the
    published Nano that moves the output by a mean KL of 0.034 in place of 0.003 (huggingface/transformers#48989). Where
    every dt_bias is near -2 the two differ by 5e-4 in a small model's logits; near -7 by more than 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(min_length=1, description="a name for people; nothing is looked up by it")
    pattern: str = Field(pattern=r"^[ME*]+$", description="one letter per layer: M Mamba-2, E experts, * attention")
    hidden_size: PositiveInt = Field(description="width of the residual stream")
    vocab_size: PositiveInt = Field(multiple_of=VOCAB_MULTIPLE, description="tokens, padded to a multiple of 16")
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt = Field(description="key/value heads")
    head_dim: PositiveInt
    mamba_num_heads: PositiveInt
    mamba_head_dim: PositiveInt
    mamba_state_dim: PositiveInt
    mamba_num_groups: PositiveInt = Field(description="groups that share B and C")
    mamba_conv_kernel: PositiveInt = Field(default=4, ge=2, description="taps of the causal convolution")
    mamba_chunk_size: PositiveInt = Field(
        description="tokens per quadratic block of the scan; changes speed, not the result"
    )
    num_experts: PositiveInt
    top_k: int = Field(ge=2, description="experts per token; Megatron normalises their weights only from 2 on")
    expert_ffn_size: PositiveInt
    shared_ffn_size: PositiveInt = Field(description="width of the expert that sees every token")
    topk_scaling_factor: PositiveFloat = Field(description="factor on the normalised expert weights")
    latent_size: PositiveInt | None = Field(
        default=None, description="width in which routed experts work (latent MoE); none: the residual stream's"
    )
    mtp_pattern: str = Field(
        default="", pattern=r"^[ME*]*$", description="layers of one multi-token prediction head; empty: no such head"
    )
    mtp_depths: int = Field(default=0, ge=0, description="tokens further ahead that are predicted, by one shared head")
    norm_eps: PositiveFloat = 1e-5
    init_std: PositiveFloat
    max_sequence_length: PositiveInt = Field(description="longest sequence the model is asked for, in tokens")
    dt_min: float = Field(default=0.0, ge=0, description="lower clamp of the Mamba step; 0: none, as Megatron trains")

    @model_validator(mode="after")
    def _shapes_divide(self) -> Self:
        for whole, part in (
            ("num_attention_heads", "num_query_groups"),
            ("mamba_num_heads", "mamba_num_groups"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} must be a multiple of {part}; got {getattr(self, whole)} and {getattr(self, part)}: "
                    f"change one of them"
                )
        if bool(self.mtp_pattern) != bool(self.mtp_depths):
            raise ValueError(
                f"mtp_pattern and mtp_depths go together; got {self.mtp_pattern!r} and {self.mtp_depths}: "
                f"give both or neither"
            )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k must be at most num_experts ({self.num_experts}); got {self.top_k}: lower top_k or add experts"
            )
        return self

    @property
    def mamba_inner_size(self) -> int:
        """Channels of the Mamba mixer: heads x head dimension."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_conv_size(self) -> int:
        """Channels that pass the causal convolution: x, B and C."""
        return self.mamba_inner_size + 2 * self.mamba_num_groups * self.mamba_state_dim

    @property
    def mamba_projection_parts(self) -> tuple[int, int, int, int, int]:
        """Row counts of the input projection, in its order z, x, B, C, dt."""
        state = self.mamba_num_groups * self.mamba_state_dim
        return self.mamba_inner_size, self.mamba_inner_size, state, state, self.mamba_num_heads

    def with_vocab(self, num_tokens: int) -> "Architecture":
        """This architecture for a tokenizer of `num_tokens`, rounded up to a multiple of 16."""
        padded = -(-num_tokens // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        return type(self).model_validate(self.model_dump() | {"vocab_size": padded})

    def num_parameters(self) -> int:
        """Trainable parameters of the whole model: both embedding tables, without the routing bias (a buffer).

        Multi-token prediction heads are apart (`num_mtp_parameters`): they are left out at inference.
        """
        layers = sum(self.layer_parameters(letter) for letter in self.pattern)
        return layers + 2 * self.vocab_size * self.hidden_size + self.hidden_size

    def num_active_parameters(self) -> int:
        """Parameters that stand in one token's way: `num_parameters` with `top_k` of the routed experts.

        Both embedding tables count whole, the input table too, of which a token reads one row (as in "A3B").
        """
        idle = (self.num_experts - self.top_k) * self.routed_expert_parameters()
        return self.num_parameters() - self.pattern.count("E") * idle

    def num_mtp_parameters(self) -> int:
        """Parameters of the one head that every depth of multi-token prediction shares; 0 where there is none.

        Its layers, three norms, and the projection of (hidden state, next embedding) to the hidden size. It reads the
        model's own embedding tables.
        """
        if not self.mtp_depths:
            return 0
        layers = sum(self.layer_parameters(letter) for letter in self.mtp_pattern)
        return layers + 2 * self.hidden_size**2 + 3 * self.hidden_size

    def layer_parameters(self, letter: str) -> int:
        """Parameters of one layer of this kind with its norm."""
        per_layer = {"M": self._mamba_parameters, "*": self._attention_parameters, "E": self._expert_parameters}
        return per_layer[letter]() + self.hidden_size

    def routed_expert_parameters(self) -> int:
        """Parameters of one routed expert: two matrices, at latent width where there is one."""
        return 2 * self.expert_ffn_size * (self.latent_size or self.hidden_size)

    def _mamba_parameters(self) -> int:
        projections = (sum(self.mamba_projection_parts) + self.mamba_inner_size) * self.hidden_size
        per_head = 3 * self.mamba_num_heads  # A_log, D, dt_bias
        return projections + self.mamba_conv_size * (self.mamba_conv_kernel + 1) + per_head + self.mamba_inner_size

    def _attention_parameters(self) -> int:
        heads = 2 * self.num_attention_heads + 2 * self.num_query_groups
        return heads * self.head_dim * self.hidden_size

    def _expert_parameters(self) -> int:
        # router and shared expert see the hidden width; latent experts share two projections, down to it and back up
        every_token = self.num_experts + 2 * self.shared_ffn_size + 2 * (self.latent_size or 0)
        return every_token * self.hidden_size + self.num_experts * self.routed_expert_parameters()


NANO_CPU = Architecture(
    name="nano-cpu",
    pattern="M*EM*E",
    hidden_size=64,
    vocab_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    mamba_num_heads=8,
    mamba_head_dim=16,
    mamba_state_dim=16,
    mamba_num_groups=2,
    mamba_chunk_size=64,
    num_experts=4,
    top_k=2,
    expert_ffn_size=128,
    shared_ffn_size=128,
    topk_scaling_factor=2.5,
    init_std=0.02,
    max_sequence_length=128,
)

# The published sizes: Megatron-LM's `examples/post_training/modelopt/conf/nvidia/NVIDIA-Nemotron-3-*-BF16.sh` and the
# config.json beside the weights. `dt_min` stays at Megatron's 0, with which they were trained.
NEMOTRON3_NANO = Architecture(
    name="nemotron3-nano",
    pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    hidden_size=2688,
    vocab_size=131072,
    num_attention_heads=32,
    num_query_groups=2,
    head_dim=128,
    mamba_num_heads=64,
    mamba_head_dim=64,
    mamba_state_dim=128,
    mamba_num_groups=8,
    mamba_chunk_size=128,
    num_experts=128,
    top_k=6,
    expert_ffn_size=1856,
    shared_ffn_size=3712,
    topk_scaling_factor=2.5,
    init_std=0.0173,
    max_sequence_length=262144,
)
NEMOTRON3_SUPER = Architecture(
    name="nemotron3-super",
    pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    hidden_size=4096,
    vocab_size=131072,
    num_attention_heads=32,
    num_query_groups=2,
    head_dim=128,
    mamba_num_heads=128,
    mamba_head_dim=64,
    mamba_state_dim=128,
    mamba_num_groups=8,
    mamba_chunk_size=128,
    num_experts=512,
    top_k=22,
    expert_ffn_size=2688,
    shared_ffn_size=5376,
    latent_size=1024,
    topk_scaling_factor=5.0,
    mtp_pattern="*E",
    mtp_depths=2,
    init_std=0.014,
    max_sequence_length=262144,
)
NEMOTRON3_ULTRA = Architecture(
    name="nemotron3-ultra",
    pattern=(
        "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
    ),
    hidden_size=8192,
    vocab_size=131072,
    num_attention_heads=64,
    num_query_groups=2,
    head_dim=128,
    mamba_num_heads=256,
    mamba_head_dim=64,
    mamba_state_dim=128,
    mamba_num_groups=8,
    mamba_chunk_size=128,
    num_experts=512,
    top_k=22,
    expert_ffn_size=5120,
    shared_ffn_size=10240,
    latent_size=2048,
    topk_scaling_factor=5.0,
    mtp_pattern="*E",
    mtp_depths=2,
    init_std=0.0099,
    max_sequence_length=262144,
)

PRESETS: Mapping[str, Architecture] = MappingProxyType(
    {one.name: one for one in (NANO_CPU, NEMOTRON3_NANO, NEMOTRON3_SUPER, NEMOTRON3_ULTRA)}
)


def architecture(name: str) -> Architecture:
    """The preset of this name. Raises ValueError with the nearest names."""
    if name not in PRESETS:
        raise ValueError(f"no architecture {name!r}{nearest(name, list(PRESETS))}")
    return PRESETS[name]
