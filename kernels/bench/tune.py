"""The tile of each product of an expert layer, found by timing a bounded list of candidates on the GPU that is here.

    megatron-evolve bench tiles --out rows.jsonl --write

Every candidate runs on the same tensors as the others, in turns, from a cold L2. One that gives another result than
the first, or cannot be launched, gets no time but a reason. All products whose result has a row per row share the
tile's rows: for each number of rows the best of every product is taken, and the rows with the least sum win. `--write`
puts the winners into `kernels/tile_table.json`, which the ops read, `--table FILE` the whole table into another file.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_evolve.kernels import roofline
from megatron_evolve.kernels.bench import problem as problems
from megatron_evolve.kernels.bench import shares
from megatron_evolve.kernels.bench.clock import Clock, interleaved
from megatron_evolve.kernels.bench.rows import FAILURES, commit, device_name, first_line
from megatron_evolve.kernels.tile_table import FILE, Tile, Tiles, chosen, shape_key

# columns, depth, warps, stages. 256 columns waste 9.4 % of 1856 and 4.5 % of 2688, and read each row half as often.
WIDE = ((128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (256, 64, 8, 3), (256, 64, 8, 4))
MEDIUM = ((128, 64, 4, 3), (128, 64, 4, 4), (128, 128, 4, 3), (256, 64, 4, 3), (256, 64, 8, 4))
SMALL = ((64, 128, 4, 4), (128, 128, 4, 3), (128, 128, 4, 4), (256, 128, 8, 3))
BY_ROWS = {16: SMALL, 32: SMALL, 64: MEDIUM, 128: WIDE, 256: ((128, 64, 8, 3), (128, 64, 8, 4))}
ADAPTER = ((32, 64, 4, 4), (32, 128, 4, 3), (32, 64, 8, 4), (32, 128, 8, 3))
GRADIENT = (
    Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 4, 3), Tile(128, 128, 32, 8, 4),
    Tile(128, 256, 64, 8, 3), Tile(128, 256, 64, 8, 4), Tile(256, 128, 64, 8, 3),
)  # fmt: skip
FETCHING = ("fc1", "fc2_gradient")  # their rows come by choice; whether their matrix comes by the copy engine is asked


class Bucket(NamedTuple):
    """Layers of one shape up to so many mean rows per expert, measured at one of them."""

    shape: str | None  # for the table; None: every shape that has no entries of its own
    model: str
    tokens: int
    ep: int
    most_rows: int | None
    tile_rows: tuple[int, ...]  # tried


BUCKETS = (
    Bucket("1856x2688", "nano", 128, 1, 8, (16,)),
    Bucket("1856x2688", "nano", 512, 1, 32, (16, 32)),
    Bucket("1856x2688", "nano", 1024, 1, 64, (32, 64)),
    Bucket("1856x2688", "nano", 2048, 1, 128, (64, 128)),
    Bucket("1856x2688", "nano", 8192, 1, 512, (64, 128)),
    Bucket("1856x2688", "nano", 2048, 8, 1024, (128, 256)),
    Bucket("1856x2688", "nano", 8192, 8, None, (128, 256)),
    Bucket(None, "super", 48, 8, 16, (16,)),
    Bucket(None, "super", 96, 8, 32, (16, 32)),
    Bucket(None, "super", 256, 8, 96, (32, 64)),
    Bucket(None, "super", 1024, 8, 512, (64, 128)),
    Bucket(None, "super", 4096, 8, None, (128, 256)),
    Bucket("5120x2048", "ultra", 96, 8, 32, (16, 32)),
    Bucket("5120x2048", "ultra", 256, 8, 96, (32, 64)),
    Bucket("5120x2048", "ultra", 1024, 8, 512, (64, 128)),
    Bucket("5120x2048", "ultra", 2048, 8, None, (128, 256)),
)


class Layer(NamedTuple):
    """A layer's tensors, and what each product reads and writes."""

    v: problems.Experts
    x_MH: Tensor  # the tokens, sorted
    h_MF: Tensor
    adapter: Tensor  # (E, 32, H)


def layer(bucket: Bucket, device: str) -> Layer:
    shape = roofline.shape_of(bucket.model, bucket.tokens, bucket.ep)
    v = problems.experts(shape, "frozen", 0.0, torch.bfloat16, device)
    h_MF = torch.randn(shape.rows, shape.hidden, device=device, dtype=torch.bfloat16)
    x_MH = v.x_TH.detach()[v.plan.token_of_row_M]
    return Layer(v, x_MH, h_MF, torch.randn(shape.experts, 32, shape.width, device=device, dtype=torch.bfloat16))


