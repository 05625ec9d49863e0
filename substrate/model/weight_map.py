"""The weight map: every tensor of an architecture, with its name and shape, under Megatron's names and Hugging Face's.

Both sides order the Mamba projection [z, x, B, C, dt] and keep the convolution as [x, B, C], so most tensors only
change their name. Two change form: Megatron stacks query, key and value by key/value group, and transformers 5 stacks
the experts of a layer. Each form is made of rows of the other, so a tensor is described by the rows it consists of, and
one table serves conversion in memory, conversion between files, and adapters.

Multi-token prediction follows Megatron-Bridge's map: one shared head, flattened to `mtp.layers.J`. transformers 5 knows
no such head and leaves those tensors out when it loads. Imports without torch.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron_evolve.substrate.model.architecture import Architecture

NORMS = {"M": "norm", "*": "input_layernorm", "E": "pre_mlp_layernorm"}
PROJECTIONS = (("linear_fc1", "up_proj"), ("linear_fc2", "down_proj"))


class Piece(NamedTuple):
    """Rows [start, stop) of the first axis of a tensor of the other side."""

    source: str
    start: int
    stop: int


@dataclass(frozen=True)
class Mapped:
    """A tensor: its pieces one after another, read as `shape`."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Naming:
    """How a Hugging Face checkpoint spells its names."""

    prefix: str  # "backbone" on the hub, "model" in transformers 5
    stacked: bool  # the experts of a layer in one tensor, as transformers 5 holds them in memory

    @classmethod
    def of(cls, names: Collection[str]) -> "Naming":
        """The naming that these tensor names follow."""
        prefix = "backbone" if any(name.startswith("backbone.") for name in names) else "model"
        return cls(prefix, any(name.endswith(".experts.up_proj") for name in names))


HUB = Naming("backbone", stacked=False)
TRANSFORMERS = Naming("model", stacked=True)


def to_megatron(architecture: Architecture, naming: Naming) -> Iterator[Mapped]:
    """Every tensor of Megatron's model as rows of Hugging Face's tensors."""
    a = architecture
    for ours, theirs, shape in _renamed(a, naming):
        yield Mapped(ours, shape, (Piece(theirs, 0, shape[0]),))
    for ours, theirs in _blocks(a, naming, "*"):
        heads, dim = a.num_attention_heads // a.num_query_groups, a.head_dim
        pieces = []
        for group in range(a.num_query_groups):
            for letter, width in (("q", heads * dim), ("k", dim), ("v", dim)):
                pieces.append(Piece(f"{theirs}.mixer.{letter}_proj.weight", group * width, (group + 1) * width))
        yield Mapped(f"{ours}.self_attention.linear_qkv.weight", (_qkv_rows(a), a.hidden_size), tuple(pieces))
    if naming.stacked:
        for ours, theirs in _blocks(a, naming, "E"):
            for (fc, projection), shape in zip(PROJECTIONS, _expert_shapes(a), strict=True):
                for e in range(a.num_experts):
                    piece = Piece(f"{theirs}.mixer.experts.{projection}", e, e + 1)
                    yield Mapped(f"{ours}.mlp.experts.{fc}.weight{e}", shape, (piece,))


def to_huggingface(architecture: Architecture, naming: Naming) -> Iterator[Mapped]:
    """Every tensor of a Hugging Face checkpoint as rows of Megatron's tensors."""
    a = architecture
    for ours, theirs, shape in _renamed(a, naming):
        yield Mapped(theirs, shape, (Piece(ours, 0, shape[0]),))
    for ours, theirs in _blocks(a, naming, "*"):
        source = f"{ours}.self_attention.linear_qkv.weight"
        heads, dim = a.num_attention_heads // a.num_query_groups, a.head_dim
        for letter, first, width in (("q", 0, heads), ("k", heads, 1), ("v", heads + 1, 1)):
            starts = [(group * (heads + 2) + first) * dim for group in range(a.num_query_groups)]
            pieces = tuple(Piece(source, start, start + width * dim) for start in starts)
            shape = (a.num_query_groups * width * dim, a.hidden_size)
            yield Mapped(f"{theirs}.mixer.{letter}_proj.weight", shape, pieces)
    if naming.stacked:
        for ours, theirs in _blocks(a, naming, "E"):
            for (fc, projection), shape in zip(PROJECTIONS, _expert_shapes(a), strict=True):
                pieces = tuple(Piece(f"{ours}.mlp.experts.{fc}.weight{e}", 0, shape[0]) for e in range(a.num_experts))
                yield Mapped(f"{theirs}.mixer.experts.{projection}", (a.num_experts, *shape), pieces)


