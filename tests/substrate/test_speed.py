"""The benchmark of training and decoding: the same losses and tokens first, then a ratio. No test asks for a speed."""

import pytest

from megatron_evolve.substrate import speed
from megatron_evolve.substrate.model import build

TINY = speed.sized("tiny", pattern="ME*", hidden_size=32, mamba_num_heads=4)


@pytest.fixture(scope="module", autouse=True)
def megatron():
    yield build.start(seed=1)
    build.stop()


def test_the_sizes_are_those_they_are_named_for():
    parameters = [architecture.num_parameters() for architecture, _, _ in speed.SIZES.values()]
    assert parameters == pytest.approx([1e6, 12.5e6], rel=0.05)


@pytest.mark.slow
def test_a_row_tells_both_speeds_and_their_ratio(monkeypatch):
    monkeypatch.setattr(speed, "SIZES", {"tiny": (TINY, 8, 16)})
    row = speed.train("tiny", 3)
    assert "reason" not in row and row["fastest"] in row["theirs"]
    assert row["ratio"][1] <= row["ratio"][0] <= row["ratio"][2] and row["ours_tokens_per_s"][0] > 0


@pytest.mark.slow
def test_other_losses_get_no_time(monkeypatch):
    monkeypatch.setattr(speed, "SIZES", {"tiny": (TINY, 8, 16)})
    theirs = speed.theirs

    def spoilt(architecture, state, experts):
        head = state["lm_head.weight"]
        return theirs(architecture, state | {"lm_head.weight": head + 0.1 * head.sign()}, experts)

    monkeypatch.setattr(speed, "theirs", spoilt)
    row = speed.train("tiny", 1)
    assert row["reason"].startswith("losses differ") and "ratio" not in row


@pytest.mark.slow
def test_decoding_gives_the_same_tokens(monkeypatch):
    monkeypatch.setattr(speed, "SIZES", {"tiny": (TINY, 8, 16)})
    monkeypatch.setattr(speed, "DECODED", 12)
    row = speed.decode("tiny")
    assert "reason" not in row and row["ratio"] > 0
