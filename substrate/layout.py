"""How one model is spread over processes: the parallel sizes, and every rule that they must keep.

    tp   tensor parallel: matrices split by heads or width, the sequence split beside them
    pp   pipeline stages, each with `vp` pieces of the layer pattern (virtual stages)
    ep   experts spread over ranks; etp: each expert's matrices split over ranks
    cp   context parallel: the sequence split also within attention and scan
    dp   data parallel: whatever ranks are left; the distributed optimizer splits its state over them

A layout is a value of the place where a run is launched, never of a candidate: the same candidate gives the same losses
in every layout. `check` refuses what Megatron-Core 0.19 cannot run, or runs wrongly, before a process starts. Imports
without torch.
"""

import math
from collections.abc import Iterator

from pydantic import Field

from megatron_evolve.substrate.frozen import Frozen
from megatron_evolve.substrate.model.architecture import Architecture

SIZES = ("tp", "pp", "vp", "ep", "etp", "cp")


class Layout(Frozen):
    """Parallel sizes of one job. The default is one process, or plain data parallelism over several."""

    tp: int = Field(default=1, ge=1, description="tensor-parallel ranks; above 1 always with sequence parallelism")
    pp: int = Field(default=1, ge=1, description="pipeline stages")
    vp: int = Field(default=1, ge=1, description="virtual stages a pipeline rank (interleaved schedule)")
    ep: int = Field(default=1, ge=1, description="expert-parallel ranks")
    etp: int = Field(default=1, ge=1, description="tensor-parallel ranks within an expert")
    cp: int = Field(default=1, ge=1, description="context-parallel ranks; needs a GPU and Transformer Engine")

    @classmethod
    def from_text(cls, text: str) -> "Layout":
        """`tp=2,ep=2` as a layout; the empty text is the default. Raises ValueError in one sentence."""
        sizes: dict[str, int] = {}
        for word in filter(None, text.split(",")):
            name, _, size = word.partition("=")
            if name in sizes or not size.isdecimal():
                raise ValueError(
                    f"a layout is written as in `tp=2,ep=2`, each of {', '.join(SIZES)} at most once; got {text!r}: "
                    "correct it"
                )
            sizes[name] = int(size)
        return cls.parse(sizes, where=f"layout {text!r}")

    def __str__(self) -> str:
        return ",".join(f"{name}={getattr(self, name)}" for name in SIZES if getattr(self, name) > 1) or "one rank"

    @property
    def ranks(self) -> int:
        """The fewest ranks that this layout runs on; it also runs on every multiple of them."""
        return self.pp * math.lcm(self.tp * self.cp, self.ep * self.etp)

    def data_parallel(self, ranks: int) -> int:
        """Copies of the dense layers on so many ranks. Raises ValueError where they do not divide."""
        if ranks < 1 or ranks % self.ranks:
            raise ValueError(
                f"layout {self} runs on a multiple of {self.ranks} ranks; got {ranks}: give it that many, or another "
                "layout"
            )
        return ranks // (self.tp * self.cp * self.pp)

    def expert_data_parallel(self, ranks: int) -> int:
        """Copies of each expert on so many ranks."""
        self.data_parallel(ranks)
        return ranks // (self.ep * self.etp * self.pp)

    def padded(self, width: int) -> int:
        """The places that rows of `width` take, for the ranks to cut them: tp equal parts of each rank's sequence.

        Context parallelism deals a row out as two pieces a rank, since attention is causal (`Batch.mirrored`).
        """
        pieces = self.tp * (2 * self.cp if self.cp > 1 else 1)
        return -(-width // pieces) * pieces

    def stages(self, pattern: str) -> tuple[str, ...]:
        """The layer pattern cut into pp x vp pieces, in the order of the layers.

        Pieces differ by at most one layer, the longer ones first: the last also holds the output layer. Raises
        ValueError where there are fewer layers than pieces.
        """
        pieces = self.pp * self.vp
        length, longer = divmod(len(pattern), pieces)
        if not length:
            raise ValueError(
                f"{self.pp} pipeline stages with {self.vp} pieces each need at least {pieces} layers; got "
                f"{len(pattern)} ({pattern}): lower pp or vp"
            )
        ends = [(n + 1) * length + min(n + 1, longer) for n in range(pieces)]
        return tuple(pattern[start:end] for start, end in zip([0, *ends], ends, strict=False))

    def check(
        self,
        architecture: Architecture,
        *,
        ranks: int,
        batch_size: int,
        adapter: bool,
        context_parallel: bool = False,
        micro_batches: int | None = None,
    ) -> None:
        """Raises ValueError, naming what to change, unless this layout can train the architecture on these ranks.

        `batch_size` is in rows over all ranks, `adapter` whether LoRA is on experts, `context_parallel` whether the
        machine has a GPU and Transformer Engine, `micro_batches` how many each rank takes in a step, where known.
        """
        problem = next(self._problems(architecture, ranks, batch_size, adapter, context_parallel, micro_batches), None)
        if problem is not None:
            raise ValueError(f"layout {self} on {ranks} ranks: {problem}")

    def problems(self, architecture: Architecture, **given: object) -> list[str]:
        """Every reason that `check` could give, with the same arguments; none means that it passes."""
        defaults = {"context_parallel": False, "micro_batches": None}
        return list(self._problems(architecture, **{**defaults, **given}))

    def _problems(
        self,
        architecture: Architecture,
        ranks: int,
        batch_size: int,
        adapter: bool,
        context_parallel: bool,
        micro_batches: int | None,
    ) -> Iterator[str]:
        if ranks < 1 or ranks % self.ranks:
            yield f"it runs on a multiple of {self.ranks} ranks; give it that many, or another layout"
            return
        yield from _divisions(self, architecture)
        copies = self.data_parallel(ranks)
        if batch_size % copies:
            yield f"batch_size {batch_size} must be a multiple of the {copies} data-parallel ranks; change one of them"
        if self.etp > 1 and adapter and "E" in architecture.pattern:
            yield "adapters on experts need etp=1, since no rank sees the whole gradient of A; use ep in its place"
        if self.cp > 1 and not context_parallel and "*" in architecture.pattern + architecture.mtp_pattern:
            yield "context parallelism needs a GPU and Transformer Engine's attention; set cp=1"
        yield from _pipeline(self, architecture, micro_batches)


def _divisions(layout: Layout, a: Architecture) -> Iterator[str]:
    """Shapes that tensor, expert and context parallelism cut."""
    has = set(a.pattern + a.mtp_pattern)
    heads = [
        ("M", "mamba_num_heads", a.mamba_num_heads, "tp", layout.tp),
        ("M", "mamba_num_groups", a.mamba_num_groups, "tp", layout.tp),
        ("*", "num_attention_heads", a.num_attention_heads, "tp", layout.tp),
        ("E", "shared_ffn_size", a.shared_ffn_size, "tp", layout.tp),
        ("E", "num_experts", a.num_experts, "ep", layout.ep),
        ("E", "expert_ffn_size", a.expert_ffn_size, "etp", layout.etp),
    ]
    for letter, field, size, name, parts in heads:
        if letter in has and size % parts:
            yield f"{field} {size} must be a multiple of {name}={parts}; lower {name} to a divisor"
    groups = a.num_query_groups
    if "*" in has and groups % layout.tp and layout.tp % groups:
        yield f"num_query_groups {groups} must divide tp={layout.tp} or be a multiple of it; change tp"
    if a.vocab_size % layout.tp:
        yield f"vocab_size {a.vocab_size} must be a multiple of tp={layout.tp}; lower tp to a divisor"
    if "E" not in has and layout.ep * layout.etp > 1:
        yield f"pattern {a.pattern} has no experts to spread; set ep=1 and etp=1"
    if layout.cp > 1 and "M" in has:
        yield from _scan_in_context_parallel(layout, a)


def _scan_in_context_parallel(layout: Layout, a: Architecture) -> Iterator[str]:
    """The scan exchanges sequence for heads: every rank takes some, and whole groups or parts of one (repeated)."""
    if a.mamba_num_heads % (layout.tp * layout.cp):
        yield (
            f"mamba_num_heads {a.mamba_num_heads} must be a multiple of tp x cp = {layout.tp * layout.cp}; "
            "lower one of them"
        )
    groups = a.mamba_num_groups // layout.tp
    if groups and groups % layout.cp and layout.cp % groups:
        yield (
            f"the {groups} mamba groups of a tensor-parallel rank must divide cp={layout.cp} or be a multiple of it; "
            "change cp"
        )


def _pipeline(layout: Layout, a: Architecture, micro_batches: int | None) -> Iterator[str]:
    """Stages, and the micro-batches that keep them busy."""
    pieces = layout.pp * layout.vp
    if layout.vp > 1 and layout.pp < 3:
        # with two stages the next rank is also the previous one, and Megatron's messages to it take each other's place
        yield f"vp={layout.vp} needs at least 3 pipeline stages to interleave; set vp=1 or raise pp"
    elif pieces > len(a.pattern):
        yield f"{pieces} pipeline pieces need as many layers; the pattern has {len(a.pattern)}: lower pp or vp"
    if layout.vp > 1 and micro_batches is not None and micro_batches % layout.pp:
        yield (
            f"the interleaved schedule needs micro-batches in multiples of pp={layout.pp}; got {micro_batches}: "
            "change batch_size or set vp=1"
        )
