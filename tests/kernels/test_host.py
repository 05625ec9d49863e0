"""The host's part of a layer is measured without a GPU: what a layer launches, and what no checkout answers for."""

import pytest

from megatron_evolve.kernels.bench import host

# the map of tiles, fc1, fc2 and the sum; then the gradient through fc2, through fc1 and the sum; trained matrices add
# two gradients and the sorting of their operands; adapters four narrow products, four gradients and that sorting
LAUNCHES = {"frozen": 7, "full": 11, "lora": 17}


@pytest.mark.slow
def test_a_layer_launches_what_it_says_and_takes_time():
    """Beside itself, so that both processes answer."""
    rows = list(host.rows(host.OWN, rounds=3))
    for row, (mode, num_experts) in zip(rows[::2], host.CASES, strict=True):
        assert (row["shape"]["mode"], row["shape"]["experts"]) == (mode, num_experts)
        assert row["launches"] == LAUNCHES[mode], row
        assert 0 < row["least_ms"] <= row["median_ms"] and row["ratio_to"]["other"] > 0
    assert [row["checkout"] for row in rows] == ["this", "other"] * len(host.CASES)


def test_what_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a checkout with kernels/"):
        list(host.rows(tmp_path))
