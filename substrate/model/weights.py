"""Weights on disk: safetensors files with Megatron's names, read back strictly.

Holds parameters and the routing bias. Written under a temporary name and renamed, so a killed job leaves no half file.
Files hold whole tensors by global names, whatever the layout: `load_part` reads of each what one rank's model needs.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_evolve.launch.rundir import publish
from megatron_evolve.substrate.model.tensor_file import read_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module

EMBEDDING = "embedding.word_embeddings.weight"


def state_of(model: "Module") -> dict[str, "Tensor"]:
    """Parameters and persistent buffers by Megatron's names, sharing memory with the model (no `_extra_state`)."""
    import torch

    return {
        name: value
        for name, value in model.state_dict().items()
        if torch.is_tensor(value) and not name.endswith("_extra_state")  # Transformer Engine's are tensors, of no bytes
    }


def save_weights(model: "Module", path: Path | str) -> Path:
    """Write the model's tensors to `path`. Raises OSError as the file system does."""
    from safetensors.torch import save_file

    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    # A view of a larger buffer would be refused as shared memory; the file wants each tensor whole.
    save_file({name: value.detach().contiguous().clone() for name, value in state_of(model).items()}, partial)
    publish(partial, path)
    return path


def put_weights(model: "Module", tensors: dict[str, "Tensor"], source: str = "the given tensors") -> None:
    """Fill the model, in place, from tensors in memory.

    ValueError names every missing, unexpected or misshapen one; the model is untouched then.
    """
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


def check_computable(dtype: str, where: str) -> None:
    """Raises ValueError unless a model can compute in the dtype, as safetensors spells it, of its embedding."""
    if dtype not in ("F32", "BF16"):
        raise ValueError(
            f"{where} must hold float32 or bfloat16; got {dtype}, whose range routing outgrows: convert the checkpoint "
            "to bfloat16"
        )


def stored_dtype(paths: Iterable[Path]) -> "torch.dtype":
    """The dtype that a model of these files computes in: the one of its embedding. Raises ValueError for float16."""
    import torch

    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
    entries = (entry for path in paths for name, entry in read_header(path).items() if name == EMBEDDING)
    embedding = next(entries, None)
    if embedding is None:
        raise ValueError(f"weights must hold {EMBEDDING}; no file does: freeze the substrate again")
    check_computable(embedding.dtype, str(embedding.path))
    return dtypes[embedding.dtype]


def load_part(chunks: Sequence["Module"], paths: Iterable[Path]) -> None:
    """Fill this rank's chunks, in place, from files that together hold the whole model (`weights*.safetensors`).

    Only the slices of this rank are read, one file at a time: beside the model, memory is at most one file. Values take
    the model's dtype. Raises ValueError, before anything is copied, for each tensor that is missing or has another
    shape, and on a rank that holds the whole model for each that is left over.
    """
    import torch
    from safetensors import safe_open

    from megatron_evolve.substrate.model.build import running_layout
    from megatron_evolve.substrate.model.parts import parts_of

    stored = {name: entry for path in paths for name, entry in read_header(path).items()}
    parts = parts_of(chunks)
    held = {name: stored[name] for name in parts if name in stored}
    problems = [f"{name} is missing" for name in parts if name not in stored]
    if running_layout().ranks == 1:
        problems += [f"{name} is left over" for name in stored if name not in parts]
    for name, entry in held.items():
        if entry.shape != parts[name][0].shape:
            problems.append(f"{name} is {entry.shape} for {parts[name][0].shape}")
    if problems:
        found = "; ".join(sorted(problems)[:8]) + (f" and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"weights must hold this model's tensors; {found}: use the architecture they were saved from")
    for path in sorted({entry.path for entry in held.values()}):
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name in sorted(name for name, entry in held.items() if entry.path == path):
                part, tensor = parts[name]
                pieces = [file.get_slice(name)[where] for where in part.slices()]
                tensor.copy_(pieces[0] if len(pieces) == 1 else torch.cat(pieces, part.axis))
