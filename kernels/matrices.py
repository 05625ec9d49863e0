"""E matrices of one shape, wherever they lie in memory, as a kernel reads or writes them.

Megatron keeps the experts of a layer as E separate parameters (`weight0`, `weight1`, ...), and its main gradients as E
views of one buffer; other callers hold one stacked tensor. A kernel takes all three in one form and nothing is copied:
one matrix gives the pointer, and a table of E offsets, in elements from there, gives the others. The table is uploaded
once for a set of addresses and kept, so that a step of training uploads nothing and a CUDA graph may hold it.

Where the matrices stand evenly spaced, as a stack, a main-gradient buffer and Megatron's parameter buffer have them
(the last in descending order), they are also one tensor of three axes, and a Hopper GPU's copy engine can fetch a
block of it by its coordinates: no addresses, no masks, no registers. `blocks_of` gives that view.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_evolve.kernels.precision import INTERPRETED

UNIT = 16  # elements: 32 B of bfloat16, more than the 16 B of the widest load


class Matrices(NamedTuple):
    """Matrix e starts at base + offset_E[e] * unit; a kernel takes this tuple as one argument."""

    base: Tensor  # a matrix, that of the lowest address where they are evenly spaced
    offset_E: Tensor  # int64, in units
    unit: int  # UNIT where every offset is a multiple of it, so that the compiler may use wide loads; 1 otherwise
    rows: int
    columns: int
    row_stride: int  # elements
    column_stride: int
    count: int
    step: int  # elements from one matrix to the next, negative if they descend; 0: no even spacing

    @property
    def transposed(self) -> "Matrices":
        """The same memory read as columns x rows."""
        return self._replace(
            rows=self.columns, columns=self.rows, row_stride=self.column_stride, column_stride=self.row_stride
        )


def matrices(W: Tensor | Sequence[Tensor]) -> Matrices:
    """A stacked (E, rows, columns) tensor or E equal matrices, uncopied.

    The caller keeps them alive until the kernels that use them have been launched: only one is held here.
    Raises ValueError where E matrices differ in shape, strides, dtype or device.
    """
    if isinstance(W, Tensor):
        base, count, step = W[0], len(W), W.stride(0)
        unit, table_E = _even_table(count, step, base.device)
        return Matrices(base.detach(), table_E, unit, *base.shape, *base.stride(), count, step)
    first = W[0]
    shape, strides, dtype, device = first.shape, first.stride(), first.dtype, first.device
    for w in W:  # not a set of kinds: to hash four things of each of 128 matrices takes longer than to compare them
        if w.shape != shape or w.stride() != strides or w.dtype != dtype or w.device != device:
            kinds = len({(w.shape, w.stride(), w.dtype, w.device) for w in W})
            raise ValueError(
                f"the matrices of the experts must agree in shape, strides, dtype and device; got {kinds} kinds: "
                "make them contiguous, on one device"
            )
    size = first.element_size()
    addresses = [w.data_ptr() for w in W]
    steps = {b - a for a, b in pairwise(addresses)}
    step = steps.pop() // size if len(steps) == 1 else 0
    base = W[-1] if step < 0 else first
    if step:
        unit, table_E = _even_table(len(W), step, first.device)
    else:
        unit, table_E = _table(tuple((a - addresses[0]) // size for a in addresses), first.device)
    return Matrices(base.detach(), table_E, unit, *first.shape, *first.stride(), len(W), step)


@lru_cache(maxsize=256)
def _even_table(count: int, step: int, device: torch.device) -> tuple[int, Tensor]:
    lowest = min(0, step * (count - 1))
    return _table(tuple(e * step - lowest for e in range(count)), device)


@lru_cache(maxsize=4096)  # 32 kB of host memory each at 512 experts; a model needs a handful a layer
def _table(offsets: tuple[int, ...], device: torch.device) -> tuple[int, Tensor]:
    unit = UNIT if math.gcd(*offsets) % UNIT == 0 else 1
    return unit, torch.tensor([offset // unit for offset in offsets], dtype=torch.int64, device=device)


def blocks_of(W: Matrices, rows: int, columns: int) -> TensorDescriptor | None:
    """The matrices as one tensor (E, rows, columns) in blocks of 1 x `rows` x `columns`; None where they are not.

    For matrices whose rows lie in memory one after the other; of transposed ones ask for the blocks of `W.transposed`.
    """
    suits = W.column_stride == 1 and fetches_blocks(W.base.device)
    if not suits or not aligned(W.base, abs(W.step), W.row_stride):
        return None
    return TensorDescriptor(W.base, [W.count, W.rows, W.columns], [abs(W.step), W.row_stride, 1], [1, rows, columns])


def aligned(x: Tensor, *strides: int) -> bool:
    """Whether the copy engine takes a tensor from this address with these strides (elements): multiples of 16 bytes.

    And none of 0, as rows that are one row again and again have it: the gradient of a sum over rows.
    """
    return x.data_ptr() % 16 == 0 and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in strides)


@lru_cache(maxsize=64)
def fetches_blocks(device: torch.device) -> bool:
    """Whether this GPU, the current one, has a copy engine for blocks (Hopper and later).

    Triton's interpreter does as if.
    """
    if INTERPRETED.value:
        return True
    target = driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90
