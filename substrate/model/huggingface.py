"""The same model under transformers' names: `config.json` and `NemotronHForCausalLM`'s tensors, and back.

Every field of a config is either mapped, or must have the one value that this model computes with, or is known to
change no result. A field that is none of these is refused by name: an unknown setting may be a different model. The
tensors' table is `weight_map`; here it is applied to tensors in memory.
"""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from megatron_evolve.substrate.model.architecture import Architecture
from megatron_evolve.substrate.model.weight_map import (
    TRANSFORMERS,
    Mapped,
    Naming,
    check_names,
    to_megatron,
)
from megatron_evolve.substrate.model.weight_map import to_huggingface as to_huggingface_map

if TYPE_CHECKING:
    from torch import Tensor

NEVER_CLAMPS = 1e-30  # as `time_step_min`, of which transformers takes the logarithm to draw new weights
NO_LIMIT = 1e20  # what converters write for the infinity that JSON lacks
LAYER_KINDS = {"M": "linear_attention", "*": "full_attention", "E": "moe"}
LETTERS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "moe": "E"}

# Fields of Architecture by the names that configs have used for them, today's first.
FIELDS = {
    "hidden_size": ("hidden_size",),
    "vocab_size": ("vocab_size",),
    "num_attention_heads": ("num_attention_heads",),
    "num_query_groups": ("num_key_value_heads",),
    "head_dim": ("head_dim", "attention_head_dim"),
    "mamba_num_heads": ("mamba_num_heads",),
    "mamba_head_dim": ("mamba_head_dim",),
    "mamba_state_dim": ("ssm_state_size",),
    "mamba_num_groups": ("n_groups", "mamba_n_groups"),
    "mamba_conv_kernel": ("conv_kernel", "mamba_d_conv"),
    "mamba_chunk_size": ("chunk_size", "mamba_chunk_size"),
    "num_experts": ("n_routed_experts",),
    "top_k": ("num_experts_per_tok",),
    "expert_ffn_size": ("moe_intermediate_size",),
    "shared_ffn_size": ("moe_shared_expert_intermediate_size",),
    "topk_scaling_factor": ("routed_scaling_factor",),
    "norm_eps": ("layer_norm_epsilon", "norm_eps", "rms_norm_eps"),
    "init_std": ("initializer_range",),
    "max_sequence_length": ("max_position_embeddings",),
}
CLAMP = ("time_step_limit", "mamba_dt_limit")  # of the Mamba step, as (lower, upper)
FIRST_STEP = ("time_step_min", "mamba_dt_min")  # smallest of new weights; transformers 5 clamps at it
PATTERNS = ("layers_block_type", "layer_types", "hybrid_override_pattern")
MTP_PATTERNS = ("mtp_layers_block_type", "mtp_hybrid_override_pattern")

# What this model computes. A config that leaves one out means the same.
FIXED = {
    "model_type": "nemotron_h",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "mamba_proj_bias": False,
    "use_conv_bias": True,
    "mamba_conv_bias": True,
    "mlp_hidden_act": "relu2",
    "hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "sliding_window": None,
    "quantization_config": None,
    "mtp_use_repeated_layer": True,
}

# Initialisation, caching, bookkeeping, positions that NemotronH does not have, and the width of dense layers that no
# pattern here has: no result depends on them.
WITHOUT_EFFECT = (
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "num_logits_to_keep", "output_router_logits"),
    *("expand", "intermediate_size", "num_hidden_layers", "partial_rotary_factor", "rope_theta"),
    *("mamba_dt_init_floor", "mamba_dt_max", "mamba_expand", "mamba_ssm_cache_dtype"),
    *("time_step_floor", "time_step_max", "use_mamba_kernels", "rescale_prenorm_residual"),
    *("residual_in_fp32", "moe_shared_expert_overlap", "keep_mtp_spec_in_bf16", "mtp_loss_scaling_factor"),
)


def huggingface_config(architecture: Architecture) -> dict[str, Any]:
    """Arguments of `transformers.NemotronHConfig`, and the content of a `config.json` beside the weights.

    The clamp of the Mamba step stands there for each kind of reader, see `with_clamp`.
    """
    a = architecture
    config = {theirs[0]: getattr(a, ours) for ours, theirs in FIELDS.items()}
    config |= {
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "layers_block_type": [LAYER_KINDS[letter] for letter in a.pattern],
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    }
    if a.latent_size is not None:
        config["moe_latent_size"] = a.latent_size
    if a.mtp_pattern:
        config["num_nextn_predict_layers"] = a.mtp_depths
        config["mtp_layers_block_type"] = [LAYER_KINDS[letter] for letter in a.mtp_pattern]
    return with_clamp(config, a.dt_min)


def with_clamp(config: Mapping[str, Any], dt_min: float) -> dict[str, Any]:
    """`config` as one whose every reader clamps the Mamba step at `dt_min` (`Architecture` says who reads what).

    What says so already stays as it is spelt.
    """
    kept = dict(config)
    if _first_step(kept, "config.json") != dt_min:
        kept = {field: value for field, value in kept.items() if field not in FIRST_STEP}
        kept["time_step_min"] = max(dt_min, NEVER_CLAMPS)
    if _clamp(kept, "config.json") != dt_min:
        kept = {field: value for field, value in kept.items() if field not in CLAMP}
        kept |= {"time_step_limit": [dt_min, math.inf]} if dt_min else {}
    return kept


