"""The weight map: names and shapes of both libraries' own models, every row used once, and the published config."""

import json
import math
from collections import Counter

import pytest
import torch

from megatron_evolve.substrate.model.architecture import NANO_CPU, Architecture
from megatron_evolve.substrate.model.huggingface import architecture_of, huggingface_config
from megatron_evolve.substrate.model.weight_map import HUB, TRANSFORMERS, Naming, to_huggingface, to_megatron

LATENT = NANO_CPU.model_copy(update={"latent_size": 24})
HEADED = LATENT.model_copy(update={"mtp_pattern": "*E", "mtp_depths": 2})
NAMINGS = [HUB, TRANSFORMERS, Naming("model", stacked=False), Naming("backbone", stacked=True)]

# config.json of nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16, as published
PUBLISHED = {
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
    "bos_token_id": 1,
    "chunk_size": 128,
    "conv_kernel": 4,
    "eos_token_id": 2,
    "expand": 2,
    "head_dim": 128,
    "hidden_dropout": 0.0,
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "initializer_range": 0.02,
    "intermediate_size": 1856,
    "layer_norm_epsilon": 1e-05,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 64,
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "max_position_embeddings": 262144,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h",
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_group": 1,
    "n_groups": 8,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_eps": 1e-05,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 52,
    "num_key_value_heads": 2,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "partial_rotary_factor": 1.0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "sliding_window": None,
    "ssm_state_size": 128,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.55.4",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
    "vocab_size": 131072,
}


@pytest.mark.parametrize("architecture", [NANO_CPU, LATENT], ids=["plain", "latent"])
def test_names_and_shapes_are_those_of_transformers_model(architecture: Architecture) -> None:
    from transformers import NemotronHConfig, NemotronHForCausalLM

    with torch.device("meta"):
        state = NemotronHForCausalLM(NemotronHConfig(**huggingface_config(architecture))).state_dict()
    table = {tensor.name: tensor.shape for tensor in to_huggingface(architecture, TRANSFORMERS)}
    assert table == {name: tuple(value.shape) for name, value in state.items()}


def test_a_prediction_head_is_flattened_as_on_the_hub() -> None:
    names = {tensor.name: tensor for tensor in to_huggingface(HEADED, HUB)}
    assert names["mtp.layers.0.eh_proj.weight"].shape == (64, 128)
    assert names["mtp.layers.0.enorm.weight"].pieces[0].source == "mtp.layers.0.enorm.weight"
    assert names["mtp.layers.1.final_layernorm.weight"].pieces[0].source == "mtp.layers.0.final_layernorm.weight"
    inner = "mtp.layers.0.mtp_model_layer.layers"
    assert names["mtp.layers.0.mixer.q_proj.weight"].pieces[0].source == f"{inner}.0.self_attention.linear_qkv.weight"
    expert = names["mtp.layers.1.mixer.experts.3.up_proj.weight"]
    assert (expert.pieces[0].source, expert.shape) == (f"{inner}.1.mlp.experts.linear_fc1.weight3", (128, 24))


@pytest.mark.parametrize("naming", NAMINGS, ids=str)
@pytest.mark.parametrize("architecture", [NANO_CPU, HEADED], ids=["plain", "latent and headed"])
def test_every_row_goes_to_one_place_in_both_directions(architecture: Architecture, naming: Naming) -> None:
    ours, theirs = list(to_megatron(architecture, naming)), list(to_huggingface(architecture, naming))
    for table, other in ((ours, theirs), (theirs, ours)):
        rows = {tensor.name: tensor.shape[0] for tensor in other}
        items = {tensor.name: math.prod(tensor.shape[1:]) for tensor in other}
        used = Counter((p.source, row) for tensor in table for p in tensor.pieces for row in range(p.start, p.stop))
        assert used == Counter((name, row) for name, count in rows.items() for row in range(count))
        for tensor in table:
            held = sum((piece.stop - piece.start) * items[piece.source] for piece in tensor.pieces)
            assert held == math.prod(tensor.shape)


def test_the_table_holds_the_architectures_parameters() -> None:
    biases = NANO_CPU.num_experts * NANO_CPU.pattern.count("E")
    assert sum(math.prod(t.shape) for t in to_megatron(NANO_CPU, HUB)) == NANO_CPU.num_parameters() + biases


def test_the_published_config_is_understood_field_by_field() -> None:
    nano = architecture_of(PUBLISHED, "nano")
    assert (nano.hidden_size, nano.num_attention_heads, nano.num_query_groups, nano.head_dim) == (2688, 32, 2, 128)
    assert (nano.num_experts, nano.top_k, nano.expert_ffn_size, nano.shared_ffn_size) == (128, 6, 1856, 3712)
    assert (nano.mamba_num_heads, nano.mamba_head_dim, nano.mamba_state_dim, nano.mamba_num_groups) == (64, 64, 128, 8)
    assert (nano.dt_min, nano.topk_scaling_factor, nano.latent_size, nano.mtp_depths) == (0.0, 2.5, None, 0)
    assert round(nano.num_parameters() / 1e9, 2) == 31.58


@pytest.mark.parametrize("architecture", [NANO_CPU, LATENT, HEADED], ids=["plain", "latent", "headed"])
def test_a_config_gives_its_architecture_back(architecture: Architecture) -> None:
    from transformers import NemotronHConfig

    config = huggingface_config(architecture)
    assert architecture_of(config, architecture.name) == architecture
    assert architecture_of(json.loads(NemotronHConfig(**config).to_json_string()), architecture.name) == architecture
