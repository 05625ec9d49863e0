"""E matrices reach a kernel uncopied, stacked or apart, and alignment is claimed only where it holds."""

import pytest
import torch

from megatron_evolve.kernels.matrices import UNIT, blocks_of, matrices


def address(found, e: int) -> int:
    """Where a kernel would look for matrix e."""
    return found.base.data_ptr() + found.offset_E[e].item() * found.unit * found.base.element_size()


def test_stacked_and_apart_are_the_same_addresses():
    stacked = torch.randn(5, 32, 16)
    apart = [torch.randn(32, 16) for _ in range(5)]
    views = list(stacked.unbind())
    for W in (stacked, views, apart):
        found = matrices(W)
        assert [address(found, e) for e in range(5)] == [w.data_ptr() for w in W]
        assert (found.rows, found.columns, found.row_stride, found.column_stride) == (32, 16, 16, 1)
    assert matrices(stacked).offset_E is matrices(views).offset_E  # one table, uploaded once


def test_wide_loads_are_promised_only_where_every_matrix_is_aligned():
    assert matrices(torch.zeros(3, 8, 16)).unit == UNIT
    assert matrices(torch.zeros(3, 97, 47)).unit == 1
    assert matrices(torch.zeros(1, 97, 47)).unit == UNIT  # one matrix starts at the base itself


def test_transposed_is_the_same_memory():
    found = matrices(torch.zeros(2, 3, 5)).transposed
    assert (found.rows, found.columns, found.row_stride, found.column_stride) == (5, 3, 1, 5)


def test_unequal_matrices_are_refused():
    with pytest.raises(ValueError, match=r"must agree in shape, strides, dtype and device; got 2 kinds"):
        matrices([torch.zeros(4, 4), torch.zeros(4, 4).t()[:, :4].contiguous().t()])


def test_even_spacing_is_seen_in_either_order():
    """Megatron's parameter buffer holds the experts last first."""
    stacked = torch.randn(4, 8, 16)
    ascending, descending = matrices(list(stacked.unbind())), matrices(list(stacked.unbind())[::-1])
    assert (ascending.step, descending.step) == (128, -128)
    assert ascending.base.data_ptr() == descending.base.data_ptr() == stacked.data_ptr()
    assert [address(descending, e) for e in range(4)] == [w.data_ptr() for w in stacked.unbind()[::-1]]
    assert matrices([stacked[0], stacked[1], stacked[3]]).step == 0
    assert matrices(stacked[:1].expand(3, -1, -1)).step == 0


def test_the_copy_engine_gets_what_suits_it_alone():
    assert blocks_of(matrices(torch.zeros(3, 8, 16)), 8, 16).block_shape == [1, 8, 16]
    assert blocks_of(matrices(torch.zeros(3, 8, 16)).transposed, 8, 16) is None
    assert blocks_of(matrices(torch.zeros(3, 97, 47)), 16, 16) is None  # rows of 188 bytes
    stacked = torch.zeros(4, 8, 16)
    assert blocks_of(matrices([stacked[0], stacked[1], stacked[3]]), 8, 16) is None  # not evenly spaced
