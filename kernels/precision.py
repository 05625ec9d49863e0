"""How numbers are multiplied and rounded in every kernel, compiled or interpreted.

Operands are bfloat16, float16 or float32; sums are always float32. On a GPU a bfloat16 product runs on the tensor
cores and a store rounds to nearest even. Triton's interpreter (TRITON_INTERPRET=1, no GPU) keeps bfloat16 as 16-bit
integers: it multiplies those bit patterns in `tl.dot` and truncates when it narrows. Both are put right here, and only
here, so a kernel reads the same in both worlds and its test on a CPU says something about its numbers on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TRITON_TYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _probe():
    pass


# Triton decides when a function is decorated, from TRITON_INTERPRET; a kernel module asks what was decided.
INTERPRETED = tl.constexpr(not isinstance(_probe, triton.runtime.JITFunction))


@triton.jit
def dot(a, b, acc):
    """acc + a b in float32; float32 operands are multiplied as such, not as tf32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """A float32 block in `dtype`, rounded to nearest even; NaN stays NaN."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        odd = (bits >> 16) & 1
        rounded = ((bits + 0x7FFF + odd) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def relu(x):
    """max(x, 0) that keeps NaN, which `tl.maximum` would turn into 0."""
    return tl.where(x < 0, 0.0, x)


def check(x: Tensor, name: str) -> None:
    """Refuse what no kernel multiplies: another dtype, or memory that no kernel can reach."""
    if x.dtype not in TRITON_TYPES:
        raise ValueError(
            f"{name} must be bfloat16, float16 or float32 for the triton backend; got {x.dtype}: cast it, or use the "
            "eager or the reference backend"
        )
    check_device(x, name)


def check_device(x: Tensor, name: str) -> None:
    """Refuse a tensor that a kernel launched now could not read: Triton launches on the current device."""
    device = x.device
    if device.type == "cuda" and device.index != (current := torch.cuda.current_device()):
        raise ValueError(
            f"the triton backend needs {name} on the current device cuda:{current}; got {device}: move it, or call "
            f"within torch.cuda.device({device.index})"
        )
    if device.type == "cpu" and not INTERPRETED.value:
        raise ValueError(
            f"the triton backend needs {name} on a CUDA device; got a CPU tensor: move it, use the eager backend, or "
            "set TRITON_INTERPRET=1 before the program starts (slow, for tests)"
        )
