"""Every row times the matrix of its own expert, for rows sorted by expert: the product that all ops here share.

    out[m, o] = scale * sum_i x[row(m), i] W_e[o, i]   +   sum_r u[m, r] B_e[o, r]        e = expert of row m

The second sum is a low-rank adapter (u = scale x A_e^T, made before by this same product): it ends the first in the
same float32 accumulator, so base and adapter are never rounded apart. `W.transposed` turns the forward product into the
input gradient. `row(m)` is m, or the token of a choice, so that rows need not be gathered in memory first. Operands
come by pointers, or in blocks by the copy engine of Hopper and later: both, where they lie in memory as they are summed
(`add_blocks`), or the matrix alone, where rows are read by choice (`add_rows`).

Letters: M rows, I and O input and output width, R adapter rank; BM, BN, BK the block of rows, columns and depth.
"""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_evolve.kernels.matrices import Matrices, aligned, blocks_of, fetches_blocks
from megatron_evolve.kernels.precision import check, dot, narrow
from megatron_evolve.kernels.tile_table import NARROW, Tile
from megatron_evolve.kernels.tiles import Tiling, launch_order

EARLY_RANK = tl.constexpr(32)  # 24 registers a thread at 128 x 256


class Rows(NamedTuple):
    """Rows as a kernel reads them: row m is `base[m]`, or `base[choice[m] // num_chosen]`, the token of the choice."""

    base: Tensor
    stride: int
    choice_of_row: Tensor | None
    num_chosen: int


class Adapter(NamedTuple):
    """The low-rank term of a product: scaled projections u (M, R) and the matrices that widen them."""

    u: Rows
    B: Matrices


def rows(x: Tensor, choice_of_row_M: Tensor | None = None, num_chosen: int = 1) -> Rows:
    """(M, I), or (T, I) with the choice of each row."""
    check(x, "rows")
    x = x if x.stride(-1) == 1 else x.contiguous()
    return Rows(x, x.stride(0), choice_of_row_M, num_chosen)


@triton.jit
def offset_of_row(x, m, live_M):
    """Where row m starts, in elements; int64, for 200,000 rows of 5,120 pass 2^31 at Ultra's width."""
    if x.choice_of_row is not None:
        m = tl.load(x.choice_of_row + m, mask=live_M, other=0) // x.num_chosen
    return m.to(tl.int64) * x.stride


@triton.jit
def add_product(acc, x, m, live_M, W, e, o, BK: tl.constexpr, EVEN: tl.constexpr):
    """acc[m, o] + sum_i x[row(m), i] W_e[o, i]; rows and columns beyond the edge count as zeros.

    EVEN: the sum has a whole number of blocks, so that the loop checks no edge.
    """
    k = tl.arange(0, BK)
    matrix = W.base + tl.load(W.offset_E + e) * W.unit
    x_at = x.base + offset_of_row(x, m, live_M)[:, None] + k[None, :]
    w_at = matrix + k[:, None] * W.column_stride + o[None, :] * W.row_stride
    live_N = o < W.rows
    for first in range(0, W.columns, BK):
        if EVEN:
            x_block = tl.load(x_at, mask=live_M[:, None], other=0.0)
            w_block = tl.load(w_at, mask=live_N[None, :], other=0.0)
        else:
            live_K = k < W.columns - first
            x_block = tl.load(x_at, mask=live_M[:, None] & live_K[None, :], other=0.0)
            w_block = tl.load(w_at, mask=live_K[:, None] & live_N[None, :], other=0.0)
        acc = dot(x_block, w_block, acc)
        x_at += BK
        w_at += BK * W.column_stride
    return acc


@triton.jit
def block_of_program(tiles, num_columns, BM: tl.constexpr, BN: tl.constexpr):
    """Expert (-1: none), first row, which rows are the expert's, columns and column block of this program."""
    tile, column = launch_order(tl.program_id(0), tiles.num_tiles, tl.cdiv(num_columns, BN))
    e = tl.load(tiles.expert_of_tile + tile)
    first = tl.load(tiles.row_of_tile + tile)
    live_M = first + tl.arange(0, BM) < tl.load(tiles.start_E1 + e + 1)  # e = -1 reads the first entry: no row is live
    return e, first, live_M, column * BN + tl.arange(0, BN), column


