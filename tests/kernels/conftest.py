"""Kernels write into memory that starts as NaN, so a cell that nobody wrote shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch fills what `torch.empty` returns in this mode: NaN in floats, the largest value in integers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
