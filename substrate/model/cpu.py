"""What Megatron-Core takes for granted of CUDA, supplied on a machine that has none.

`install` replaces names; no file of Megatron is edited. It belongs at the start of a worker process, before Megatron is
imported, and nowhere else: it changes torch for the whole process. Where a GPU is present it does nothing. Written
against megatron-core 0.19; collectives are gloo's.
"""

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from megatron_evolve.substrate import operations

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "empty_like", "zeros_like")
_installed = False


def install() -> None:
    """Make Megatron-Core run on this CPU. Idempotent; returns at once where a GPU is present.

    Raises RuntimeError if Megatron was imported before: its modules copy names that must be replaced first.
    """
    global _installed
    if _installed or torch.cuda.is_available():
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "cpu.install() must come before the first import of megatron.core; it was imported already: move it up"
        )
    # One thread adds in one order, so the same seed gives the same bits on any load; and two threads on cores that are
    # shared wait for each other spinning: a step of 0.1 s took 2. A caller with idle cores may raise it afterwards.
    torch.set_num_threads(1)
    _hide_packages()
    _replace_devices()
    _replace_streams()
    _replace_compiler()
    _replace_random_state()
    _replace_collectives()
    _installed = True


def _hide_packages() -> None:
    """What Megatron takes wherever it can be imported, its optimizer first of all, though it runs on a GPU alone."""
    for name in operations.MEGATRON_TAKES:
        if find_spec(name) is not None:
            sys.modules[name] = None  # type: ignore[assignment]  # an import of it now fails, and Megatron goes on


def _replace_devices() -> None:
    """`device="cuda"` literals, `current_device()` and type strings."""
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.set_device = lambda device: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    for name in _FACTORIES:  # literals in schedules, clip_grads, optimizer, param_and_grad_buffer, causal masks
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    type_of = torch.Tensor.type

    @functools.wraps(type_of)
    def cuda_type(self: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return type_of(self, dtype, *args, **kwargs)
        return type_of(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = cuda_type  # both optimizers and clip_grads compare it with "torch.cuda.FloatTensor"


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return on_cpu


class _Stream:
    """A stream or an event of a device that runs in order: there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> "_Stream":
        return self

    def wait_stream(self, other: Any = None) -> None:
        pass

    wait_event = record = wait = wait_stream

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def _replace_streams() -> None:
    """Streams and events: token dispatcher, gradient buffers, pipeline communication."""
    stream = _Stream()
    torch.cuda.Stream = torch.cuda.Event = _Stream
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None


def _replace_compiler() -> None:
    """No torch.compile of small functions: inductor needs a C++ compiler and gained nothing on CPU.

    Megatron decorates with it while it is imported, and the first decoration imports inductor: 0.9 of 3.3 s of
    start-up.
    """
    torch_compile = torch.compile
    torch.compile = lambda function=None, **options: function or (lambda decorated: decorated)
    try:
        import megatron.core.jit
    finally:
        torch.compile = torch_compile
    megatron.core.jit.disable_jit_fuser()


def _replace_random_state() -> None:
    """The tracker forks "the CUDA generator"; here that is torch's only one."""
    torch.cuda.manual_seed = torch.cuda.manual_seed_all = torch.default_generator.manual_seed
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # It warns if the CPU's generator moved inside a fork of the GPU's. Here they are one, so it always would.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _replace_collectives() -> None:
    """What gloo does not do as NCCL does."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    def split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Megatron converts only what comes from a GPU, and gloo's all-to-all takes a list of sizes, not a tensor.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = split_sizes
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_uneven(
        input_: Tensor, group: Any, output_split_sizes: Sequence[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        # gloo's allgather refuses ranks of different length (expert-tensor with expert parallelism); all-to-all does
        # not.
        if group.size() == 1 or output_split_sizes is None:
            return gather(input_, group, None, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        output = input_.new_empty(sum(sizes), *input_.shape[1:])
        copies = torch.cat([input_.contiguous()] * group.size())
        torch.distributed.all_to_all_single(output, copies, sizes, [len(input_)] * group.size(), group=group)
        return output

    def reduce_scatter_uneven(
        input_: Tensor, group: Any, input_split_sizes: Sequence[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if group.size() == 1 or input_split_sizes is None:
            return reduce_scatter(input_, group, None, use_global_buffer)
        sizes = [int(size) for size in input_split_sizes]
        mine = sizes[group.rank()]
        parts = input_.new_empty(mine * group.size(), *input_.shape[1:])
        torch.distributed.all_to_all_single(parts, input_.contiguous(), [mine] * group.size(), sizes, group=group)
        return parts.view(group.size(), mine, *input_.shape[1:]).sum(0)

    mappings._gather_along_first_dim = gather_uneven
    mappings._reduce_scatter_along_first_dim = reduce_scatter_uneven