@triton.jit
def block_at(base, first, o, num_columns, BM: tl.constexpr):
    """Pointers to a block of a contiguous (M, num_columns) tensor: one 64-bit start, 32-bit steps from there.

    With 64-bit steps the epilogue of `fc2_gradient`, which has three such blocks, spilled 56 to 120 bytes a thread.
    """
    return base + first.to(tl.int64) * num_columns + (tl.arange(0, BM)[:, None] * num_columns + o[None, :])


@triton.jit
def adapter_blocks(u, B, m, live_M, e, o, BR: tl.constexpr):
    """u of these rows and B_e^T, loaded before the long sum that they end, so that nothing waits for them afterwards.

    For ranks up to EARLY_RANK; beyond, registers run short and `add_adapter` loads them.
    """
    if BR > 0 and BR <= EARLY_RANK:
        r = tl.arange(0, BR)
        live_R = r < B.columns
        u_at = u.base + offset_of_row(u, m, live_M)[:, None] + r[None, :]
        B_at = B.base + tl.load(B.offset_E + e) * B.unit + r[:, None] * B.column_stride + o[None, :] * B.row_stride
        u_block = tl.load(u_at, mask=live_M[:, None] & live_R[None, :], other=0.0)
        B_block = tl.load(B_at, mask=live_R[:, None] & (o < B.rows)[None, :], other=0.0)
    else:
        u_block, B_block = 0, 0
    return u_block, B_block


@triton.jit
def add_adapter(acc, early, u, B, m, live_M, e, o, BR: tl.constexpr):
    """acc[m, o] + sum_r u[m, r] B_e[o, r]"""
    if BR > EARLY_RANK:
        acc = add_product(acc, u, m, live_M, B, e, o, BR, False)
    elif BR > 0:
        acc = dot(early[0], early[1], acc)
    return acc


@triton.jit
def add_blocks(acc, x_blocks, first, W, W_blocks, e, o, BN: tl.constexpr, BK: tl.constexpr):
    """`add_product` with both operands fetched by the copy engine; rows of another expert in a block are never kept."""
    matrix = tl.where(W.step > 0, e, W.count - 1 - e)
    for k in range(0, W.columns, BK):
        w_block = W_blocks.load([matrix, o, k]).reshape(BN, BK).T
        acc = dot(x_blocks.load([first, k]), w_block, acc)
    return acc


