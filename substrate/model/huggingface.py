"""The same weights under transformers' names: `NemotronHForCausalLM` and back, tensor by tensor.

Both sides order the Mamba projection [z, x, B, C, dt] and keep the convolution as [x, B, C], so most tensors only
change their name. Two change form: Megatron stacks query, key and value by key/value group, and transformers 5 stacks
the experts of a layer. Full tensors of one rank; a tensor without a place on the other side is an error, never dropped.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megatron_evolve.substrate.model.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor

NEVER_CLAMPS = 1e-30
LAYER_KINDS = {"M": "linear_attention", "*": "full_attention", "E": "moe"}
NORMS = {"M": "norm", "*": "input_layernorm", "E": "pre_mlp_layernorm"}
MAMBA = {
    "in_proj.weight": "in_proj.weight",
    "conv1d_weight": "conv1d.weight",
    "conv1d_bias": "conv1d.bias",
    "A_log": "A_log",
    "D": "D",
    "dt_bias": "dt_bias",
    "norm.weight": "norm.weight",
    "out_proj.weight": "out_proj.weight",
}
EXPERTS = {
    "router.weight": "gate.weight",
    "router.expert_bias": "gate.e_score_correction_bias",
    "shared_experts.linear_fc1.weight": "shared_experts.up_proj.weight",
    "shared_experts.linear_fc2.weight": "shared_experts.down_proj.weight",
}
LATENT = {  # where the architecture has a latent size
    "fc1_latent_proj.weight": "fc1_latent_proj.weight",
    "fc2_latent_proj.weight": "fc2_latent_proj.weight",
}


def huggingface_config(architecture: Architecture) -> dict[str, Any]:
    """Arguments of `transformers.NemotronHConfig`, and the content of a `config.json` beside the weights.

    transformers clamps the Mamba step at `time_step_min` and also takes its logarithm to initialise new weights, so a
    `dt_min` of 0 is written as 1e-30, which clamps nothing.
    """
    a = architecture
    return {
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "layers_block_type": [LAYER_KINDS[letter] for letter in a.pattern],
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_query_groups,
        "head_dim": a.head_dim,
        "max_position_embeddings": a.max_sequence_length,
        "mamba_num_heads": a.mamba_num_heads,
        "mamba_head_dim": a.mamba_head_dim,
        "ssm_state_size": a.mamba_state_dim,
        "n_groups": a.mamba_num_groups,
        "conv_kernel": a.mamba_conv_kernel,
        "chunk_size": a.mamba_chunk_size,
        "time_step_min": max(a.dt_min, NEVER_CLAMPS),
        "n_routed_experts": a.num_experts,
        "num_experts_per_tok": a.top_k,
        "norm_topk_prob": True,
        "moe_intermediate_size": a.expert_ffn_size,
        "moe_shared_expert_intermediate_size": a.shared_ffn_size,
        "moe_latent_size": a.latent_size,
        "routed_scaling_factor": a.topk_scaling_factor,
        "layer_norm_epsilon": a.norm_eps,
        "initializer_range": a.init_std,
        "tie_word_embeddings": False,
    }


def to_huggingface(state: Mapping[str, "Tensor"], architecture: Architecture) -> dict[str, "Tensor"]:
    """Megatron's tensors (`weights.state_of`) under transformers 5 names. ValueError names what is missing or left."""
    import torch

    source = _Source(state, "a Megatron state")
    out = {theirs: source.take(ours) for ours, theirs in _renamed(architecture)}
    for ours, theirs in _layers(architecture, "*"):
        parts = _split_qkv(source.take(f"{ours}.self_attention.linear_qkv.weight"), architecture)
        for letter, part in zip("qkv", parts, strict=True):
            out[f"{theirs}.mixer.{letter}_proj.weight"] = part
    for ours, theirs in _layers(architecture, "E"):
        for fc, projection in (("linear_fc1", "up_proj"), ("linear_fc2", "down_proj")):
            names = [f"{ours}.mlp.experts.{fc}.weight{e}" for e in range(architecture.num_experts)]
            out[f"{theirs}.mixer.experts.{projection}"] = torch.stack([source.take(name) for name in names])
    source.finish()
    return out


