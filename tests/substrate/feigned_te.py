"""Transformer Engine's norm and linear as far as Megatron's wrappers call them, computed by torch on any device.

The wrappers themselves are Megatron's own (`megatron/core/extensions/transformer_engine.py`), read once more over these
classes. Signatures and marks on weights are those of transformer-engine 2.6.
"""

import sys
import types
from importlib import util
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

VERSION = "2.6.0"


class ExtraState(torch.nn.Module):
    """Both keep scales of 8-bit arithmetic beside their weights: without it, a tensor of no bytes."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state is None or state.numel() == 0


class Linear(ExtraState):
    """`transformer_engine.pytorch.Linear` on one tensor-parallel rank."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: str = "cuda",
    ) -> None:
        super().__init__()
        assert tp_size == 1 and not (fuse_wgrad_accumulation or bias or return_bias)
        self.parallel_mode, self.use_bias, self.tp_size = parallel_mode, bias, tp_size
        self.in_features, self.out_features = in_features, out_features
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=params_dtype))
        self.weight.tensor_model_parallel = True
        self.weight.partition_dim, self.weight.partition_stride = int(parallel_mode == "row"), 1
        init_method(self.weight)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return F.linear(inp, self.weight)


class RMSNorm(ExtraState):
    """`transformer_engine.pytorch.RMSNorm`."""

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        device: str = "cuda",
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape, device=device, dtype=params_dtype))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def megatrons_wrappers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Megatron's module of Transformer Engine's layers, over the two classes above. Call `build.prepare` before."""
    from megatron.core import utils
    from megatron.core.extensions import transformer_engine as absent

    monkeypatch.setattr(utils, "_te_version", utils.PkgVersion(VERSION))
    pytorch = types.ModuleType("transformer_engine.pytorch")
    pytorch.Linear, pytorch.RMSNorm = Linear, RMSNorm
    for name in ("LayerNormLinear", "DotProductAttention", "GroupedLinear"):  # bases of wrappers that nobody builds
        setattr(pytorch, name, type(name, (torch.nn.Module,), {}))
    pytorch.distributed = MagicMock(CudaRNGStatesTracker=object)
    pytorch.ops = pytorch.fp8 = MagicMock()
    whole = MagicMock(pytorch=pytorch, __version__=VERSION)
    whole.common.recipe.DelayedScaling = object
    spec = util.spec_from_file_location("feigned_wrappers", absent.__file__)
    module = util.module_from_spec(spec)
    packages = {"": whole, ".pytorch": pytorch, ".pytorch.fp8": pytorch.fp8}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        for name, package in packages.items():
            patch.setitem(sys.modules, f"transformer_engine{name}", package)
        spec.loader.exec_module(module)
    assert module.HAVE_TE
    return module
