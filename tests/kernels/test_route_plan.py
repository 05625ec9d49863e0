"""The Triton route plan and tile map against the definition, entry by entry, and their laws."""

import pytest
import torch

from megatron_evolve.kernels import reference, route_plan, tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# T, E, K and which experts a token may choose; blocks hold 128 choices and 64 experts
CASES = {
    "plain": (96, 8, 2, None),
    "prime": (61, 7, 3, None),
    "one choice": (33, 5, 1, None),
    "all chosen": (40, 6, 6, None),
    "many experts": (50, 150, 4, None),
    "one expert": (9, 1, 1, None),
    "empty experts": (70, 9, 2, (1, 3, 8)),
    "one expert takes all": (150, 5, 1, (2,)),
    "exactly one block": (64, 4, 2, None),
    "no rows": (0, 4, 2, None),
}


def choices(case: str) -> tuple[torch.Tensor, int]:
    T, E, K, allowed = CASES[case]
    pool = torch.tensor(allowed if allowed is not None else range(E))
    order = torch.rand(T, len(pool), generator=torch.Generator().manual_seed(0)).argsort(-1)
    return pool[order[:, :K]].to(DEVICE), E


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_plan_is_the_definitions(case, dtype):
    idx, E = choices(case)
    want, got = reference.route_plan(idx, E), route_plan.route_plan(idx.to(dtype), E)
    for name, a, b in zip(want._fields, got, want, strict=True):
        assert a.dtype == torch.int32
        assert torch.equal(a.long(), b), name


def test_an_index_that_names_no_expert_stays_within_the_plan():
    """It counts as the nearest expert's; nothing is written, or read later, beyond the tensors."""
    idx = torch.tensor([[0, 9], [-3, 2], [1, 1 << 30]], device=DEVICE)
    got, want = route_plan.route_plan(idx, 4), route_plan.route_plan(idx.clamp(0, 3), 4)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_counts_may_be_a_column_of_something():
    counts = torch.tensor([[3, 99], [0, 99], [5, 99]], dtype=torch.int32, device=DEVICE)[:, 0]
    got, want = tiles.tile_map(counts, 8, 16), tiles.tile_map(counts.clone(), 8, 16)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3], strict=True))


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("case", CASES)
def test_tiles_cover_every_row_once_and_cross_no_expert(case, rows):
    idx, E = choices(case)
    counts = torch.bincount(idx.flatten(), minlength=E)
    tile_map = tiles.tile_map(counts, idx.numel(), rows)
    start = tile_map.start_E1.tolist()
    assert start == [0, *counts.cumsum(0).tolist()]
    covered = []
    experts = tile_map.expert_of_tile.tolist()
    for e, first in zip(experts, tile_map.row_of_tile.tolist(), strict=True):
        if e >= 0:
            assert start[e] <= first < start[e + 1]
            covered += range(first, min(first + rows, start[e + 1]))
    assert covered == list(range(idx.numel()))
    used = sum(e >= 0 for e in experts)
    assert all(e < 0 for e in experts[used:])
    assert used == sum(-(-count // rows) for count in counts.tolist())


def test_tile_bound_is_reached():
    """Every expert one row over a whole number of tiles: the bound floor(M / rows) + min(E, M) is exact."""
    tile_map = tiles.tile_map(torch.tensor([17, 33, 1], device=DEVICE), 51, 16)
    assert (tile_map.expert_of_tile >= 0).all()
    assert tile_map.num_tiles == 51 // 16 + 3


def test_launch_order_visits_every_block_once():
    triton = pytest.importorskip("triton")
    import triton.language as tl

    @triton.jit
    def visit(out, num_tiles, num_columns):
        tile, column = tiles.launch_order(tl.program_id(0), num_tiles, num_columns)
        tl.store(out + tl.program_id(0), tile * num_columns + column)

    for num_tiles, num_columns in [(1, 1), (8, 3), (11, 2), (19, 5)]:
        out = torch.empty(num_tiles * num_columns, dtype=torch.int32, device=DEVICE)
        visit[(num_tiles * num_columns,)](out, num_tiles, num_columns)
        assert sorted(out.tolist()) == list(range(num_tiles * num_columns))


@pytest.mark.parametrize("case", ["plain", "one expert takes all"])
def test_same_choices_same_plan(case):
    idx, E = choices(case)
    first, second = (route_plan.route_plan(idx, E) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