def architecture_of(config: Mapping[str, Any], name: str) -> Architecture:
    """The architecture that a `config.json` describes.

    Raises ValueError in one sentence for another kind of model, a field of unknown meaning, or shapes that this model
    does not have.
    """
    where = f"config.json of {name}"
    if config.get("model_type") != "nemotron_h":
        raise ValueError(
            f"{where}: expected model_type nemotron_h; got {config.get('model_type')!r}: give a Nemotron-H checkpoint"
        )
    for field, value in FIXED.items():
        if config.get(field, value) != value:
            raise ValueError(f"{where}: expected {field}={value!r}; got {config[field]!r}: this model has no such form")
    rest, dt_min = dict(config), _clamp(config, where)
    _first_step(config, where)
    for field in (*FIXED, *WITHOUT_EFFECT, *CLAMP, *FIRST_STEP):
        rest.pop(field, None)
    found = {ours: _taken(rest, theirs, where) for ours, theirs in FIELDS.items()}
    pattern = _pattern(rest, PATTERNS, where)
    layers = config.get("num_hidden_layers", len(pattern))
    if layers != len(pattern):
        raise ValueError(f"{where}: num_hidden_layers={layers} does not fit the pattern {pattern}: mend the config")
    depths, latent = rest.pop("num_nextn_predict_layers", 0) or 0, rest.pop("moe_latent_size", None)
    head = _pattern(rest, MTP_PATTERNS, where) if depths else ""
    rest = {field: value for field, value in rest.items() if field not in MTP_PATTERNS}
    if rest:
        raise ValueError(f"{where}: fields of unknown meaning: {', '.join(sorted(rest))}: remove those without effect")
    found |= {"latent_size": latent, "mtp_depths": depths, "mtp_pattern": head, "dt_min": dt_min}
    try:
        return Architecture(name=name, pattern=pattern, **found)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"])) or "shapes"
        raise ValueError(f"{where}: {at}: {first['msg'].removeprefix('Value error, ')}") from None


def _clamp(config: Mapping[str, Any], where: str) -> float:
    """The lower clamp of the Mamba step that a config asks for, 0 where it names none."""
    given = [config[name] for name in CLAMP if config.get(name) is not None]
    if not given:
        return 0.0
    limit = _one(given, CLAMP, where)
    lower, upper = map(_number, limit) if isinstance(limit, list | tuple) and len(limit) == 2 else (math.nan, math.nan)
    if not (0 <= lower < math.inf and upper >= NO_LIMIT):
        raise ValueError(
            f"{where}: expected {CLAMP[0]} as a number from 0 on and Infinity; got {limit!r}: this model has no upper "
            "clamp of the Mamba step"
        )
    return 0.0 if lower <= NEVER_CLAMPS else lower


def _first_step(config: Mapping[str, Any], where: str) -> float | None:
    """At which Mamba step transformers 5 clamps, None where the config leaves that to transformers."""
    given = [config[name] for name in FIRST_STEP if config.get(name) is not None]
    if not given:
        return None
    least = _number(_one(given, FIRST_STEP, where))
    if not 0 <= least < math.inf:
        raise ValueError(f"{where}: expected {FIRST_STEP[0]} as a number from 0 on; got {given[0]!r}: mend the config")
    return 0.0 if least <= NEVER_CLAMPS else least


def _number(value: Any) -> float:
    """A config's number, also where it spells infinity as a word or as transformers 5 does; NaN for anything else."""
    value = value.get("__float__") if isinstance(value, dict) else value
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _taken(rest: dict[str, Any], names: tuple[str, ...], where: str) -> Any:
    """Removes all spellings of one field from `rest` and gives its value. Raises ValueError if they disagree."""
    values = [rest.pop(name) for name in names if name in rest]
    return _one(values, names, where)


def _pattern(rest: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    """As `_taken`, for layers: a string of letters or a list of kinds, given as letters."""
    given = [rest.pop(name) for name in names if name in rest]
    for layers in given:
        if layers is not None and not (isinstance(layers, str | list) and all(isinstance(one, str) for one in layers)):
            raise ValueError(f"{where}: expected {names[0]} as a list of words; got {layers!r}: mend the config")
    spelt = ["".join(LETTERS.get(kind, kind) for kind in layers) for layers in given if layers is not None]
    pattern = _one(spelt, names, where)
    if set(pattern) - set(LAYER_KINDS):
        raise ValueError(f"{where}: expected layers of Mamba, attention or experts; got {pattern}: no other is known")
    return pattern


def _one(values: list[Any], names: tuple[str, ...], where: str) -> Any:
    if not values or values[0] is None:
        raise ValueError(f"{where}: expected the field {names[0]}; it is missing: complete the config")
    if any(value != values[0] for value in values):
        raise ValueError(f"{where}: {', '.join(names)} disagree: {values}: mend the config")
    return values[0]


def to_huggingface(
    state: Mapping[str, "Tensor"], architecture: Architecture, naming: Naming = TRANSFORMERS
) -> dict[str, "Tensor"]:
    """Megatron's tensors (`weights.state_of`) under Hugging Face's names. ValueError names what is missing or left."""
    return _converted(state, to_huggingface_map(architecture, naming), "a Megatron state")


def from_huggingface(state: Mapping[str, "Tensor"], architecture: Architecture) -> dict[str, "Tensor"]:
    """Tensors of a `NemotronHForCausalLM` under Megatron's names, for `weights.put_weights`.

    Takes transformers 5 names and those of checkpoints on the hub (`backbone.`, one tensor per expert). Raises
    ValueError naming what is missing or left over.
    """
    return _converted(state, to_megatron(architecture, Naming.of(state)), "a NemotronH state")


def _converted(state: Mapping[str, "Tensor"], mapped: Iterable[Mapped], what: str) -> dict[str, "Tensor"]:
    import torch

    table = list(mapped)
    check_names(state, {piece.source for tensor in table for piece in tensor.pieces}, what)
    out = {}
    for tensor in table:
        parts = [state[piece.source][piece.start : piece.stop] for piece in tensor.pieces]
        out[tensor.name] = (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(tensor.shape)
    return out
