"""The Nemotron-3 presets against the values that NVIDIA publishes, in the names under which it publishes them."""

import pytest

from megatron_evolve.substrate.model.architecture import NANO_CPU, PRESETS, Architecture, architecture

# Megatron-LM d98e8a6, examples/post_training/modelopt/conf/nvidia/NVIDIA-Nemotron-3-*-BF16.sh; the depths of
# multi-token prediction from its nemotron3_super functional test and, for Ultra, Megatron-Bridge's recipes.
MEGATRON = {
    "nemotron3-nano": {
        "hybrid-layer-pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "hidden-size": 2688,
        "num-attention-heads": 32,
        "num-query-groups": 2,
        "kv-channels": 128,
        "mamba-num-heads": 64,
        "mamba-head-dim": 64,
        "num-experts": 128,
        "moe-router-topk": 6,
        "ffn-hidden-size": 1856,
        "moe-shared-expert-intermediate-size": 3712,
        "moe-router-topk-scaling-factor": 2.5,
        "moe-latent-size": None,
        "mtp-num-layers": 0,
        "init-method-std": 0.0173,
    },
    "nemotron3-super": {
        "hybrid-layer-pattern": (
            "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
        ),
        "hidden-size": 4096,
        "num-attention-heads": 32,
        "num-query-groups": 2,
        "kv-channels": 128,
        "mamba-num-heads": 128,
        "mamba-head-dim": 64,
        "num-experts": 512,
        "moe-router-topk": 22,
        "ffn-hidden-size": 2688,
        "moe-shared-expert-intermediate-size": 5376,
        "moe-router-topk-scaling-factor": 5.0,
        "moe-latent-size": 1024,
        "mtp-num-layers": 2,
        "init-method-std": 0.014,
    },
    "nemotron3-ultra": {
        "hybrid-layer-pattern": (
            "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
        ),
        "hidden-size": 8192,
        "num-attention-heads": 64,
        "num-query-groups": 2,
        "kv-channels": 128,
        "mamba-num-heads": 256,
        "mamba-head-dim": 64,
        "num-experts": 512,
        "moe-router-topk": 22,
        "ffn-hidden-size": 5120,
        "moe-shared-expert-intermediate-size": 10240,
        "moe-router-topk-scaling-factor": 5.0,
        "moe-latent-size": 2048,
        "mtp-num-layers": 2,
        "init-method-std": 0.0099,
    },
}
# What the three config.json beside the weights say and Megatron's arguments do not, equal for all three sizes.
HUGGING_FACE = {
    "vocab_size": 131072,
    "max_position_embeddings": 262144,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "layer_norm_epsilon": 1e-5,
}
MTP = {"nemotron3-nano": "", "nemotron3-super": "*E", "nemotron3-ultra": "*E"}  # mtp_hybrid_override_pattern

FIELDS = {
    "hybrid-layer-pattern": "pattern",
    "hidden-size": "hidden_size",
    "num-attention-heads": "num_attention_heads",
    "num-query-groups": "num_query_groups",
    "kv-channels": "head_dim",
    "mamba-num-heads": "mamba_num_heads",
    "mamba-head-dim": "mamba_head_dim",
    "num-experts": "num_experts",
    "moe-router-topk": "top_k",
    "ffn-hidden-size": "expert_ffn_size",
    "moe-shared-expert-intermediate-size": "shared_ffn_size",
    "moe-router-topk-scaling-factor": "topk_scaling_factor",
    "moe-latent-size": "latent_size",
    "mtp-num-layers": "mtp_depths",
    "init-method-std": "init_std",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_sequence_length",
    "ssm_state_size": "mamba_state_dim",
    "n_groups": "mamba_num_groups",
    "conv_kernel": "mamba_conv_kernel",
    "chunk_size": "mamba_chunk_size",
    "layer_norm_epsilon": "norm_eps",
}


@pytest.mark.parametrize("name", MEGATRON)
def test_every_field_is_the_published_one(name: str) -> None:
    published = {FIELDS[theirs]: value for theirs, value in (MEGATRON[name] | HUGGING_FACE).items()}
    published["mtp_pattern"] = MTP[name]
    # their own name, and the clamp of the step, which Megatron does not have
    assert PRESETS[name].model_dump() == published | {"name": name, "dt_min": 0.0}


@pytest.mark.parametrize(
    ("name", "letters", "total", "active"),
    [
        ("nemotron3-nano", (23, 23, 6), 31.58, 3.58),
        ("nemotron3-super", (40, 40, 8), 120.67, 12.77),
        ("nemotron3-ultra", (48, 48, 12), 549.31, 56.06),
    ],
)
def test_sizes_in_billions(name: str, letters: tuple[int, int, int], total: float, active: float) -> None:
    preset = PRESETS[name]
    assert tuple(preset.pattern.count(letter) for letter in "ME*") == letters
    assert round(preset.num_parameters() / 1e9, 2) == total
    assert round(preset.num_active_parameters() / 1e9, 2) == active


def test_head_for_further_tokens_is_counted_apart_and_once() -> None:
    plain, ahead = PRESETS["nemotron3-nano"], PRESETS["nemotron3-super"]
    assert plain.num_mtp_parameters() == 0
    # the elements that Megatron-Bridge counts in the checkpoint, with the routing biases of 41 expert layers
    assert ahead.num_parameters() + ahead.num_mtp_parameters() + 41 * 512 == 123_611_033_088
    hidden = ahead.hidden_size
    attention, experts = ahead.layer_parameters("*"), ahead.layer_parameters("E")
    assert ahead.num_mtp_parameters() == attention + experts + 2 * hidden * hidden + 3 * hidden
    deeper = Architecture.model_validate(ahead.model_dump() | {"mtp_depths": 5})
    assert deeper.num_mtp_parameters() == ahead.num_mtp_parameters()
    assert deeper.num_parameters() == ahead.num_parameters()


def test_counts_follow_their_meaning() -> None:
    everyone = Architecture.model_validate(NANO_CPU.model_dump() | {"top_k": NANO_CPU.num_experts})
    assert everyone.num_active_parameters() == everyone.num_parameters()
    latent = Architecture.model_validate(NANO_CPU.model_dump() | {"latent_size": 32})
    # experts at half the width, and two projections a layer
    saved = NANO_CPU.num_experts * 2 * NANO_CPU.expert_ffn_size * 32 - 2 * 32 * 64
    assert NANO_CPU.num_parameters() - latent.num_parameters() == NANO_CPU.pattern.count("E") * saved


def test_unknown_name_is_answered_with_the_nearest() -> None:
    assert architecture("nemotron3-super") is PRESETS["nemotron3-super"]
    with pytest.raises(ValueError, match="no architecture 'nemotron-super'; did you mean nemotron3-super"):
        architecture("nemotron-super")