@triton.jit
def add_rows(
    acc, x, m, live_M, W, W_blocks, e, column,
    BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """`add_product` for a block of columns; its matrix comes by the copy engine where there are W_blocks.

    TRANSPOSED: they are the blocks of `W.transposed`, as those lie in memory.
    """
    if W_blocks is None:
        acc = add_product(acc, x, m, live_M, W, e, column * BN + tl.arange(0, BN), BK, EVEN)
    else:
        k = tl.arange(0, BK)
        matrix = tl.where(W.step > 0, e, W.count - 1 - e)
        x_at = x.base + offset_of_row(x, m, live_M)[:, None] + k[None, :]
        for first in range(0, W.columns, BK):
            if EVEN:
                x_block = tl.load(x_at, mask=live_M[:, None], other=0.0)
            else:
                x_block = tl.load(x_at, mask=live_M[:, None] & (k < W.columns - first)[None, :], other=0.0)
            if TRANSPOSED:
                w_block = W_blocks.load([matrix, first, column * BN]).reshape(BK, BN)
            else:
                w_block = W_blocks.load([matrix, column * BN, first]).reshape(BN, BK).T
            acc = dot(x_block, w_block, acc)
            x_at += BK
    return acc


@triton.jit
def _product(
    x, W, u, B, scale, tiles, out, x_blocks, W_blocks,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    e, first, live_M, o, column = block_of_program(tiles, W.rows, BM, BN)
    if e < 0:
        return
    m = first + tl.arange(0, BM)
    early = adapter_blocks(u, B, m, live_M, e, o, BR)
    acc = tl.zeros([BM, BN], tl.float32)
    if W_blocks is not None:
        acc = add_blocks(acc, x_blocks, first, W, W_blocks, e, column * BN, BN, BK) * scale
    else:
        acc = add_product(acc, x, m, live_M, W, e, o, BK, EVEN) * scale
    acc = add_adapter(acc, early, u, B, m, live_M, e, o, BR)
    live = live_M[:, None] & (o < W.rows)[None, :]
    tl.store(block_at(out, first, o, W.rows, BM), narrow(acc, out.dtype.element_ty), mask=live)


def depth_of(adapter: Adapter | None) -> int:
    """The step over an adapter's rank: 16 at least for the tensor cores, 64 at most; 0 without one."""
    return 0 if adapter is None else min(64, max(16, 1 << (adapter.B.columns - 1).bit_length()))


def blocks_of_rows(x: Rows, rows: int, columns: int) -> TensorDescriptor | None:
    """Sorted rows in blocks for the copy engine; None where they are read by choice or do not suit it."""
    base = x.base
    suits = x.choice_of_row is None and base.numel() and fetches_blocks(base.device) and aligned(base, x.stride)
    return TensorDescriptor(base, list(base.shape), [x.stride, 1], [rows, columns]) if suits else None


def launch(tiling: Tiling, tile: Tile, W: Matrices, adapter: Adapter | None) -> tuple[tuple[int], dict[str, int]]:
    """Grid and compile-time constants of a product with as many columns as W has rows.

    An adapter, being narrow, gets narrow blocks. Numbers of four bytes go half as deep: 32 rows and 128 deep would take
    240 KiB of shared memory; a block has 227.
    """
    blocks, constants = _blocks(tile, W.rows, W.columns, W.base.element_size(), depth_of(adapter))
    return (tiling.map.num_tiles * blocks,), constants


@lru_cache(maxsize=1024)
def _blocks(tile: Tile, rows: int, columns: int, item_bytes: int, adapter_depth: int) -> tuple[int, dict[str, int]]:
    """Blocks of columns of the result, and the constants: the same dictionary every time, which nobody may change.

    A model has a handful, and a layer with adapters launches 13 times, forward and backward.
    """
    width = min(tile.columns, max(16, triton.next_power_of_2(rows)))
    depth = tile.depth * 2 // item_bytes
    constants = {"BM": tile.rows, "BN": width, "BK": depth, "BR": adapter_depth, "EVEN": columns % depth == 0}
    return triton.cdiv(rows, width), constants | {"num_warps": tile.warps, "num_stages": tile.stages}


def fetched_blocks(
    tile: Tile, W: Matrices, constants: dict[str, int], *, transposed: bool = False
) -> TensorDescriptor | None:
    """The matrix's blocks for `add_rows`; None where the tile has it come by pointers, or the engine cannot.

    Numbers of four bytes come by pointers, too: they are multiplied without tensor cores, in a check, and the fetched
    block would spill 12 kB a thread.
    """
    if not tile.fetched or W.base.element_size() > 2:
        return None
    if transposed:
        return blocks_of(W.transposed, constants["BK"], constants["BN"])
    return blocks_of(W, constants["BN"], constants["BK"])


def in_halves(constants: dict[str, int]) -> bool:
    """Whether what follows the sum takes its block in halves: over 64 sums a thread leave no room for another block.

    Of 128 sums a thread the gradient through fc2 spilled 384 to 450 bytes, an accumulating weight gradient 360.
    """
    return constants["BM"] * constants["BN"] > 64 * 32 * constants["num_warps"]


def product(x: Rows, W: Matrices, tiling: Tiling, adapter: Adapter | None = None, scale: float = 1.0) -> Tensor:
    """(M, O) in the dtype of the rows; W is E x (O, I). `scale` multiplies the first sum.

    Transposed matrices come by pointers: 650 TFLOP/s at 3,072 rows an expert of Nano on an H100 either way, where the
    copy engine brought the others from 530 to 650.
    """
    out_MO = x.base.new_empty(tiling.num_rows, W.rows)
    tile = tiling.tiles.adapter if W.rows <= NARROW else tiling.tiles.product
    grid, constants = launch(tiling, tile, W, adapter)
    if out_MO.numel():
        x_blocks = blocks_of_rows(x, constants["BM"], constants["BK"])
        W_blocks = None if x_blocks is None else blocks_of(W, constants["BN"], constants["BK"])
        x_blocks = None if W_blocks is None else x_blocks
        given = (x, W, *(adapter or (None, None)), scale, tiling.map, out_MO, x_blocks, W_blocks)
        _product[grid](*given, **constants)
    return out_MO
