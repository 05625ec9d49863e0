"""The shapes of a Nemotron-3 hybrid: one frozen value from which every other form of the model is made.

Pattern letters are Megatron's: M Mamba-2, E mixture of experts, * attention. Attention has no position embedding,
linear layers have no bias, experts compute relu(x)^2, routing is a sigmoid with a bias that chooses but does not weigh
(Nemotron 3 report; Megatron-LM `examples/post_training/modelopt/conf/nvidia`). Imports without torch.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

VOCAB_MULTIPLE = 16  # embedding rows split evenly over up to 16 tensor-parallel ranks


class Architecture(BaseModel):
    """Every shape of the model. Two equal values describe exchangeable checkpoints.

    `vocab_size` is the padded one: `with_vocab` rounds a tokenizer's size up. `dt_min` clamps the Mamba step size from
    below *after* the softplus. Megatron-Core never clamps; transformers 5 clamps at `time_step_min` = 1e-3 whatever
    `time_step_limit` says. Where every dt_bias is near -2 the two differ by 5e-4 in the logits; near -7 by more than 1.
    So it is one explicit number here: 0 is Megatron, 1e-3 is transformers, and an imported checkpoint keeps the one it
    was evaluated with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    dt_min: float = Field(
        default=0.0, ge=0, description="lower clamp of the Mamba step: 0 Megatron, 1e-3 transformers 5"
    )

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
        """Trainable parameters of the whole model, the routing bias (a buffer) not counted."""
        per_layer = {"M": self._mamba_parameters(), "*": self._attention_parameters(), "E": self._expert_parameters()}
        layers = sum(per_layer[letter] + self.hidden_size for letter in self.pattern)  # + one norm per layer
        return layers + 2 * self.vocab_size * self.hidden_size + self.hidden_size

    def _mamba_parameters(self) -> int:
        projections = (sum(self.mamba_projection_parts) + self.mamba_inner_size) * self.hidden_size
        per_head = 3 * self.mamba_num_heads  # A_log, D, dt_bias
        return projections + self.mamba_conv_size * (self.mamba_conv_kernel + 1) + per_head + self.mamba_inner_size

    def _attention_parameters(self) -> int:
        heads = 2 * self.num_attention_heads + 2 * self.num_query_groups
        return heads * self.head_dim * self.hidden_size

    def _expert_parameters(self) -> int:
        widths = self.num_experts * self.expert_ffn_size + self.shared_ffn_size
        return self.num_experts * self.hidden_size + 2 * widths * self.hidden_size


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

PRESETS: Mapping[str, Architecture] = MappingProxyType({NANO_CPU.name: NANO_CPU})
