"""The gradient of every expert's matrix: for rows sorted by expert, a sum over the rows of each.

    dW_e[o, i] (+)= sum over the rows m of e of dy[m, o] x[m, i]

One program sums its block of one matrix in row order, so the same rows give the same bits. Both operands must stand
sorted in memory: reading one by choice, an index for every row of every step of the sum, ran at 250 TFLOP/s on an H100
where sorted rows reach 540, and sorting them first is one pass of memory. Whole steps of the sum check no edge; what is
left of an expert's rows comes last. With many rows an expert the copy engine fetches the blocks, which leaves registers
for wider ones: 625 TFLOP/s at 3,072 rows an expert, but 115 against 170 at 96.

Letters: M rows, O and I output and input width; BM, BN, BK the block of the matrix and the step of the sum.
"""

from functools import lru_cache

import triton
import triton.language as tl

from megatron_evolve.kernels.grouped_product import Rows, blocks_of_rows, in_halves
from megatron_evolve.kernels.matrices import Matrices
from megatron_evolve.kernels.precision import dot, narrow
from megatron_evolve.kernels.tile_table import NARROW, Tile
from megatron_evolve.kernels.tiles import Tiling, launch_order

FETCHED_ROWS = 1024  # mean rows an expert from which the copy engine pays
# An adapter's gradient is one row or column of blocks: small ones, or most multiprocessors would have none.
ADAPTER_TILE = Tile(128, 128, 64, warps=4, stages=3)


@triton.jit
def _write(acc, out, matrix, o, i, ACCUMULATE: tl.constexpr):
    at = matrix + o[:, None] * out.row_stride + i[None, :] * out.column_stride
    live = (o < out.rows)[:, None] & (i < out.columns)[None, :]
    if ACCUMULATE:
        acc += tl.load(at, mask=live, other=0.0)
    tl.store(at, narrow(acc, out.base.dtype.element_ty), mask=live)


@triton.jit
def _weight_gradient(
    dy, x, start_E1, out, dy_blocks, x_blocks,
    ACCUMULATE: tl.constexpr, HALVES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(1)
    i_block, o_block = launch_order(tl.program_id(0), tl.cdiv(out.columns, BN), tl.cdiv(out.rows, BM))
    o, i, k = o_block * BM + tl.arange(0, BM), i_block * BN + tl.arange(0, BN), tl.arange(0, BK)
    start, end = tl.load(start_E1 + e), tl.load(start_E1 + e + 1)
    if ACCUMULATE and start == end:
        return
    live_O, live_I = o < out.rows, i < out.columns
    whole = (end - start) // BK
    acc = tl.zeros([BM, BN], tl.float32)
    if dy_blocks is not None:
        for n in range(whole):
            dy_block = dy_blocks.load([start + n * BK, o_block * BM])
            acc = dot(dy_block.T, x_blocks.load([start + n * BK, i_block * BN]), acc)
    else:
        dy_at = dy.base + start.to(tl.int64) * dy.stride + (k[None, :] * dy.stride + o[:, None])
        x_at = x.base + start.to(tl.int64) * x.stride + (k[:, None] * x.stride + i[None, :])
        for _ in range(whole):
            dy_block = tl.load(dy_at, mask=live_O[:, None], other=0.0)
            acc = dot(dy_block, tl.load(x_at, mask=live_I[None, :], other=0.0), acc)
            dy_at += BK * dy.stride
            x_at += BK * x.stride
    first = start + whole * BK
    if first < end:
        live_K = first + k < end
        dy_at = dy.base + first.to(tl.int64) * dy.stride + (k[None, :] * dy.stride + o[:, None])
        x_at = x.base + first.to(tl.int64) * x.stride + (k[:, None] * x.stride + i[None, :])
        dy_block = tl.load(dy_at, mask=live_O[:, None] & live_K[None, :], other=0.0)
        acc = dot(dy_block, tl.load(x_at, mask=live_K[:, None] & live_I[None, :], other=0.0), acc)
    matrix = out.base + tl.load(out.offset_E + e) * out.unit
    if HALVES:
        half: tl.constexpr = BN // 2
        acc_0, acc_1 = tl.split(tl.permute(tl.reshape(acc, (BM, 2, half)), (0, 2, 1)))
        i = i_block * BN + tl.arange(0, half)
        _write(acc_0, out, matrix, o, i, ACCUMULATE)
        _write(acc_1, out, matrix, o, i + half, ACCUMULATE)
    else:
        _write(acc, out, matrix, o, i, ACCUMULATE)


@lru_cache(maxsize=1024)
def _blocks(tile: Tile, rows: int, columns: int, item_bytes: int) -> tuple[int, dict[str, int]]:
    """Blocks of one matrix, and their sizes: the same dictionary every time, which nobody may change."""
    bm, bn = (min(most, max(16, triton.next_power_of_2(n))) for most, n in ((tile.rows, rows), (tile.columns, columns)))
    sizes = {"BM": bm, "BN": bn, "BK": tile.depth * 2 // item_bytes}
    sizes |= {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.cdiv(rows, bm) * triton.cdiv(columns, bn), sizes


def weight_gradient(dy: Rows, x: Rows, tiling: Tiling, out: Matrices, *, accumulate: bool) -> None:
    """Write dW_e = dy_e^T x_e, E x (O, I), into `out`, or add it there (a float32 main gradient, in place).

    An expert without rows gets zeros, or is not touched when adding. Raises ValueError for rows read by choice.
    """
    if dy.choice_of_row is not None or x.choice_of_row is not None:
        raise ValueError("a weight gradient needs rows sorted in memory; got rows read by choice: gather them first")
    E, narrow_side = out.count, min(out.rows, out.columns) <= NARROW
    tile = ADAPTER_TILE if narrow_side else tiling.tiles.weight_gradient
    blocks, sizes = _blocks(tile, out.rows, out.columns, x.base.element_size())
    bm, bn, bk = sizes["BM"], sizes["BN"], sizes["BK"]
    dy_blocks = x_blocks = None
    if tiling.num_rows >= FETCHED_ROWS * E and not narrow_side:
        dy_blocks, x_blocks = blocks_of_rows(dy, bk, bm), blocks_of_rows(x, bk, bn)
    if dy_blocks is None or x_blocks is None:
        dy_blocks = x_blocks = None
    given = (dy, x, tiling.map.start_E1, out, dy_blocks, x_blocks)
    _weight_gradient[blocks, E](*given, ACCUMULATE=accumulate, HALVES=accumulate and in_halves(sizes), **sizes)
