"""Kernels write into memory that starts as NaN, so a cell that nobody wrote shows."""

import os

import pytest
import torch

# On a GPU the mode that fills memory also refuses cuBLAS without this; it is read when its first handle is made.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch fills what `torch.empty` returns in this mode: NaN in floats, the largest value in integers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
