"""Which rows of which expert each tile of a grouped product covers.

Rows stand sorted by expert. A tile holds rows of one expert only, so expert e needs ceil(count_e / rows) tiles. How
many that are is known on the device alone; the host launches the upper bound

    floor(M / rows) + min(E, M)

and programs beyond the last tile return at once. Nothing is read back, so the launch needs no synchronisation and may
be captured in a CUDA graph.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_evolve.kernels.tile_table import Tiles, chosen

# Rows of one wide tile are launched column by column for this many tiles, so that a weight block read once from memory
# serves them all from L2.
GROUP = tl.constexpr(8)
MAP_BLOCK = 64


class TileMap(NamedTuple):
    """A kernel takes this tuple as one argument."""

    start_E1: Tensor  # int32 (E + 1,), first row of each expert, then M
    expert_of_tile: Tensor  # int32, -1 beyond the last tile
    row_of_tile: Tensor  # int32, first row of the tile
    num_tiles: int  # the host's upper bound


class Tiling(NamedTuple):
    """The rows of one layer cut into tiles, once for all its products, forward and backward."""

    num_rows: int
    tiles: Tiles
    map: TileMap


@triton.jit
def _tile_map(
    counts_E,
    start_E1,
    expert_of_tile,
    row_of_tile,
    E,
    num_tiles,
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    e = tl.arange(0, BE)
    counts = tl.load(counts_E + e, mask=e < E, other=0).to(tl.int32)
    start = tl.cumsum(counts, 0) - counts
    tiles = (counts + ROWS - 1) // ROWS
    end_tile = tl.cumsum(tiles, 0)
    if tl.program_id(0) == 0:
        tl.store(start_E1, 0)
        tl.store(start_E1 + 1 + e, start + counts, mask=e < E)
    tile = tl.program_id(0) * BT + tl.arange(0, BT)
    # The expert of a tile is the number of experts whose tiles all lie before it.
    expert = tl.sum((end_tile[None, :] <= tile[:, None]).to(tl.int32), 1)
    own = expert[:, None] == e[None, :]
    row = tl.sum(tl.where(own, (start - (end_tile - tiles) * ROWS)[None, :], 0), 1) + tile * ROWS
    tl.store(expert_of_tile + tile, tl.where(expert < E, expert, -1), mask=tile < num_tiles)
    tl.store(row_of_tile + tile, row, mask=tile < num_tiles)


def tile_map(counts_E: Tensor, num_rows: int, tile_rows: int) -> TileMap:
    """The tiles of `num_rows` rows of which expert e has counts_E[e]; the counts must sum to num_rows (not checked)."""
    counts_E = counts_E.contiguous()
    E = counts_E.numel()
    num_tiles = num_rows // tile_rows + min(E, num_rows)
    new = {"dtype": torch.int32, "device": counts_E.device}
    start_E1, expert_of_tile, row_of_tile = (torch.empty(n, **new) for n in (E + 1, num_tiles, num_tiles))
    found = TileMap(start_E1, expert_of_tile, row_of_tile, num_tiles)
    grid = (max(-(-num_tiles // MAP_BLOCK), 1),)
    _tile_map[grid](counts_E, *found[:3], E, num_tiles, ROWS=tile_rows, BT=MAP_BLOCK, BE=1 << (E - 1).bit_length())
    return found


def tiling(counts_E: Tensor, num_rows: int, shape: tuple[int, int], tiles: Tiles | None = None) -> Tiling:
    """Tiles for rows sorted by expert; counts_E as in `tile_map`, on the rows' device.

    `shape` is that of the layer's first matrices, rows and columns; `tiles` replaces what the table has for it.
    """
    tiles = tiles or chosen(*shape, num_rows, counts_E.numel())
    return Tiling(num_rows, tiles, tile_map(counts_E, num_rows, tiles.fc1.rows))


@triton.jit
def launch_order(program, num_tiles, num_columns):
    """(tile, column block) of a program: down GROUP tiles, then to the next column."""
    span = GROUP * num_columns
    first = (program // span) * GROUP
    height = tl.minimum(num_tiles - first, GROUP)
    inside = program % span
    return first + inside % height, inside // height
