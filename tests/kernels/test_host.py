"""The host's part of a layer is measured without a GPU: what a layer launches, and what no checkout answers for."""

import pytest

from megatron_evolve.kernels.bench import host

# the map of tiles, fc1, fc2 and the sum; then the gradient through fc2, through fc1 and the sum; trained matrices add
# two gradients and the sorting of their operands; adapters four narrow products, four gradients and that sorting
LAUNCHES = {"frozen": 7, "full": 11, "lora": 17}


@pytest.mark.slow
def test_a_layer_launches_what_it_says_and_takes_time():
    rows = list(host.apart())
    assert [(row["shape"]["mode"], row["shape"]["experts"]) for row in rows] == list(host.CASES)
    assert all(row["launches"] == LAUNCHES[row["shape"]["mode"]] for row in rows), rows
    assert all(0 < row["least_ms"] <= row["median_ms"] for row in rows)


def test_what_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a checkout with kernels/"):
        list(host.beside(tmp_path, turns=1))
