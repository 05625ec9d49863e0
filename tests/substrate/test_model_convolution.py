"""flash-linear-attention's convolution is `mamba.causal_conv`: the package where it is installed, else its contract.

The kernel runs under Triton's interpreter, its first configuration in place of its tuning, which wants a GPU.
"""

import itertools
import sys
import types
from collections.abc import Iterator
from importlib import util
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_evolve.substrate import operations
from megatron_evolve.substrate.model import build, mamba
from megatron_evolve.substrate.operations import Choice
from tests.substrate.enlarged import SMALL, build_enlarged

LENGTHS = [5, 1, 24, 7]
CLOSE = 1e-5  # float32 sums of up to 39 tokens in another order, by norm


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    build.start(seed=1)
    yield
    build.stop()


def by_contract(
    x_BLC: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: str,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, None]:
    """The package's function as its page says it, by torch's own convolution, each sequence alone."""
    assert activation == "silu" and x_BLC.shape[-1] == len(weight) == len(bias)
    ends = [0, x_BLC.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    assert cu_seqlens is None or cu_seqlens_cpu.tolist() == ends
    parts = []
    for first, end in itertools.pairwise(ends):
        x_BCL = F.pad(x_BLC[:, first:end].transpose(1, 2), (weight.shape[1] - 1, 0))
        parts.append(F.silu(F.conv1d(x_BCL, weight.unsqueeze(1), bias, groups=len(weight))).transpose(1, 2))
    return torch.cat(parts, 1), None


@pytest.fixture(params=["contract", "package"])
def fla(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The module that is imported: one that keeps to the page, or the package itself."""
    if request.param == "package":
        if util.find_spec("fla") is None:
            pytest.skip("flash-linear-attention is not installed")
        if not torch.cuda.is_available():
            from triton.runtime.autotuner import Autotuner

            def first(self: Any, *args: Any, **kwargs: Any) -> Any:
                return self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())

            monkeypatch.setattr(Autotuner, "run", first)
        return request.param
    module = types.ModuleType("fla.modules.causal_conv1d")
    module.causal_conv1d = by_contract
    for one in (types.ModuleType("fla"), types.ModuleType("fla.modules"), module):
        one.__spec__ = ModuleSpec(one.__name__, None)
        monkeypatch.setitem(sys.modules, one.__name__, one)
    return request.param


@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients(fla: str, packed: bool) -> None:
    """On a slice of a wider projection, as the mixer has it."""
    from megatron_evolve.substrate.model.convolution import fla_causal_conv
    from megatron_evolve.substrate.model.packed import PackedSequences

    rng = torch.Generator().manual_seed(0)
    shape = (sum(LENGTHS), 1) if packed else (13, 3)
    leaves = [torch.randn(*size, generator=rng).requires_grad_() for size in ((*shape, 60), (48, 4), (48,))]
    dout = torch.randn(*shape, 48, generator=rng)
    sequences = PackedSequences(LENGTHS) if packed else None
    sequence_LB = None if sequences is None else sequences.seq_idx.t()

    def outcome(convolve: Any, known: Any) -> list[Tensor]:
        wide, weight, bias = leaves
        out = convolve(wide[..., 8:56], weight, bias, known)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    got, want = outcome(fla_causal_conv, sequences), outcome(mamba.causal_conv, sequence_LB)
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= CLOSE * other.norm()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's numbers")
@pytest.mark.parametrize("fla", ["contract"], indirect=True)
def test_a_model_takes_it_where_it_is_chosen(fla: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_evolve.substrate.model import layer_spec
    from megatron_evolve.substrate.model.packed import PackedSequences

    called: list[Tensor] = []
    convolve = layer_spec.fla_causal_conv
    monkeypatch.setattr(layer_spec, "fla_causal_conv", lambda *a, **k: called.append(a[0]) or convolve(*a, **k))

    def losses() -> Tensor:
        model = build_enlarged(SMALL.model_copy(update={"pattern": "MM"}), experts="triton")
        tokens = torch.randint(0, 77, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return model(tokens, None, None, labels=tokens.roll(-1, 1), packed_seq_params=PackedSequences(LENGTHS))

    want = losses()
    assert not called
    monkeypatch.setattr(operations, "convolution", lambda here: Choice("flash-linear-attention", "as if it were here"))
    torch.testing.assert_close(losses(), want)
    assert len(called) == 2
