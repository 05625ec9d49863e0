"""A process group of one: every collective is a copy.

gloo opens a listening socket and two threads for each of Megatron's twenty groups even for one process, and wants a
host name that resolves. A run on one process needs none of it. Registered with torch as the backend "alone" (CPU
tensors).
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

NAME = "alone"


def register() -> None:
    """Make `init_process_group("alone", ...)` known to torch. Idempotent."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, _create, devices=["cpu"])


def _create(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> "ProcessGroupAlone":
    if world_size != 1:
        raise ValueError(f'backend "alone" serves one process; got a world of {world_size}: use gloo')
    return ProcessGroupAlone(rank, world_size)


def _done(result: Any = None) -> dist.Work:
    future: Future = Future()
    future.set_result(result)
    return torch._C._distributed_c10d._create_work_from_future(future)


def _copy(outputs: list[Tensor], inputs: list[Tensor]) -> dist.Work:
    for output, value in zip(outputs, inputs, strict=True):
        if output.data_ptr() != value.data_ptr():
            output.copy_(value.view_as(output))
    return _done(outputs)


class ProcessGroupAlone(dist.ProcessGroup):
    """Collectives over rank 0 alone, with the method names torch dispatches to."""

    def getBackendName(self) -> str:
        return NAME

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        return _done(tensors)

    allreduce_coalesced = broadcast = reduce = allreduce

    def barrier(self, opts: Any = None) -> dist.Work:
        return _done()

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        return _copy([output for (output,) in outputs], inputs)

    gather = allgather

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> dist.Work:
        return _copy(outputs, [value for (value,) in inputs])

    reduce_scatter = scatter

    def all_gather_single(self, output: Tensor, value: Tensor, opts: Any = None) -> dist.Work:
        return _copy([output], [value])

    reduce_scatter_single = gather_single = all_gather_single
    # what torch called the two before 2.15
    _allgather_base = _reduce_scatter_base = all_gather_single

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        return _copy(outputs, inputs)

    reduce_scatter_single_coalesced = alltoall = all_gather_single_coalesced
    allgather_into_tensor_coalesced = reduce_scatter_tensor_coalesced = all_gather_single_coalesced

    def all_to_all_single(
        self, output: Tensor, value: Tensor, output_sizes: list[int], input_sizes: list[int], opts: Any = None
    ) -> dist.Work:
        return _copy([output], [value])

    alltoall_base = all_to_all_single
