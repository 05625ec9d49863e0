"""A rank's weights on disk: one safetensors file with Megatron's names, read back strictly.

Holds parameters and the routing bias. Written under a temporary name and renamed, so a killed job leaves no half file.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


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
