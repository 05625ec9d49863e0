"""The order to stop is carried out, whoever starts the controller again, and then it is over."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from megatron_evolve.desk import Awaiting, Stopped, Unavailable
from megatron_evolve.launch.rundir import RunDirError
from megatron_evolve.retries import Paused
from megatron_evolve.stopping import StopOrder


def ended(order: StopOrder, by: BaseException | None) -> bool:
    """Ends a controller that had the order; whether the next one has it too."""
    with pytest.raises(type(by)) if by is not None else nullcontext(), order.carried_out():
        if by is not None:
            raise by
    return StopOrder(order.file, lambda: False)()


@pytest.mark.parametrize("by", [None, Stopped(), Unavailable(), Awaiting(), Paused("nodes are down", {})])
def test_what_only_a_person_starts_again_needs_it_no_more(tmp_path: Path, by: Exception | None) -> None:
    (tmp_path / "stop").touch()
    assert not ended(StopOrder(tmp_path / "stop", lambda: False), by)


@pytest.mark.parametrize("by", [KeyboardInterrupt(), RunDirError("no space left"), ValueError("no partition x")])
def test_a_controller_that_dies_in_its_drain_leaves_it_to_the_next(tmp_path: Path, by: BaseException) -> None:
    """Every start took it away, so a requeued controller went on with the campaign."""
    (tmp_path / "stop").touch()
    assert ended(StopOrder(tmp_path / "stop", lambda: False), by)


def test_a_pod_that_drains_while_its_node_does_leaves_it_to_the_next(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    assert ended(StopOrder(tmp_path / "stop", lambda: True, moved=lambda: True), Stopped())


def test_an_order_once_seen_holds_though_the_file_be_taken_away(tmp_path: Path) -> None:
    """Jobs that wait were dropped by then, and the round was judged without them."""
    order = StopOrder(tmp_path / "stop", lambda: False)
    assert not order()
    order.file.touch()
    assert order()
    order.file.unlink()
    assert order()
