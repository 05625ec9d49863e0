"""The grouped products by every way that their operands reach them, and with every tile that the table may name."""

import pytest
import torch

from megatron_evolve.kernels import grouped_product, reference
from megatron_evolve.kernels import weight_gradient as weight_gradients
from megatron_evolve.kernels.fc1 import fc1_squared_relu
from megatron_evolve.kernels.fc2_gradient import fc2_gradient
from megatron_evolve.kernels.grouped_product import Adapter, blocks_of_rows, product, rows
from megatron_evolve.kernels.matrices import matrices
from megatron_evolve.kernels.tile_table import Tile, Tiles
from megatron_evolve.kernels.tiles import tiling
from megatron_evolve.kernels.weight_gradient import weight_gradient
from tests.kernels.expert_cases import DEVICE, FLOAT32

COUNTS = (20, 0, 33)  # rows of another expert stand in a block of the second; the first and third end inside one
WIDTHS = {"fetched": (48, 64), "by pointers": (47, 61)}  # the copy engine wants rows of a multiple of 16 bytes


def tiles(rows: int, columns: int) -> Tiles:
    tile = Tile(rows, columns, 32, 4, 2)
    return Tiles(tile, tile, tile, tile, Tile(32, columns, 16, 4, 2))


def normal(*size: int, seed: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.fixture(params=WIDTHS)
def problem(request):
    """Rows sorted by expert, their counts, matrices, and a tiling of small tiles."""
    width, out = WIDTHS[request.param]
    counts = torch.tensor(COUNTS, dtype=torch.int32, device=DEVICE)
    x_MI, W_EOI = normal(sum(COUNTS), width, seed=0), normal(len(COUNTS), out, width, seed=1) / width**0.5
    return request.param, x_MI, counts, W_EOI, tiling(counts, len(x_MI), (out, width), tiles(16, 32))


def oracle(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    counts = torch.tensor(COUNTS, device=DEVICE)
    return reference.grouped_linear(x.double(), counts, W.double())


def fetches(monkeypatch) -> list[bool]:
    """Whether each product from here on had its operands fetched in blocks."""
    seen = []
    original = grouped_product.blocks_of

    def blocks_of(*given):
        found = original(*given)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(grouped_product, "blocks_of", blocks_of)
    return seen


def test_a_product_is_right_fetched_or_by_pointers(problem, monkeypatch):
    name, x, _, W, tiled = problem
    seen = fetches(monkeypatch)
    assert error(product(rows(x), matrices(W), tiled), oracle(x, W)) < FLOAT32
    assert seen == ([True] if name == "fetched" else [])  # odd rows do not get so far
    stacked = W.flip(0).contiguous()
    descending = [stacked[len(COUNTS) - 1 - e] for e in range(len(COUNTS))]
    assert error(product(rows(x), matrices(descending), tiled), oracle(x, W)) < FLOAT32
    apart = [w.clone() for w in W]
    assert error(product(rows(x), matrices(apart), tiled), oracle(x, W)) < FLOAT32


def test_another_experts_nan_stays_there(problem):
    _, x, _, W, tiled = problem
    x = x.clone()
    x[COUNTS[0] :] = float("nan")
    got = product(rows(x), matrices(W), tiled)
    assert torch.isfinite(got[: COUNTS[0]]).all() and got[COUNTS[0] :].isnan().all()
    out = torch.empty_like(W)
    weight_gradient(rows(normal(len(x), W.size(1), seed=2)), rows(x), tiled, matrices(out), accumulate=False)
    assert torch.isfinite(out[0]).all() and (out[1] == 0).all() and out[2].isnan().all()


@pytest.mark.parametrize("rank", [3, 40, 70])
def test_adapters_of_any_rank_end_the_sum(problem, rank):
    """Up to 32 loaded early, beyond 64 in steps."""
    _, x, _, W, tiled = problem
    u, B = normal(len(x), rank, seed=3), normal(len(COUNTS), W.size(1), rank, seed=4) / rank**0.5
    want = oracle(x, W) + oracle(u, B)
    assert error(product(rows(x), matrices(W), tiled, Adapter(rows(u), matrices(B))), want) < FLOAT32


@pytest.mark.parametrize("fetched", [True, False])
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("columns", [32, 256])  # 256 columns go over in halves
def test_weight_gradients(problem, monkeypatch, fetched, accumulate, columns):
    _, x, _, W, tiled = problem
    monkeypatch.setattr(weight_gradients, "FETCHED_ROWS", 0 if fetched else 10**9)
    monkeypatch.setattr(weight_gradients, "NARROW", 0)
    tiled = tiled._replace(tiles=tiles(16, columns)._replace(weight_gradient=Tile(64, columns, 16, 4, 2)))
    dy = normal(len(x), W.size(1), seed=5)
    parts = zip(dy.split(COUNTS), x.split(COUNTS), strict=True)
    want = torch.stack([a.double().t() @ b.double() for a, b in parts])
    out = torch.full_like(W, 0.5 if accumulate else float("nan"))
    weight_gradient(rows(dy), rows(x), tiled, matrices(out), accumulate=accumulate)
    assert error(out, want + 0.5 * accumulate) < FLOAT32
    assert (out[1] == 0.5 * accumulate).all()  # an expert without rows


def test_rows_that_are_one_row_again_and_again_come_by_pointers(problem, monkeypatch):
    """The gradient of a sum over rows has a stride of 0, which the copy engine does not take."""
    _, x, _, W, tiled = problem
    monkeypatch.setattr(weight_gradients, "FETCHED_ROWS", 0)
    monkeypatch.setattr(weight_gradients, "NARROW", 0)
    dy = normal(1, W.size(1), seed=5).expand(len(x), -1)
    assert dy.stride(0) == 0 and blocks_of_rows(rows(dy), 16, 16) is None
    out = torch.empty_like(W)
    weight_gradient(rows(dy), rows(x), tiled, matrices(out), accumulate=False)
    parts = zip(dy.split(COUNTS), x.split(COUNTS), strict=True)
    assert error(out, torch.stack([a.double().t() @ b.double() for a, b in parts])) < FLOAT32


def test_a_weight_gradient_refuses_rows_read_by_choice(problem):
    _, x, _, W, tiled = problem
    choice = torch.arange(len(x), dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="rows sorted in memory; got rows read by choice"):
        weight_gradient(rows(x), rows(x, choice, 1), tiled, matrices(W), accumulate=False)


def test_fc2s_gradient_by_halves_is_that_in_one_piece(problem):
    """A block of 64 x 256 over four warps goes through the activation in halves, one of 16 x 32 does not."""
    _, dy, counts, W, _ = problem
    h, p = normal(len(dy), W.size(1), seed=6), normal(len(dy), seed=7).sigmoid()
    found = []
    for shape in ((16, 32), (64, 256)):
        tiled = tiling(counts, len(dy), (W.size(1), W.size(2)), tiles(*shape))
        found.append(fc2_gradient(rows(dy), p, h, matrices(W), tiled, keep_a=True))
    for one, other in zip(*found, strict=True):
        assert error(one, other.double()) < FLOAT32
    da, r = oracle(dy, W), h.double().relu()
    assert error(found[1][0], 2 * p.double()[:, None] * r * da) < FLOAT32
    assert error(found[1][1], (r**2 * da).sum(1)) < FLOAT32


def spread(W: torch.Tensor, how: str) -> torch.Tensor | list[torch.Tensor]:
    """The same matrices evenly spaced, upwards or downwards in memory, or each where it happens to lie."""
    if how == "descending":
        turned = W.flip(0).contiguous()
        return [turned[len(W) - 1 - e] for e in range(len(W))]
    return [w.clone() for w in W] if how == "apart" else W


@pytest.mark.parametrize("how", ["stacked", "descending", "apart"])
def test_rows_by_choice_times_a_fetched_matrix(problem, monkeypatch, how):
    """fc1 and the gradient through fc2: the same bits as by pointers, an expert's NaN in its own rows alone."""
    name, x, _, W, tiled = problem
    x, W = x.bfloat16(), W.bfloat16()  # numbers of four bytes are never fetched so
    ways = [tiled, tiled._replace(tiles=Tiles(*(tile._replace(fetched=True) for tile in tiled.tiles)))]
    K, choice = 2, torch.randperm(2 * len(x), device=DEVICE)[: len(x)].to(torch.int32)
    p = normal(len(x), K, seed=8).sigmoid()
    W[2] = float("nan")
    parts = spread(W, how), spread(W.mT.contiguous(), how)  # held here: `matrices` keeps one of them alive
    W1, W2 = matrices(parts[0]), matrices(parts[1]).transposed
    h = normal(len(x), W.size(1), seed=9).bfloat16()
    seen, found = fetches(monkeypatch), []
    for way in ways:
        by_choice = rows(x, choice, K)
        place = {"choice_of_row": choice, "keep_a": True}
        found.append([*fc1_squared_relu(by_choice, p, W1, way), *fc2_gradient(by_choice, p, h, W2, way, **place)])
    assert seen == [name == "fetched" and how != "apart"] * 2
    for pointers, fetched in zip(*found, strict=True):
        assert torch.equal(pointers, fetched) or torch.equal(pointers.isnan(), fetched.isnan())
        assert torch.equal(pointers[: COUNTS[0]], fetched[: COUNTS[0]])
    h_MF, tokens = found[1][0], choice.long() // K
    assert error(h_MF[: COUNTS[0]], oracle(x[tokens], W)[: COUNTS[0]]) < 2**-8  # rounded once
    assert h_MF[COUNTS[0] :].isnan().all()