def with_tile(tiles: Tiles, kind: str, tile: Tile) -> Tiles:
    """`tiles` with that one; its rows become those of all, but for a weight gradient."""
    if kind == "weight_gradient":
        return tiles._replace(weight_gradient=tile)
    same = {name: getattr(tiles, name)._replace(rows=tile.rows) for name in Tiles._fields if name != "weight_gradient"}
    return Tiles(**same | {"weight_gradient": tiles.weight_gradient} | {kind: tile})


def candidates(kind: str, tile_rows: int) -> tuple[Tile, ...]:
    if kind == "weight_gradient":
        return GRADIENT
    tiles = tuple(Tile(tile_rows, *rest) for rest in (ADAPTER if kind == "adapter" else BY_ROWS[tile_rows]))
    return tiles + tuple(tile._replace(fetched=True) for tile in tiles if kind in FETCHING)


def runs_of(at: Layer, tiles: Tiles) -> dict[str, tuple[Callable[[], Tensor], int]]:
    """By product: what runs it with these tiles, and its FLOP. Two products of a kind run one after the other."""
    from megatron_evolve.kernels.fc1 import fc1_squared_relu
    from megatron_evolve.kernels.fc2_gradient import fc2_gradient
    from megatron_evolve.kernels.grouped_product import product, rows
    from megatron_evolve.kernels.matrices import matrices
    from megatron_evolve.kernels.tiles import tiling
    from megatron_evolve.kernels.weight_gradient import weight_gradient

    v, K = at.v, at.v.p_TK.size(1)
    (M, F), H = at.h_MF.shape, v.x_TH.size(1)
    tiled = tiling(v.plan.counts_E, M, (F, H), tiles)
    W1, W2, p_TK = matrices(v.W1_EFH), matrices(v.W2_EHF), v.p_TK.detach()
    choice = v.plan.choice_of_row_M
    x, dy = (rows(t.detach(), choice, K) for t in (v.x_TH, v.dout_TH))
    x_sorted = rows(at.x_MH)
    h = rows(at.h_MF)

    def weights() -> Tensor:
        dW1, dW2 = torch.empty_like(v.W1_EFH), torch.empty_like(v.W2_EHF)
        weight_gradient(h, x_sorted, tiled, matrices(dW1), accumulate=False)
        weight_gradient(x_sorted, h, tiled, matrices(dW2), accumulate=False)
        return dW1

    def through_fc2() -> Tensor:
        place = {"choice_of_row": choice, "keep_a": False}
        return fc2_gradient(dy, p_TK, at.h_MF, W2.transposed, tiled, **place)[0]

    def both_ways() -> Tensor:
        product(h, W1.transposed, tiled)
        return product(h, W2, tiled)

    one = 2 * M * F * H
    return {
        "fc1": (lambda: fc1_squared_relu(x, p_TK, W1, tiled)[0], one),
        "product": (both_ways, 2 * one),
        "fc2_gradient": (through_fc2, one),
        "adapter": (lambda: product(x, matrices(at.adapter), tiled), 2 * M * 32 * H),
        "weight_gradient": (weights, 2 * one),
    }


def pieces(bucket: Bucket) -> Iterator[tuple[str, Tile]]:
    """Kind and candidate; weight gradients once, for they do not share the tile's rows."""
    for tile_rows in bucket.tile_rows:
        for kind in Tiles._fields[:-1]:
            yield from ((kind, tile) for tile in candidates(kind, tile_rows))
    yield from (("weight_gradient", tile) for tile in GRADIENT)


def warm(device: str, buckets: tuple[Bucket, ...], mine: shares.Turn) -> None:
    """Run this share of the candidates once, so that they are compiled."""
    for bucket in buckets:
        at, base = layer(bucket, device), chosen(0, 0, 2**20, 1)
        for kind, tile in pieces(bucket):
            if mine():
                try:
                    runs_of(at, with_tile(base, kind, tile))[kind][0]()
                    torch.cuda.synchronize()
                except FAILURES:
                    pass  # told by the row of the timed run, which fails the same way


