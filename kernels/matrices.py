"""E matrices of one shape, wherever they lie in memory, as a kernel reads or writes them.

Megatron keeps the experts of a layer as E separate parameters (`weight0`, `weight1`, ...), and its main gradients as E
views of one buffer; other callers hold one stacked tensor. A kernel takes all three in one form and nothing is copied:
the first matrix gives the pointer, and a table of E offsets, in elements from there, gives the others. The table is
uploaded once for a set of addresses and kept, so that a step of training uploads nothing and a CUDA graph may hold it.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

UNIT = 16  # elements: 32 B of bfloat16, more than the 16 B of the widest load


class Matrices(NamedTuple):
    """Matrix e starts at base + offset_E[e] * unit; a kernel takes this tuple as one argument."""

    base: Tensor  # the first matrix, or all of them stacked
    offset_E: Tensor  # int64, in units
    unit: int  # UNIT where every offset is a multiple of it, so that the compiler may use wide loads; 1 otherwise
    rows: int
    columns: int
    row_stride: int  # elements
    column_stride: int

    @property
    def transposed(self) -> "Matrices":
        """The same memory read as columns x rows."""
        return self._replace(
            rows=self.columns, columns=self.rows, row_stride=self.column_stride, column_stride=self.row_stride
        )


def matrices(W: Tensor | Sequence[Tensor]) -> Matrices:
    """A stacked (E, rows, columns) tensor or E equal matrices, uncopied.

    The caller keeps them alive until the kernels that use them have been launched: only the first is held here.
    Raises ValueError where E matrices differ in shape, strides, dtype or device.
    """
    if isinstance(W, Tensor):
        first, count = W[0], len(W)
        offsets = tuple(e * W.stride(0) for e in range(count))
    else:
        first = W[0]
        kinds = {(w.shape, w.stride(), w.dtype, w.device) for w in W}
        if len(kinds) > 1:
            raise ValueError(
                f"the matrices of the experts must agree in shape, strides, dtype and device; got {len(kinds)} kinds: "
                "make them contiguous, on one device"
            )
        offsets = tuple((w.data_ptr() - first.data_ptr()) // w.element_size() for w in W)
    unit = UNIT if math.gcd(*offsets) % UNIT == 0 else 1
    table_E = _table(tuple(offset // unit for offset in offsets), first.device)
    return Matrices(first.detach(), table_E, unit, *first.shape, *first.stride())


@lru_cache(maxsize=4096)  # 32 kB of host memory each at 512 experts; a model needs a handful a layer
def _table(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(offsets, dtype=torch.int64, device=device)
