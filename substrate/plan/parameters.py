"""How many parameters stand on one rank: of a layer, of a pipeline stage, and of the adapters on them.

Tensor parallelism splits matrices, convolution, heads and embedding tables. Norms, the router and the two latent
projections are whole on every rank. Experts are split over ep ranks, and their matrices over etp.
"""

from dataclasses import dataclass

from megatron_evolve.substrate.layout import Layout
from megatron_evolve.substrate.model.architecture import Architecture
from megatron_evolve.substrate.recipe import Adapter


@dataclass(frozen=True)
class Share:
    """Parameters on one rank. Dense ones are copied over dp x cp ranks, routed experts over expert-dp ranks."""

    dense: float = 0.0
    expert: float = 0.0

    def __add__(self, other: "Share") -> "Share":
        return Share(self.dense + other.dense, self.expert + other.expert)

    @property
    def total(self) -> float:
        """Both kinds."""
        return self.dense + self.expert


@dataclass(frozen=True)
class Stage:
    """What one pipeline rank holds: its pieces of the layer pattern, and whether the model begins or ends with it."""

    pieces: tuple[str, ...]  # one for each virtual stage
    first: bool
    last: bool

    @property
    def pattern(self) -> str:
        """All its layers."""
        return "".join(self.pieces)


def stages(architecture: Architecture, layout: Layout) -> list[Stage]:
    """The pipeline ranks of a layout. With virtual stages rank r holds the pieces r, r + pp, r + 2 pp, ..."""
    pieces = layout.stages(architecture.pattern)
    return [Stage(pieces[rank :: layout.pp], rank == 0, rank == layout.pp - 1) for rank in range(layout.pp)]


def layer_share(a: Architecture, letter: str, layout: Layout) -> Share:
    """One layer with its norm."""
    hidden, tp = a.hidden_size, layout.tp
    if letter != "E":
        return Share(dense=(a.layer_parameters(letter) - hidden) / tp + hidden)
    whole = hidden + (a.num_experts + 2 * (a.latent_size or 0)) * hidden
    routed = a.num_experts * a.routed_expert_parameters()
    return Share(dense=whole + 2 * a.shared_ffn_size * hidden / tp, expert=routed / (layout.ep * layout.etp))


def stage_share(a: Architecture, layout: Layout, stage: Stage) -> Share:
    """A pipeline rank's layers, the embedding table of the first, the output table and further-token head of the last.

    With a pipeline the head reads its own copy of the embedding table, for the first stage's is elsewhere.
    """
    share = Share()
    for letter in "ME*":
        one = layer_share(a, letter, layout)
        count = stage.pattern.count(letter)
        share += Share(count * one.dense, count * one.expert)
    table = a.vocab_size * a.hidden_size / layout.tp
    if stage.first:
        share += Share(dense=table)
    if stage.last:
        share += Share(dense=table + a.hidden_size)
        if a.mtp_depths:
            share += _mtp_share(a, layout)
            share += Share(dense=0 if stage.first else table)
    return share


def _mtp_share(a: Architecture, layout: Layout) -> Share:
    share = Share(dense=2 * a.hidden_size**2 / layout.tp + 3 * a.hidden_size)
    for letter in a.mtp_pattern:
        share += layer_share(a, letter, layout)
    return share


def adapter_share(a: Architecture, layout: Layout, stage: Stage, adapter: Adapter) -> Share:
    """Adapters of a pipeline rank's layers: A (rank, in) and B (out, rank), split where the base is.

    A column-parallel matrix splits its outputs, so B; a row-parallel one its inputs, so A.
    """
    share = _adapters(a, layout, stage.pattern, adapter.rank, adapter.targets)
    if stage.last:
        share += _adapters(a, layout, a.mtp_pattern, adapter.rank, adapter.in_heads)
    if stage.last and "output" in adapter.targets:
        share += Share(dense=adapter.rank * (a.hidden_size + a.vocab_size / layout.tp))
    return share


def _adapters(a: Architecture, layout: Layout, pattern: str, rank: int, targets: tuple[str, ...]) -> Share:
    hidden, tp = a.hidden_size, layout.tp
    queries = a.num_attention_heads * a.head_dim
    pairs = {  # target: letter, width inside of a (column-parallel, row-parallel) pair
        "attention": ("*", queries + 2 * a.num_query_groups * a.head_dim + queries),
        "mamba": ("M", sum(a.mamba_projection_parts) + a.mamba_inner_size),
        "shared": ("E", 2 * a.shared_ffn_size),
    }
    dense = expert = 0.0
    for target in targets:
        if target in pairs:
            letter, inner = pairs[target]
            dense += pattern.count(letter) * rank * (2 * hidden + inner / tp)
        elif target == "experts":
            widths = 2 * (a.latent_size or hidden) + 2 * a.expert_ffn_size / layout.etp
            expert += pattern.count("E") * a.num_experts / layout.ep * rank * widths
    return Share(dense, expert)