def tune(device: str, bucket: Bucket, clock: Clock, rounds: int) -> Iterator[dict]:
    """A row for each candidate of each product, in the order of `pieces`."""
    at, base = layer(bucket, device), chosen(0, 0, 2**20, 1)
    shape = {"model": bucket.model, "tokens": bucket.tokens, "ep": bucket.ep, "rows": at.h_MF.shape[0]}
    shape |= {"experts": len(at.v.W1_EFH), "matrix": shape_key(*at.v.W1_EFH.shape[1:])}
    found: dict[str, dict[Tile, tuple]] = {}
    for kind, tile in pieces(bucket):
        found.setdefault(kind, {})[tile] = runs_of(at, with_tile(base, kind, tile))[kind]
    for kind, by_tile in found.items():
        reasons, runs, want, got = {}, {}, None, None
        for tile, (run, _) in by_tile.items():
            try:
                got = run()
                want = got if want is None else want
                off = problems.error(got, want)
                reasons |= {} if off < 2e-2 else {tile: f"wrong: off by {off:.2g} of the first candidate's result"}
            except FAILURES as failure:
                reasons[tile] = first_line(failure)
            if tile not in reasons:
                runs[tile] = (run, None)
        del want, got
        times = interleaved(runs, clock, (at.v.x_TH.detach(),), rounds=rounds, warm=2)
        for tile, (_, flops) in by_tile.items():
            row = {"op": "tile", "kind": kind, "tile": list(tile), "shape": shape, "median_ms": None}
            row |= {"reason": reasons[tile]} if tile in reasons else {}
            if tile in times:
                spread = times[tile]["forward"]
                row |= {"median_ms": spread.median, "spread_ms": [spread.low, spread.high]}
                row["tflops"] = flops / spread.median * 1e-9
            yield row | {"device": device_name(device), "commit": commit()}


def entry(rows: list[dict], bucket: Bucket) -> dict:
    """The table's entry from the rows of one bucket."""

    def best(kind: str, tile_rows: int | None = None) -> dict:
        fit = [row for row in rows if row["kind"] == kind and row["median_ms"]]
        fit = [row for row in fit if tile_rows is None or row["tile"][0] == tile_rows]
        if not fit:
            raise ValueError(f"no tile of {kind} ran for {rows[0]['shape']}: the rows before say why each did not")
        return min(fit, key=lambda row: row["median_ms"])

    shared = Tiles._fields[:-1]
    by_rows = {n: {kind: best(kind, n) for kind in shared} for n in bucket.tile_rows}
    rows_of = min(by_rows, key=lambda n: sum(row["median_ms"] for row in by_rows[n].values()))
    tiles = {kind: row["tile"] for kind, row in by_rows[rows_of].items()}
    tiles["weight_gradient"] = best("weight_gradient")["tile"]
    return {"shape": bucket.shape, "most_rows": bucket.most_rows} | tiles


def write(entries: list[dict], device: str, into: Path = FILE) -> None:
    """The table with these entries in place of those of the same shapes, whole or not at all."""
    table = json.loads(FILE.read_text(encoding="utf-8"))
    shapes = {found["shape"] for found in entries}
    kept = [old for old in table["entries"] if old["shape"] not in shapes]
    source = f"megatron-evolve bench tiles on {device_name(device)}, commit {commit() or 'unknown'}"
    lines = ",\n".join(f"    {json.dumps(row)}" for row in (*kept, *entries))
    half = into.with_name(f"{into.name}.half")
    half.write_text(f'{{\n  "source": {json.dumps(source)},\n  "entries": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
    half.replace(into)


def rows(device: str, *, rounds: int, table: Path | None = None) -> Iterator[dict]:
    """Every bucket's candidates and its entry; with `table` that file is written anew after each shape."""
    yield from shares.run(["-m", "megatron_evolve.kernels.bench.tune"], shares.num_shares())
    entries, clock = [], Clock(device)
    for bucket, after in zip_longest(BUCKETS, BUCKETS[1:]):
        found = list(tune(device, bucket, clock, rounds))
        entries.append(entry(found, bucket))
        yield from found
        yield {"op": "entry"} | entries[-1]
        if table is not None and (after is None or after.shape != bucket.shape):
            write(entries, device, table)
        torch.cuda.empty_cache()


if __name__ == "__main__":  # one share of the candidates, to be compiled
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", required=True)
    warm("cuda", BUCKETS, shares.turn(parser.parse_args().share))