def check_names(present: Collection[str], expected: Collection[str], what: str) -> None:
    """Raises ValueError, naming what is missing and what is left over, unless both hold the same names."""
    missing, left = sorted(set(expected) - set(present)), sorted(set(present) - set(expected))
    if missing or left:
        raise ValueError(
            f"{what} must hold exactly the {len(expected)} tensors of this architecture; missing: {_some(missing)}; "
            f"left over: {_some(left)}: check the pattern and sizes of the architecture"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _blocks(a: Architecture, naming: Naming, letter: str) -> Iterator[tuple[str, str]]:
    """(Megatron, Hugging Face) module path of every layer of one kind, those of the prediction head included."""
    for index, kind in enumerate(a.pattern):
        if kind == letter:
            yield f"decoder.layers.{index}", f"{naming.prefix}.layers.{index}"
    for index, kind in enumerate(a.mtp_pattern):
        if kind == letter:
            yield f"mtp.layers.0.mtp_model_layer.layers.{index}", f"mtp.layers.{index}"


def _renamed(a: Architecture, naming: Naming) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(Megatron name, Hugging Face name, shape) of every tensor that is the same on both sides."""
    width = a.hidden_size
    yield "embedding.word_embeddings.weight", f"{naming.prefix}.embeddings.weight", (a.vocab_size, width)
    yield "decoder.final_norm.weight", f"{naming.prefix}.norm_f.weight", (width,)
    yield "output_layer.weight", "lm_head.weight", (a.vocab_size, width)
    for letter, norm in NORMS.items():
        for ours, theirs in _blocks(a, naming, letter):
            yield f"{ours}.{norm}.weight", f"{theirs}.norm.weight", (width,)
            for name, other, shape in _layer(a, letter, naming):
                yield f"{ours}.{name}", f"{theirs}.mixer.{other}", shape
    if a.mtp_pattern:
        last = len(a.mtp_pattern) - 1
        for name, index, shape in (
            ("enorm", 0, (width,)),
            ("hnorm", 0, (width,)),
            ("eh_proj", 0, (width, 2 * width)),
            ("final_layernorm", last, (width,)),
        ):
            yield f"mtp.layers.0.{name}.weight", f"mtp.layers.{index}.{name}.weight", shape


def _layer(a: Architecture, letter: str, naming: Naming) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """The renamed tensors of one layer: name in the layer, name in the mixer, shape."""
    width, inner, conv, heads = a.hidden_size, a.mamba_inner_size, a.mamba_conv_size, a.mamba_num_heads
    if letter == "M":
        yield "mixer.in_proj.weight", "in_proj.weight", (sum(a.mamba_projection_parts), width)
        yield "mixer.conv1d_weight", "conv1d.weight", (conv, 1, a.mamba_conv_kernel)
        yield "mixer.conv1d_bias", "conv1d.bias", (conv,)
        for name in ("A_log", "D", "dt_bias"):
            yield f"mixer.{name}", name, (heads,)
        yield "mixer.norm.weight", "norm.weight", (inner,)
        yield "mixer.out_proj.weight", "out_proj.weight", (width, inner)
    elif letter == "*":
        yield "self_attention.linear_proj.weight", "o_proj.weight", (width, a.num_attention_heads * a.head_dim)
    else:
        yield "mlp.router.weight", "gate.weight", (a.num_experts, width)
        yield "mlp.router.expert_bias", "gate.e_score_correction_bias", (a.num_experts,)
        yield "mlp.shared_experts.linear_fc1.weight", "shared_experts.up_proj.weight", (a.shared_ffn_size, width)
        yield "mlp.shared_experts.linear_fc2.weight", "shared_experts.down_proj.weight", (width, a.shared_ffn_size)
        if a.latent_size is not None:
            yield "mlp.fc1_latent_proj.weight", "fc1_latent_proj.weight", (a.latent_size, width)
            yield "mlp.fc2_latent_proj.weight", "fc2_latent_proj.weight", (width, a.latent_size)
        if not naming.stacked:
            for (fc, projection), shape in zip(PROJECTIONS, _expert_shapes(a), strict=True):
                for e in range(a.num_experts):
                    yield f"mlp.experts.{fc}.weight{e}", f"experts.{e}.{projection}.weight", shape


def _expert_shapes(a: Architecture) -> tuple[tuple[int, int], tuple[int, int]]:
    width = a.latent_size or a.hidden_size
    return (a.expert_ffn_size, width), (width, a.expert_ffn_size)


def _qkv_rows(a: Architecture) -> int:
    return (a.num_attention_heads + 2 * a.num_query_groups) * a.head_dim
