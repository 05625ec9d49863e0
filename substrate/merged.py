"""A trained run's matrices as if they stood in the substrate: its own weights, or the base with the adapter added in.

    W' = W + (alpha / rank) * B A

Rows of W' are computed when they are read, one piece of a matrix at a time, so merging a large model takes no more
memory than converting it. The sum is taken in float32 and rounded once to the dtype of W.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_evolve.substrate.manifest import Substrate
from megatron_evolve.substrate.model.tensor_file import Entry, read_header
from megatron_evolve.substrate.recipe import Adapter
from megatron_evolve.substrate.train.checkpoint import Checkpoint, load_checkpoint
from megatron_evolve.substrate.train.open import CHECKPOINT_FOLDER

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class MergedEntry(Entry):
    """A matrix of the base with its adapter. Stands where the base's entry stands, and reads as the sum."""

    A: Entry
    B: Entry
    expert: int | None  # of adapters that hold all experts of a layer, this one
    scale: float

    def rows(self, first: int, last: int) -> "MergedRows":
        """Rows [first, last) of the sum."""
        return MergedRows(self, first, last)


@dataclass(frozen=True)
class MergedRows:
    """Some rows of a merged matrix, read as a file's bytes are."""

    entry: MergedEntry
    first: int
    last: int

    @property
    def path(self) -> Path:
        return self.entry.path

    @property
    def start(self) -> int:
        return Entry.rows(self.entry, self.first, self.last).start

    def read(self) -> Iterator[bytes]:
        """The rows' bytes in the base's dtype."""
        import torch

        entry, (first, last) = self.entry, (self.first, self.last)
        base = _tensor(Entry.rows(entry, first, last).read(), entry.dtype, (last - first, entry.shape[1]))
        A, B = (
            _tensor(part.rows(0, part.shape[0]).read(), part.dtype, part.shape)
            if entry.expert is None
            else _tensor(part.rows(entry.expert, entry.expert + 1).read(), part.dtype, part.shape[1:])
            for part in (entry.A, entry.B)
        )
        merged = base.float() + entry.scale * (B[first:last].float() @ A.float())
        yield merged.to(base.dtype).contiguous().view(torch.uint8).numpy().tobytes()


def _tensor(chunks: Iterator[bytes], dtype: str, shape: tuple[int, ...]) -> "Tensor":
    import torch

    return torch.frombuffer(bytearray(b"".join(chunks)), dtype=getattr(torch, DTYPES[dtype])).reshape(shape)


def trained_checkpoint(run: Path, substrate: Substrate) -> Checkpoint:
    """The checkpoint that `run` handed on. Raises ValueError if it is damaged or of another substrate."""
    folder = run / CHECKPOINT_FOLDER
    checkpoint = load_checkpoint(folder)
    if checkpoint.state.get("substrate") != substrate.digest:
        raise ValueError(
            f"{folder} was trained from substrate {str(checkpoint.state.get('substrate'))[:12]}, not from "
            f"{substrate.digest[:12]}; give the substrate it was trained from"
        )
    return checkpoint


def trained_entries(stored: dict[str, Entry], run: Path, substrate: Substrate) -> dict[str, Entry]:
    """The substrate's tensors as `run` left them: replaced by its weights, or each adapted one merged."""
    checkpoint = trained_checkpoint(run, substrate)
    folder = run / CHECKPOINT_FOLDER
    if checkpoint.kind == "weights":
        return read_header(folder / "weights.safetensors")
    if checkpoint.kind != "adapter":
        raise ValueError(f"{folder} is a {checkpoint.kind} checkpoint, which is for going on; train the run to its end")
    adapter = Adapter.parse(checkpoint.state["adapter"], where=str(folder))
    low_rank = read_header(folder / "adapter.safetensors")
    left = set(low_rank)
    merged = dict(stored)
    for name, entry in stored.items():
        module = re.fullmatch(r"(.+)\.weight(\d*)", name)
        if module is None or f"{module[1]}.lora_A" not in low_rank:
            continue
        A, B = (low_rank[f"{module[1]}.lora_{letter}"] for letter in "AB")
        left -= {f"{module[1]}.lora_A", f"{module[1]}.lora_B"}
        expert = int(module[2]) if module[2] else None
        scale = adapter.alpha / adapter.rank
        merged[name] = MergedEntry(entry.path, entry.dtype, entry.shape, entry.start, entry.stop, A, B, expert, scale)
    if left:
        raise ValueError(f"{folder} adapts what the substrate does not hold ({min(left)}): give its own substrate")
    return merged
