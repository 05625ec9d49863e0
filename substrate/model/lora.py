"""Low-rank adapters on dense linear layers and on grouped experts (Hu et al. 2021, arXiv 2106.09685).

    W x  becomes  W x + (alpha / rank) * B (A x),    A (rank, in), B (out, rank)

The base is frozen and keeps its state-dict keys: an adapted layer is the same module with two more parameters, `lora_A`
and `lora_B`, and a subclass's forward. Every expert has its own A and B, so the result does not depend on how experts
are spread over ranks. A is drawn from the seed and the layer's global name, B starts at zero: at step 0 the model is
unchanged, and the same in every parallel layout.

Tensor parallelism splits what the base splits: B of a column-parallel layer by rows, A of a row-parallel one by
columns. The rank-wide u = A x travels between ranks, never a layer-wide tensor. Import this file after `build.prepare`:
it needs Megatron.
"""

import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_evolve.substrate.model.experts import ExpertWeights
from megatron_evolve.substrate.model.head import OutputTable

KINDS = {
    "attention": ("self_attention.linear_qkv", "self_attention.linear_proj"),
    "mamba": ("mixer.in_proj", "mixer.out_proj"),
    "experts": ("experts.linear_fc1", "experts.linear_fc2"),
    "shared": ("shared_experts.linear_fc1", "shared_experts.linear_fc2"),
}
# Prediction heads only when named: transformers has none and the challenge's engine runs without, so what is learned in
# their adapters is not what is scored. (Megatron-Bridge's matcher takes them in, by the names of their layers.)
HEADS = "mtp"
TARGETS = {**KINDS, "output": ("output_layer",), HEADS: tuple(name for names in KINDS.values() for name in names)}


class _Column:
    """y = W x + scale * B (A x) over a column-parallel layer: A whole on every rank, B split by rows as W is."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the layer: (L, B, in) to (L, B, out of this rank)."""
        output, bias = super().forward(input_, *args, **kwargs)
        u, group = F.linear(input_, self.lora_A), _ranks()
        if self.config.sequence_parallel:
            u = gather_from_sequence_parallel_region(u, group=group)
        else:
            u = copy_to_tensor_model_parallel_region(u, group=group)
        if output.size(-1) == len(self.lora_B):
            return _add_product(output, u, self.lora_B, self.lora_scale), bias
        delta = F.linear(u * self.lora_scale, self.lora_B)  # the base has gathered its output over ranks
        return output + gather_from_tensor_model_parallel_region(delta, group=group), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As the layer; B is split along axis 0, and by parts where W packs several projections (Mamba)."""
        sharded = _sharded(self, {"weight": 0, "bias": 0, "lora_B": 0}, prefix, sharded_offsets, metadata)
        parts = getattr(self.weight, "partition_sizes", None)
        if parts is not None:
            names = ["z", "x", "B", "C", "dt"]
            sharded[f"{prefix}lora_B"] = _split_tensor_factory(sharded[f"{prefix}lora_B"], list(parts), names, 0)
        return sharded


class _Row:
    """y = W x + scale * B (A x) over a row-parallel layer: A split by columns as W is, B whole on every rank."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """As the layer: (L, B, in of this rank) to (L, B, out)."""
        output, bias = super().forward(input_)
        u, group = F.linear(input_, self.lora_A), _ranks()
        if self.config.sequence_parallel:
            u = reduce_scatter_to_sequence_parallel_region(u, group=group)
        else:
            u = reduce_from_tensor_model_parallel_region(u, group=group)
        return _add_product(output, u, self.lora_B, self.lora_scale), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As the layer; A is split along axis 1."""
        return _sharded(self, {"weight": 1, "lora_A": 1}, prefix, sharded_offsets, metadata)


@functools.cache
def _adapted_class(kind: type, base: type) -> type:
    """The layer's own class with an adapter's forward before it. Transformer Engine's exist only where it is there."""
    return type(f"Lora{base.__name__}", (kind, base), {})


def _ranks() -> torch.distributed.ProcessGroup:
    """The ranks that a dense layer is split over; Transformer Engine's and Megatron's keep it under other names."""
    return parallel_state.get_tensor_model_parallel_group()


