"""The forms of the expert path's maths, by name: the one place where a form is chosen.

    reference   the definition: any dtype up to float64, not fast
    eager       plain PyTorch made fast: the CPU path, and a GPU's where Triton is missing
    triton      fused kernels: a CUDA device, or Triton's interpreter for tests

A backend is a module with the functions of `reference`. The kernels' module is imported when it is asked for: the CPU
path needs no Triton. Naming a form needs no torch.
"""

import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MODULES = {"reference": "reference", "eager": "eager", "triton": "fused"}
AUTO = "auto"
# Of logits that `chunked_loss` holds at once; here, where a plan of memory reads it without torch. Plain PyTorch makes
# copies of them.
LOSS_CHUNK_BYTES = {"eager": 2**26, "triton": 2**28}


def resolved(name: str) -> str:
    """`auto` as this machine's choice: fused kernels where torch finds a CUDA device and Triton is installed."""
    if name != AUTO:
        return name
    import torch

    return "triton" if torch.cuda.is_available() and find_spec("triton") else "eager"


def backend(name: str) -> ModuleType:
    """The module of that name. Raises ValueError for an unknown name, or one that cannot run here."""
    import torch

    if name not in MODULES:
        raise ValueError(f"backend must be one of {', '.join(MODULES)}; got {name!r}: name one of them")
    if name == "triton" and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        raise ValueError(
            "the triton backend needs a CUDA device; torch finds none: use the eager backend, or set "
            "TRITON_INTERPRET=1 first (slow, for tests)"
        )
    return import_module(f"megatron_evolve.kernels.{MODULES[name]}")


def chunk_rows(form: str, W_VH: "Tensor") -> int:
    """Tokens whose logits from this head (V, H) are one chunk of `chunked_loss`."""
    return max(1, LOSS_CHUNK_BYTES[form] // (len(W_VH) * W_VH.element_size()))
