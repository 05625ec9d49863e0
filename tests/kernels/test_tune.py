"""The search for tiles on a layer that the interpreter finishes: what wins, what is written, what a cut run leaves."""

import json

import pytest

from megatron_evolve.kernels import roofline, tile_table
from megatron_evolve.kernels.bench import tune
from megatron_evolve.kernels.tile_table import Tile, Tiles
from tests.kernels.expert_cases import DEVICE

SHAPE = "48x32"


@pytest.fixture
def small(monkeypatch):
    """One candidate for each product, with the matrix fetched or not where that is asked; two for weight gradients."""
    monkeypatch.setitem(roofline.MODELS, "tiny", (2, 1, 32, 48))
    monkeypatch.setattr(tune, "BY_ROWS", {16: ((64, 16, 4, 2),)})
    monkeypatch.setattr(tune, "ADAPTER", ((32, 32, 4, 2),))
    monkeypatch.setattr(tune, "GRADIENT", (Tile(64, 32, 16, 4, 2), Tile(64, 64, 16, 4, 2)))
    monkeypatch.setattr(tune.shares, "run", lambda *_: iter(()))
    monkeypatch.setattr(tune, "BUCKETS", (tune.Bucket(SHAPE, "tiny", 8, 1, None, (16,)),))


def test_every_candidate_is_a_row_and_the_table_gets_the_winners(small, tmp_path):
    file = tmp_path / "table.json"
    before = tile_table.FILE.read_text()
    *rows, winner = tune.rows(DEVICE, rounds=1, table=file)
    fetched = ("fc1", "fc1", "product", "fc2_gradient", "fc2_gradient", "adapter", "weight_gradient", "weight_gradient")
    assert tuple(row["kind"] for row in rows) == fetched
    assert [row["tile"][-1] for row in rows[:2]] == [False, True]
    assert all(row["median_ms"] is not None and row["tflops"] > 0 for row in rows), rows
    table = json.loads(file.read_text())
    (own,) = [entry for entry in table["entries"] if entry["shape"] == SHAPE]
    assert {"op": "entry"} | own == winner
    assert len({own[kind][0] for kind in Tiles._fields[:-1]}) == 1  # they share one map of tiles
    assert len(table["entries"]) == 1 + len(json.loads(before)["entries"])
    assert tile_table.FILE.read_text() == before
    assert list(tmp_path.iterdir()) == [file]


def row(kind: str, tile: tuple[int, ...], ms: float | None) -> dict:
    return {"op": "tile", "kind": kind, "tile": list(tile), "median_ms": ms, "shape": {"model": "tiny"}}


def test_rows_are_chosen_for_all_products_together():
    """32 rows are best for fc1 alone, 16 for the sum; a weight gradient has rows of its own, and what failed none."""
    bucket = tune.Bucket(SHAPE, "tiny", 24, 1, 8, (16, 32))
    times = {"fc1": (2.0, 1.0), "product": (1.0, 4.0), "fc2_gradient": (1.0, 1.0), "adapter": (1.0, 1.0)}
    rows = [
        row(kind, (tile_rows, 32, 16, 4, 2), ms)
        for kind, both in times.items()
        for tile_rows, ms in zip((16, 32), both, strict=True)
    ]
    rows += [row("fc1", (16, 64, 16, 4, 2), None), row("weight_gradient", (64, 32, 16, 4, 2), 1.0)]
    entry = tune.entry(rows, bucket)
    assert entry["fc1"] == entry["product"] == [16, 32, 16, 4, 2]
    assert entry["weight_gradient"] == [64, 32, 16, 4, 2] and entry["most_rows"] == 8
    with pytest.raises(ValueError, match="no tile of weight_gradient ran"):
        tune.entry(rows[:-1], bucket)


def test_a_run_that_is_cut_has_written_the_shapes_it_finished(small, monkeypatch, tmp_path):
    file = tmp_path / "table.json"
    done = tune.BUCKETS[0]._replace(tile_rows=(16,))
    monkeypatch.setattr(tune, "BUCKETS", (done, done._replace(shape=None)))

    def tune_once(device, bucket, clock, rounds):
        if bucket.shape is None:
            raise KeyboardInterrupt
        return [row(kind, (16, 32, 16, 4, 2), 1.0) for kind in Tiles._fields]

    monkeypatch.setattr(tune, "tune", tune_once)
    with pytest.raises(KeyboardInterrupt):
        list(tune.rows(DEVICE, rounds=1, table=file))
    assert any(entry["shape"] == SHAPE for entry in json.loads(file.read_text())["entries"])
