"""The table of tiles: complete, its rows shared, and the choice by shape and rows per expert."""

import pytest

from megatron_evolve.kernels.tile_table import Tiles, chosen, entries


def test_the_table_ends_and_its_products_share_rows():
    assert any(entry.shape is None and entry.most_rows is None for entry in entries())
    for entry in entries():
        assert len({tile.rows for tile in entry.tiles[:-1]}) == 1, entry
        assert all(tile.warps in (4, 8) and tile.stages >= 2 for tile in entry.tiles), entry
        others = (entry.tiles.product, entry.tiles.adapter, entry.tiles.weight_gradient)
        assert not any(tile.fetched for tile in others), "these choose for themselves"


@pytest.mark.parametrize("shape", list(dict.fromkeys(entry.shape for entry in entries())))
def test_every_shape_has_an_entry_for_any_number_of_rows(shape):
    most = [entry.most_rows for entry in entries() if entry.shape == shape]
    assert most[-1] is None and most[:-1] == sorted(most[:-1]) and len(set(most)) == len(most)


def test_few_rows_choose_small_tiles_and_a_shape_of_its_own_goes_first():
    small, large = chosen(1856, 2688, 16 * 4, 16), chosen(1856, 2688, 16 * 4096, 16)
    assert isinstance(small, Tiles) and small.fc1.rows < large.fc1.rows
    own = next(entry for entry in entries() if entry.shape == "1856x2688")
    assert chosen(1856, 2688, own.most_rows * 16, 16) == own.tiles
    assert chosen(1, 1, 1, 1) == next(entry.tiles for entry in entries() if entry.shape is None)