def from_huggingface(state: Mapping[str, "Tensor"], architecture: Architecture) -> dict[str, "Tensor"]:
    """Tensors of a `NemotronHForCausalLM` under Megatron's names, for `weights.put_weights`.

    Takes transformers 5 names and those of checkpoints on the hub (`backbone.`, one tensor per expert). Raises
    ValueError naming what is missing or left over.
    """
    source = _Source(_modern(state, architecture), "a NemotronH state")
    out = {ours: source.take(theirs) for ours, theirs in _renamed(architecture)}
    for ours, theirs in _layers(architecture, "*"):
        q, k, v = (source.take(f"{theirs}.mixer.{letter}_proj.weight") for letter in "qkv")
        out[f"{ours}.self_attention.linear_qkv.weight"] = _join_qkv(q, k, v, architecture)
    for ours, theirs in _layers(architecture, "E"):
        for fc, projection in (("linear_fc1", "up_proj"), ("linear_fc2", "down_proj")):
            for e, weight in enumerate(source.take(f"{theirs}.mixer.experts.{projection}")):
                out[f"{ours}.mlp.experts.{fc}.weight{e}"] = weight
    source.finish()
    return out


class _Source:
    """A state that is emptied name by name, so that what nobody asked for can be named at the end."""

    def __init__(self, state: Mapping[str, "Tensor"], what: str) -> None:
        self.left = dict(state)
        self.what = what
        self.missing: list[str] = []

    def take(self, name: str) -> "Tensor":
        import torch

        if name not in self.left:
            self.missing.append(name)
            return torch.empty(0)
        return self.left.pop(name)

    def finish(self) -> None:
        if self.missing or self.left:
            raise ValueError(
                f"{self.what} must hold exactly the tensors of this architecture; missing: "
                f"{', '.join(self.missing) or 'none'}; left over: {', '.join(sorted(self.left)) or 'none'}: "
                f"check the pattern and sizes of the architecture"
            )


def _layers(architecture: Architecture, letter: str) -> Iterator[tuple[str, str]]:
    for index, kind in enumerate(architecture.pattern):
        if kind == letter:
            yield f"decoder.layers.{index}", f"model.layers.{index}"


def _renamed(architecture: Architecture) -> Iterator[tuple[str, str]]:
    """(Megatron name, transformers name) of every tensor that is the same on both sides."""
    yield "embedding.word_embeddings.weight", "model.embeddings.weight"
    yield "decoder.final_norm.weight", "model.norm_f.weight"
    yield "output_layer.weight", "lm_head.weight"
    for letter, norm in NORMS.items():
        for ours, theirs in _layers(architecture, letter):
            yield f"{ours}.{norm}.weight", f"{theirs}.norm.weight"
    for ours, theirs in _layers(architecture, "M"):
        for name, other in MAMBA.items():
            yield f"{ours}.mixer.{name}", f"{theirs}.mixer.{other}"
    for ours, theirs in _layers(architecture, "*"):
        yield f"{ours}.self_attention.linear_proj.weight", f"{theirs}.mixer.o_proj.weight"
    for ours, theirs in _layers(architecture, "E"):
        for name, other in (EXPERTS | LATENT if architecture.latent_size else EXPERTS).items():
            yield f"{ours}.mlp.{name}", f"{theirs}.mixer.{other}"


def _join_qkv(q: "Tensor", k: "Tensor", v: "Tensor", architecture: Architecture) -> "Tensor":
    """Rows of each key/value group together: its query heads, its key, its value."""
    import torch

    groups, dim = architecture.num_query_groups, architecture.head_dim
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:  # missing: named by `finish`
        return q
    q = q.view(groups, -1, dim, q.shape[-1])
    k, v = (t.view(groups, 1, dim, t.shape[-1]) for t in (k, v))
    return torch.cat([q, k, v], dim=1).flatten(0, 2)


def _split_qkv(qkv: "Tensor", architecture: Architecture) -> tuple["Tensor", ...]:
    groups, dim = architecture.num_query_groups, architecture.head_dim
    if qkv.numel() == 0:  # missing: named by `finish`
        return qkv, qkv, qkv
    heads = architecture.num_attention_heads // groups
    grouped = qkv.view(groups, heads + 2, dim, qkv.shape[-1])
    return tuple(part.flatten(0, 2) for part in grouped.split([heads, 1, 1], dim=1))


def _modern(state: Mapping[str, "Tensor"], architecture: Architecture) -> dict[str, "Tensor"]:
    """Hub names to transformers 5 names: `backbone.` to `model.`, single experts to one stacked tensor."""
    import torch

    modern = {
        name.replace("backbone.", "model.", 1) if name.startswith("backbone.") else name: t for name, t in state.items()
    }
    for _, theirs in _layers(architecture, "E"):
        for projection in ("up_proj", "down_proj"):
            names = [f"{theirs}.mixer.experts.{e}.{projection}.weight" for e in range(architecture.num_experts)]
            if all(name in modern for name in names):
                modern[f"{theirs}.mixer.experts.{projection}"] = torch.stack([modern.pop(name) for name in names])
    return modern