def _add_product(output: Tensor, u: Tensor, B: Tensor, scale: float) -> Tensor:
    """output + scale * u B^T in one product, without a second tensor as wide as the output."""
    return torch.addmm(output.flatten(0, -2), u.flatten(0, -2), B.t(), alpha=scale).view_as(output)


def _sharded(
    module: torch.nn.Module, axes: dict[str, int], prefix: str, offsets: tuple, metadata: dict
) -> ShardedStateDict:
    state = module.state_dict(prefix="", keep_vars=True)
    groups = {"tp_group": _ranks(), "dp_cp_group": metadata["dp_cp_group"]}
    return make_sharded_tensors_for_checkpoint(state, prefix, axes, offsets, **groups)


def add_lora(model: torch.nn.Module, *, rank: int, alpha: float, targets: tuple[str, ...], seed: int) -> None:
    """Freeze `model` and put an adapter on every layer of `targets` (keys of TARGETS). Call it before data parallelism.

    The routers are frozen whole, their selection bias too: an adapter cannot carry the bias, so a bias that kept moving
    would be lost with it. Raises ValueError for an unknown or absent target, a model that has adapters already, and
    layers whose adapter would be wrong (norm and matrix in one, experts under expert tensor parallelism).
    """
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown or not targets:
        raise ValueError(f"adapter targets must be among {', '.join(TARGETS)}; got {unknown or 'none'}: name some")
    if any(True for _ in _adapted(model)):
        raise ValueError("a model takes adapters once; this one has them already: build it anew")
    found = {target: list(_layers(model, target)) for target in targets}
    for target, layers in found.items():
        if not layers and model.config.pipeline_model_parallel_size == 1:  # a pipeline stage may lack a kind of layer
            raise ValueError(f"target {target!r} must name layers of the model; it has none: leave the target out")
        for name, layer in layers:
            _check(name, layer)
    for module in model.modules():
        if hasattr(module, "frozen_expert_bias"):
            module.frozen_expert_bias = True
    model.requires_grad_(False)
    for name, layer in (named for layers in found.values() for named in layers):
        layer.lora_name, layer.lora_scale = name, alpha / rank
        if isinstance(layer, ExpertWeights):
            _adapt_experts(layer, rank, seed)
        else:
            _adapt_linear(layer, rank, seed)


def adapter_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """The adapters of this rank by global name, detached but not copied. Names do not depend on the pipeline layout."""
    return {
        f"{layer.lora_name}.{part}": getattr(layer, part).detach()
        for _, layer in _adapted(model)
        for part in ("lora_A", "lora_B")
    }


