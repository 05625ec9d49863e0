"""The forms of the expert path's maths, by name: the one place where a form is chosen.

    reference   the definition: any dtype up to float64, not fast
    eager       plain PyTorch made fast: the CPU path, and a GPU's where Triton is missing or a tile does not fit
    triton      fused kernels: a CUDA device, or Triton's interpreter for tests

A backend is a module with the functions that callers choose between: router, route_plan, experts_of_chunks, permute,
unpermute, grouped_linear, grouped_experts, linear_cross_entropy. Not of all three are weighted_squared_relu (reference,
eager), gated_rms_norm (reference, triton), routed_experts and router_from_tokens (triton). The kernels' module is
imported when it is asked for: the CPU path needs no Triton. Naming a form needs no torch.
"""

import ctypes
import os
import warnings
from importlib import import_module, metadata
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MODULES = {"reference": "reference", "eager": "eager", "triton": "fused"}
AUTO = "auto"
# Shared memory of a block that the largest tile of `tile_table.json` needs where its operands come by pointers: 128 x
# 256 sums of bfloat16, 64 deep, three steps in flight. A block has 166,912 on an A100, 101,376 on an L40 or RTX 4090.
TILE_BYTES = 147_456
MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97  # of cuda.h's CUdevice_attribute
# Of logits that `chunked_loss` holds at once; here, where a plan of memory reads it without torch. Plain PyTorch makes
# copies of them.
LOSS_CHUNK_BYTES = {"eager": 2**26, "triton": 2**28}


def resolved(name: str) -> str:
    """`auto` as this machine's choice: fused kernels where Triton is, and CUDA devices that hold its tiles."""
    if name != AUTO:
        return name
    import torch

    if not torch.cuda.is_available() or not find_spec("triton"):
        return "eager"
    if reason := too_small(block_bytes()):
        warnings.warn(f"experts are computed by plain PyTorch: {reason}", stacklevel=2)
        return "eager"
    return "triton"


def too_small(found_bytes: int | None) -> str:
    """Why a GPU with so much shared memory a block cannot run every kernel; empty where it can, or nothing is known."""
    if found_bytes is None or found_bytes >= TILE_BYTES:
        return ""
    return f"a block of this GPU has {found_bytes:,} bytes of shared memory, the kernels' largest tile {TILE_BYTES:,}"


def block_bytes() -> int | None:
    """Shared memory that one block may ask for, on the visible GPU that has least; None where no driver tells.

    Asked of the CUDA driver: a doctor has no torch, and torch would open the device.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device, value, found = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), []
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):  # an error's number: there is no GPU to use
        return None
    for ordinal in range(count.value):
        driver.cuDeviceGet(ctypes.byref(device), ordinal)
        if driver.cuDeviceGetAttribute(ctypes.byref(value), MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device):
            return None
        found.append(value.value)
    return min(found, default=None)


def backend(name: str) -> ModuleType:
    """The module of that name. Raises ValueError for an unknown name, or one that cannot run here."""
    import torch

    if name not in MODULES:
        raise ValueError(f"backend must be one of {', '.join(MODULES)}; got {name!r}: name one of them")
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if name == "triton" and not torch.cuda.is_available() and not interpreted:
        raise ValueError(
            "the triton backend needs a CUDA device; torch finds none: use the eager backend, or set "
            "TRITON_INTERPRET=1 first (slow, for tests)"
        )
    if name == "triton" and interpreted:
        _check_interpreter(metadata.version("triton"), metadata.version("numpy"))
    return import_module(f"megatron_evolve.kernels.{MODULES[name]}")


def _check_interpreter(triton: str, numpy: str) -> None:
    """Triton before 3.7 makes a loop's bound an int from an array of one number, which numpy refuses since 2.4."""
    if _release(triton) < (3, 7) and _release(numpy) >= (2, 4):
        raise ValueError(
            f"Triton's interpreter before 3.7 needs numpy before 2.4; got triton {triton} and numpy {numpy}: "
            "pip install 'numpy<2.4', or a newer triton"
        )


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def chunk_rows(form: str, W_VH: "Tensor") -> int:
    """Tokens whose logits from this head (V, H) are one chunk of `chunked_loss`."""
    return max(1, LOSS_CHUNK_BYTES[form] // (len(W_VH) * W_VH.element_size()))
