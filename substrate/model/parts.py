"""Which part of the whole model's tensors a rank holds, and both ways between part and whole.

A tensor of the whole model has a *global* name: the one it has in a process alone. A pipeline stage counts its layers
from 0 and an expert-parallel rank its experts, so a rank's own names differ. Megatron marks each parameter with the
axis it is split along (`partition_dim`) and, where several projections share one matrix (Mamba's z, x, B, C, dt), with
the rows that each of them has on a rank (`partition_sizes`): each of these sections is split by itself.

    part.slices()           where a rank's slice stands in the whole tensor
    part.joined(pieces)     the whole tensor from all slices
    Whole(chunks)           every tensor of the model joined on rank 0, one at a time: no rank holds a second model

Import after `build.prepare`: it needs Megatron.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Module

from megatron_evolve.substrate.model.experts import ExpertWeights
from megatron_evolve.substrate.model.weights import state_of

LAYER = re.compile(r"^(.*?\blayers)\.(\d+)\.")
EXPERT = re.compile(r"^(.*\bweight)(\d+)$")


@dataclass(frozen=True)
class Part:
    """Piece `index` of `count` of the tensor `name`, cut along `axis`; count 1 is held whole by every rank that has it.

    `local` is the shape of a piece, `sections` its sizes along the axis, in order: one unless projections share it.
    """

    name: str
    local: tuple[int, ...]
    dtype: torch.dtype
    axis: int
    index: int
    count: int
    sections: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(size * self.count if axis == self.axis else size for axis, size in enumerate(self.local))

    def slices(self) -> list[tuple[slice, ...]]:
        """Where the rank's slice stands in the whole tensor, section by section: for reading no more than it."""
        if self.count == 1:
            return [(slice(None),)]
        before, found, start = (slice(None),) * self.axis, [], 0
        for size in self.sections:
            found.append((*before, slice(start + self.index * size, start + (self.index + 1) * size)))
            start += size * self.count
        return found

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole tensor from the pieces of all indices, in order."""
        if self.count == 1:
            return pieces[0]
        by_section = zip(*(piece.split(self.sections, self.axis) for piece in pieces), strict=True)
        return torch.cat([piece for section in by_section for piece in section], self.axis)


def parts_of(chunks: Sequence[Module]) -> dict[str, tuple[Part, Tensor]]:
    """Everything that this rank's chunks hold (parameters, adapters, routing bias) by global name, memory shared."""
    found = {}
    for chunk in chunks:
        parameters = dict(chunk.named_parameters())
        for name, tensor in state_of(chunk).items():
            part = _part(chunk, name, parameters.get(name, tensor))
            found[part.name] = (part, tensor.detach())
    return found


def _part(chunk: Module, name: str, parameter: Tensor) -> Part:
    owner, _, leaf = name.rpartition(".")
    module = chunk.get_submodule(owner)
    name = global_name(chunk, name)
    tp = (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size())
    sections = getattr(parameter, "partition_sizes", ())
    if not isinstance(module, ExpertWeights):
        axis = getattr(parameter, "partition_dim", -1)
        (index, count) = tp if axis >= 0 and getattr(parameter, "tensor_model_parallel", False) else (0, 1)
        if leaf == "lora_B":  # its rows are the base's, and Megatron marks their sections on the base alone
            sections = getattr(module.weight, "partition_sizes", ())
    elif EXPERT.match(leaf):
        etp = module.pg_collection.expt_tp
        axis, index, count = module.partition_dim, etp.rank(), etp.size()
    else:  # an adapter of all local experts, stacked along its first axis
        axis, index, count = 0, module.pg_collection.ep.rank(), module.pg_collection.ep.size()
    local = tuple(parameter.shape)
    sections = tuple(sections) if count > 1 and sections else local[axis : axis + 1] if axis >= 0 else ()
    return Part(name, local, parameter.dtype, axis, index, count, sections)


def global_name(chunk: Module, name: str) -> str:
    """The whole model's name of a tensor or module that the chunk calls `name`."""
    local = LAYER.match(f"{name}.")
    if local is not None:
        layer = chunk.get_submodule(f"{local[1]}.{local[2]}")
        name = f"{local[1]}.{layer.layer_number - 1}.{name[local.end() :]}"
    owner, _, leaf = name.rpartition(".")
    expert = EXPERT.match(leaf)
    if expert is None:
        return name
    first = parallel_state.get_expert_model_parallel_rank() * _experts_per_rank(chunk)
    return f"{owner}.{expert[1]}{first + int(expert[2])}"


def _experts_per_rank(chunk: Module) -> int:
    return chunk.config.num_moe_experts // chunk.config.expert_model_parallel_size


class Whole:
    """The whole model's tensors for rank 0: all described at once, then joined one at a time, on the CPU.

        whole = Whole(chunks)             # all ranks
        for name, tensor in whole: ...    # all ranks, to the end: the others send their pieces and get nothing

    Wider dtypes come first, then by name, as a safetensors file holds them. `wanted`, if given, maps the names of a
    rank's own tensors to what is sent in their place, such as earlier values; what it does not name is left out.
    """

    def __init__(self, chunks: Sequence[Module], wanted: Mapping[str, Any] | None = None) -> None:
        held = {name: part for name, part in parts_of(chunks).items() if wanted is None or name in wanted}
        self._own = {name: tensor if wanted is None else wanted[name] for name, (_, tensor) in held.items()}
        mine = {name: part for name, (part, _) in held.items()}
        self._by_rank = [mine]
        if (world := torch.distributed.get_world_size()) > 1:
            self._by_rank = [{} for _ in range(world)]
            torch.distributed.all_gather_object(self._by_rank, mine)
        found = {name: part for parts in self._by_rank for name, part in parts.items()}
        self.parts = sorted(found.values(), key=lambda part: (-part.dtype.itemsize, part.name))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        rank = torch.distributed.get_rank()
        for part in self.parts:
            owners = _owners(part.name, self._by_rank)
            own = self._own.get(part.name)
            pieces = [_sent(own, owner, self._by_rank[owner][part.name]) for owner in owners]
            if rank == 0:
                yield part.name, self._by_rank[owners[0]][part.name].joined(pieces).cpu()


def _owners(name: str, described: Sequence[Mapping[str, Part]]) -> list[int]:
    """For each piece of a tensor, in order, the lowest rank that holds it."""
    first: dict[int, int] = {}
    for rank, parts in enumerate(described):
        if name in parts:
            first.setdefault(parts[name].index, rank)
    return [first[index] for index in sorted(first)]


def _sent(tensor: Tensor | None, owner: int, part: Part) -> Tensor:
    """One piece, on rank 0; other ranks get something of no use."""
    rank = torch.distributed.get_rank()
    if owner == rank:
        if rank:
            torch.distributed.send(tensor.contiguous(), dst=0)
        return tensor
    if rank:
        return torch.empty(0)
    piece = torch.empty(part.local, dtype=part.dtype, device=torch.cuda.current_device())
    torch.distributed.recv(piece, src=owner)
    return piece