def load_adapter(model: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state`, as `adapter_state` gave it, into the adapters of `model`.

    Raises ValueError, before anything is copied, unless names and shapes are exactly those of the model.
    """
    own = adapter_state(model)
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or unknown:
        raise ValueError(
            f"an adapter must name the {len(own)} tensors of this model; {len(missing)} are missing {missing[:2]} and "
            f"{len(unknown)} are unknown {unknown[:2]}: call add_lora with the targets it was trained with"
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{name} must have shape {tuple(tensor.shape)}; got {tuple(state[name].shape)}: call add_lora with the "
                f"rank it was trained with, on the architecture and layout it was trained on"
            )
    for name, tensor in own.items():
        tensor.copy_(state[name])


def merge(model: torch.nn.Module) -> dict[str, Tensor]:
    """The state of the plain model with the adapters added into its matrices; `model` itself is left as it is.

    Each sum is taken in float32 and rounded once, so these are the bits that `substrate.merged` writes to files.
    """
    state = {
        name: value.detach()
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and not name.endswith((".lora_A", ".lora_B", "_extra_state"))
    }
    for name, layer in _adapted(model):
        A, B = layer.lora_A.detach().float(), layer.lora_B.detach().float()
        pairs = enumerate(zip(A, B, strict=True)) if isinstance(layer, ExpertWeights) else [("", (A, B))]
        for e, (A_e, B_e) in pairs:
            weight = state[f"{name}.weight{e}"]
            state[f"{name}.weight{e}"] = (weight.float() + layer.lora_scale * (B_e @ A_e)).to(weight.dtype)
    return state


def _adapted(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if getattr(module, "lora_A", None) is not None)


def _layers(model: torch.nn.Module, target: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """Layers of one target with their global names: a pipeline stage counts from 0, a name from the model's first."""
    for name, module in model.named_modules():
        if not f".{name}".endswith(tuple(f".{suffix}" for suffix in TARGETS[target])):
            continue
        if name.startswith(f"{HEADS}.") != (target == HEADS):
            continue
        local = re.match(r"(.*?\blayers)\.(\d+)\.(.*)", name)
        if local is not None:
            stem, index, rest = local.groups()
            name = f"{stem}.{model.get_submodule(f'{stem}.{index}').layer_number - 1}.{rest}"
        yield name, module


def _check(name: str, layer: torch.nn.Module) -> None:
    if isinstance(layer, ExpertWeights):
        if layer.pg_collection.expt_tp.size() > 1:
            # A of fc1 would be whole on ranks that each see part of its gradient, and nothing in Megatron sums those
            raise ValueError(
                f"expert adapters need expert tensor parallel size 1; {name} is split: use expert parallelism"
            )
        return
    if not _adapter_of(layer) or layer.weight is None:
        raise ValueError(
            f"an adapter needs a column- or row-parallel linear layer that holds its own weight; {name} is a "
            f"{type(layer).__name__}: build the model with a norm apart from its matrix, and untied embeddings"
        )
    communicates = getattr(layer, "explicit_expert_comm", False) or not getattr(layer, "input_is_parallel", True)
    if communicates:
        raise ValueError(f"an adapter needs {name} to do its own communication: turn moe_shared_expert_overlap off")


def _adapter_of(layer: torch.nn.Module) -> type | None:
    """The adapter that fits the layer, by what the layer is split along; None for a layer that takes none."""
    if type(layer) in (ColumnParallelLinear, OutputTable, TEColumnParallelLinear):
        return _Column
    return _Row if type(layer) in (RowParallelLinear, TERowParallelLinear) else None


def _adapt_linear(layer: torch.nn.Module, rank: int, seed: int) -> None:
    group, kind = _ranks(), _adapter_of(layer)
    column = kind is _Column
    width = layer.weight.size(1) * (1 if column else group.size())
    A = _draw(layer.lora_name, rank, width, seed).to(layer.weight)
    if not column:
        A = A.chunk(group.size(), dim=1)[group.rank()].contiguous()
    layer.register_parameter("lora_A", torch.nn.Parameter(A))
    layer.register_parameter("lora_B", torch.nn.Parameter(layer.weight.new_zeros(len(layer.weight), rank)))
    set_tensor_model_parallel_attributes(layer.lora_A, not column, -1 if column else 1, 1)
    set_tensor_model_parallel_attributes(layer.lora_B, column, 0 if column else -1, 1)
    # the side that sees only this rank's part of the sequence: Megatron sums its gradient over tensor-parallel ranks
    whole = layer.lora_A if column else layer.lora_B
    whole.sequence_parallel = layer.config.sequence_parallel
    layer.__class__ = _adapted_class(kind, type(layer))


def _adapt_experts(layer: ExpertWeights, rank: int, seed: int) -> None:
    weight = layer.weights[0]
    first = layer.pg_collection.ep.rank() * layer.num_local_experts
    A = [
        _draw(f"{layer.lora_name}.{first + e}", rank, weight.size(1), seed).to(weight)
        for e in range(layer.num_local_experts)
    ]
    layer.lora_A = torch.nn.Parameter(torch.stack(A))
    layer.lora_B = torch.nn.Parameter(weight.new_zeros(layer.num_local_experts, weight.size(0), rank))
    for parameter in (layer.lora_A, layer.lora_B):
        set_tensor_model_parallel_attributes(parameter, True, 0, 1)  # its own on every rank, as Megatron marks experts
        parameter.allreduce = weight.allreduce


def _draw(name: str, rank: int, width: int, seed: int) -> Tensor:
    """A (rank, width), uniform within 1 / sqrt(width) as in Hu et al.'s code; the same on every rank and machine."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    rng = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(rank, width).uniform_(-(width**-0.5), width**-0.5, generator=rng)
