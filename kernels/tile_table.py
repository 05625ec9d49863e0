"""Which tile each product of an expert layer runs with: a table in a file, written by a benchmark, read by the ops.

    megatron-evolve bench tiles          # on a GPU: times the candidates and writes `tile_table.json`

An entry holds for one shape of matrix (`1856x2688`: fc1's rows and columns; null: any other) up to so many mean rows
per expert. Both are known on the host, and there are few of either, so that a process compiles a handful of kernels
and picks the same ones every time; nothing is tuned while a model runs. All products whose result has a row per row
share the tile's rows, since they share one map of tiles.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("tile_table.json")


class Tile(NamedTuple):
    """One program's block of a product, and how it is compiled."""

    rows: int
    columns: int
    depth: int  # of the sum, in one step of the loop
    warps: int
    stages: int  # of loads in flight
    fetched: bool = False  # fc1 and fc2_gradient: the matrix comes by the copy engine, where it can


class Tiles(NamedTuple):
    """One layer's tiles, by product."""

    fc1: Tile  # gather, product, p relu^2
    product: Tile  # fc2, and fc1's input gradient
    fc2_gradient: Tile  # product, relu^2's gradient, p's gradient
    adapter: Tile  # a result no wider than NARROW
    weight_gradient: Tile  # the sum runs over rows; here `rows` x `columns` is a block of the matrix


NARROW = 64  # columns; an adapter's rank is 8 to 64


class Entry(NamedTuple):
    shape: str | None
    most_rows: int | None  # mean rows per expert; None: any number
    tiles: Tiles


@lru_cache(maxsize=1)
def entries() -> tuple[Entry, ...]:
    """The table, smallest numbers of rows first."""
    found = [
        Entry(row["shape"], row["most_rows"], Tiles(*(Tile(*row[kind]) for kind in Tiles._fields)))
        for row in json.loads(FILE.read_text(encoding="utf-8"))["entries"]
    ]
    return tuple(sorted(found, key=lambda entry: float("inf") if entry.most_rows is None else entry.most_rows))


def mean_rows(entry: Entry) -> int:
    """A mean number of rows per expert for which the ops choose that entry of the table."""
    others = [other.most_rows for other in entries() if other.shape == entry.shape and other.most_rows]
    return entry.most_rows or 2 * max(others, default=256)


def shape_key(rows: int, columns: int) -> str:
    return f"{rows}x{columns}"


def chosen(rows: int, columns: int, num_rows: int, num_experts: int) -> Tiles:
    """The tiles of a layer whose first matrices are rows x columns, for `num_rows` rows over `num_experts`."""
    for key in (shape_key(rows, columns), None):
        for entry in entries():
            if entry.shape == key and (entry.most_rows is None or num_rows <= entry.most_rows * num_experts):
                return entry.tiles
    raise ValueError(f"{FILE.name} must end in an entry for any shape and any number of rows; it has none: add it")
