"""Weights on disk: safetensors files with Megatron's names, read back strictly.

Holds parameters and the routing bias. Written under a temporary name and renamed, so a killed job leaves no half file.
Files hold whole tensors by global names, whatever the layout: `load_part` reads of each what one rank's model needs.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_evolve.substrate.model.tensor_file import Entry, read_header

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

EXPERT = re.compile(r"(.+\.experts\.linear_fc[12]\.weight)(\d+)")


def state_of(model: "Module") -> dict[str, "Tensor"]:
    """Parameters and persistent buffers by Megatron's names, sharing memory with the model (no `_extra_state`)."""
    import torch

    return {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}


def save_weights(model: "Module", path: Path | str) -> Path:
    """Write the model's tensors to `path`. Raises OSError as the file system does."""
    from safetensors.torch import save_file

    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    # A view of a larger buffer would be refused as shared memory; the file wants each tensor whole.
    save_file({name: value.detach().contiguous().clone() for name, value in state_of(model).items()}, partial)
    os.replace(partial, path)
    return path


def read_weights(path: Path | str) -> dict[str, "Tensor"]:
    """The tensors of a file made by `save_weights`. Raises FileNotFoundError, or ValueError if the file is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights must be a safetensors file; {path} is not there: write it with save_weights")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file; got {error}: copy or write it again") from error


def load_weights(model: "Module", path: Path | str) -> None:
    """Fill the model from `path`, in place. ValueError names every missing, unexpected or misshapen tensor."""
    put_weights(model, read_weights(path), str(path))


def put_weights(model: "Module", tensors: dict[str, "Tensor"], source: str = "the given tensors") -> None:
    """`load_weights` from memory. The model is untouched if anything does not fit."""
    import torch

    state = state_of(model)
    problems = {
        "missing": sorted(state.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - state.keys()),
        "of another shape": sorted(
            f"{name} {tuple(tensors[name].shape)} for {tuple(state[name].shape)}"
            for name in state.keys() & tensors.keys()
            if tensors[name].shape != state[name].shape
        ),
    }
    if any(problems.values()):
        found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise ValueError(
            f"{source} must hold exactly this model's tensors; got {found}: use the architecture it was saved from"
        )
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(tensors[name])


def load_part(model: "Module", paths: Iterable[Path]) -> None:
    """Fill the model of this rank, in place, from files that together hold the whole model (`weights*.safetensors`).

    Only this rank's layers, experts and slices are read, one file at a time: beside the model, memory is at most one
    file. Values are converted to the model's dtype. Tensors of other ranks are passed over; raises ValueError, before
    anything is copied, for each tensor that is missing or does not divide into this rank's shape.
    """
    from safetensors import safe_open

    stored = {name: entry for path in paths for name, entry in read_header(path).items()}
    wanted = dict(_global_state(model))
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - stored.keys())]
    parts: dict[Path, dict[str, list[tuple[slice, ...]]]] = {}
    for name in wanted.keys() & stored.keys():
        slices = _slices(name, wanted[name], stored[name])
        if slices is None:
            problems.append(f"{name} {stored[name].shape} does not divide into {tuple(wanted[name].shape)}")
        parts.setdefault(stored[name].path, {})[name] = slices or []
    if problems:
        raise ValueError(
            f"weights must hold this rank's tensors; {'; '.join(sorted(problems))}: use their architecture"
        )
    for path, names in parts.items():
        with safe_open(path, framework="pt") as file:
            for name, slices in names.items():
                _fill(wanted[name], [file.get_slice(name)[part] for part in slices])


def _fill(target: Any, parts: list["Tensor"]) -> None:
    """Copy `parts`, one after another along the split axis, into the target."""
    import torch

    with torch.no_grad():
        target.copy_(parts[0] if len(parts) == 1 else torch.cat(parts, dim=target.partition_dim))


def _global_state(model: "Module") -> Iterator[tuple[str, Any]]:
    """(name in the whole model, tensor): a pipeline stage counts layers, an expert-parallel rank experts, from 0."""
    import torch
    from megatron.core import parallel_state

    ranks = parallel_state.get_expert_model_parallel_world_size()
    first = parallel_state.get_expert_model_parallel_rank() * ((model.config.num_moe_experts or 0) // ranks)
    for name, value in model.state_dict(keep_vars=True).items():
        if not torch.is_tensor(value):
            continue
        if layer := re.match(r"(decoder\.layers\.)(\d+)(\..+)", name):
            stem, index, rest = layer.groups()
            name = f"{stem}{model.get_submodule(stem + index).layer_number - 1}{rest}"
        if expert := EXPERT.fullmatch(name):
            name = f"{expert[1]}{first + int(expert[2])}"
        yield name, value


def _slices(name: str, local: Any, whole: Entry) -> list[tuple[slice, ...]] | None:
    """The slices of a stored tensor that make up this rank's, or None if it cannot be cut so.

    Megatron marks on each parameter the axis that tensor parallelism has split, and for one that packs several
    projections (Mamba's) the rows of each: every projection is split by itself.
    """
    from megatron.core import parallel_state

    shape = tuple(local.shape)
    if whole.shape == shape:
        return [(slice(None),)]
    axis = getattr(local, "partition_dim", -1)
    if axis < 0 or len(shape) != len(whole.shape):
        return None
    if EXPERT.fullmatch(name):
        ranks = parallel_state.get_expert_tensor_parallel_world_size()
        rank = parallel_state.get_expert_tensor_parallel_rank()
    else:
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
    if whole.shape != (*shape[:axis], shape[axis] * ranks, *shape[axis + 1 :]):
        return None
    slices, start = [], 0
    for length in getattr(local, "partition_sizes", None) or [shape[axis]]:
        before = (slice(None),) * axis
        slices.append((*before, slice(start + rank * length, start + (rank + 1) * length)))
        start += ranks * length
    return slices
