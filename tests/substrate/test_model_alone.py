"""Every collective of a group of one, through torch's public functions: the output is the input."""

import pytest
import torch
import torch.distributed as dist

from megatron_evolve.substrate.model import alone


@pytest.fixture(scope="module", autouse=True)
def group():
    alone.register()
    alone.register()  # twice is fine
    dist.init_process_group(alone.NAME, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.arange(6.0).view(2, 3)


def _nan() -> torch.Tensor:
    return torch.full((2, 3), float("nan"))


def test_reductions_leave_the_tensor_alone(x: torch.Tensor) -> None:
    for collective in (dist.all_reduce, lambda t: dist.broadcast(t, 0), lambda t: dist.reduce(t, 0)):
        t = x.clone()
        collective(t)
        assert torch.equal(t, x)
    work = dist.all_reduce(t, async_op=True)
    work.wait()
    assert work.is_completed() and torch.equal(t, x)
    dist.barrier()


@pytest.mark.parametrize(
    "collective",
    [
        lambda out, x: dist.all_gather([out], x),
        lambda out, x: dist.all_gather_into_tensor(out, x),
        lambda out, x: dist.reduce_scatter(out, [x]),
        lambda out, x: dist.reduce_scatter_tensor(out, x),
        lambda out, x: dist.all_to_all([out], [x]),
        lambda out, x: dist.all_to_all_single(out, x),
        lambda out, x: dist.all_to_all_single(out, x, [2], [2]),
        lambda out, x: dist.gather(x, [out]),
        lambda out, x: dist.scatter(out, [x]),
    ],
)
def test_output_is_the_input(x: torch.Tensor, collective) -> None:
    out = _nan()
    collective(out, x)
    assert torch.equal(out, x)


def test_coalesced(x: torch.Tensor) -> None:
    outs = [_nan(), _nan()]
    with dist.distributed_c10d._coalescing_manager(async_ops=True) as work:
        dist.all_gather_into_tensor(outs[0], x)
        dist.all_gather_into_tensor(outs[1], x + 1)
    work.wait()
    assert torch.equal(outs[0], x) and torch.equal(outs[1], x + 1)


def test_objects() -> None:
    gathered = [None]
    dist.all_gather_object(gathered, {"a": 1})
    assert gathered == [{"a": 1}]
    several = [{"b": 2}]
    dist.broadcast_object_list(several, 0)
    assert several == [{"b": 2}]


def test_in_place_views_are_safe(x: torch.Tensor) -> None:
    dist.all_gather_into_tensor(x, x)
    assert torch.equal(x, torch.arange(6.0).view(2, 3))


def test_refuses_company() -> None:
    with pytest.raises(ValueError, match="serves one process; got a world of 2"):
        alone._create(dist.HashStore(), 0, 2, None)
