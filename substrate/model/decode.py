"""One token at a time: what each layer must remember, and the model's own modules run on the newest token.

A Mamba layer keeps the last inputs of its convolution and its state, attention keeps keys and values, experts keep
nothing. `prefill` reads whole prompts and makes the state, `step` takes one token per row and replaces it. Weights are
never copied: linear layers are called as modules, so adapters on them are seen. Prompts are padded on the *left*, which
lets every row of a batch write to the same column; a padded token has step 0 in the scan, zero input in the convolution
and no key.

L tokens, B rows, other letters as in `mamba`.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_evolve.substrate.model import mamba

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from torch.nn import Module


@dataclass(frozen=True)
class MambaMemory:
    """Convolution inputs (K-1, B, C) and state (B, H, P, N)."""

    conv: Tensor
    ssm: Tensor

    def rows(self, keep: Tensor) -> "MambaMemory":
        return MambaMemory(self.conv.index_select(1, keep), self.ssm.index_select(0, keep))


@dataclass(frozen=True)
class AttentionMemory:
    """Keys and values (B, groups, capacity, head dim); columns from the state's length on are not yet written."""

    keys: Tensor
    values: Tensor

    def rows(self, keep: Tensor) -> "AttentionMemory":
        return AttentionMemory(self.keys.index_select(0, keep), self.values.index_select(0, keep))


@dataclass(frozen=True)
class DecodeState:
    """The memory of one batch. `length` columns are filled; row b is padding before column `starts[b]`."""

    length: int
    starts: Tensor
    layers: tuple[MambaMemory | AttentionMemory | None, ...]

    def rows(self, keep: Tensor) -> "DecodeState":
        """The state of rows `keep` (indices), in that order."""
        layers = tuple(memory and memory.rows(keep) for memory in self.layers)
        return replace(self, starts=self.starts[keep], layers=layers)


@torch.no_grad()
def prefill(model: "HybridModel", prompts: list[list[int]], pad_id: int, capacity: int) -> tuple[Tensor, DecodeState]:
    """Read the prompts. Returns the logits after each (B, V) and a state with room for `capacity` tokens in all.

    Raises ValueError for an empty prompt, too small a capacity, or a model that is split over tensor or pipeline ranks.
    """
    _check(model, prompts, capacity)
    length = max(map(len, prompts))
    tokens_BL = torch.tensor(
        [[pad_id] * (length - len(p)) + p for p in prompts], device=model.output_layer.weight.device
    )
    starts_B = torch.tensor([length - len(p) for p in prompts], device=tokens_BL.device)
    padding_LB = torch.arange(length, device=tokens_BL.device).unsqueeze(1) < starts_B
    x_LBD = model.embedding(input_ids=tokens_BL, position_ids=None)
    memories: list[MambaMemory | AttentionMemory | None] = []
    for letter, layer in zip(model.decoder.layer_type_list, model.decoder.layers, strict=True):
        memory = None
        if letter == "M":
            out_LBD, memory = _mamba_prefill(layer.mixer, layer.norm(x_LBD), padding_LB)
        elif letter == "*":
            out_LBD, memory = _attention_prefill(
                layer.self_attention, layer.input_layernorm(x_LBD), padding_LB, capacity
            )
        else:
            out_LBD, _ = layer.mlp(layer.pre_mlp_layernorm(x_LBD))
        x_LBD = x_LBD + out_LBD
        memories.append(memory)
    return _logits(model, x_LBD[-1:]), DecodeState(length, starts_B, tuple(memories))


@torch.no_grad()
def step(model: "HybridModel", tokens_B: Tensor, state: DecodeState) -> tuple[Tensor, DecodeState]:
    """Append one token to every row. Returns the logits after it (B, V) and the state that replaces `state`.

    Keys, values and Mamba states are written in place: `state` itself must not be used again.
    """
    x_LBD = model.embedding(input_ids=tokens_B.unsqueeze(1), position_ids=None)
    memories: list[MambaMemory | AttentionMemory | None] = []
    for letter, layer, memory in zip(model.decoder.layer_type_list, model.decoder.layers, state.layers, strict=True):
        if letter == "M":
            out_LBD, memory = _mamba_step(layer.mixer, layer.norm(x_LBD), memory)
        elif letter == "*":
            out_LBD = _attention_step(layer.self_attention, layer.input_layernorm(x_LBD), memory, state)
        else:
            out_LBD, _ = layer.mlp(layer.pre_mlp_layernorm(x_LBD))
        x_LBD = x_LBD + out_LBD
        memories.append(memory)
    return _logits(model, x_LBD), DecodeState(state.length + 1, state.starts, tuple(memories))


def _check(model: "HybridModel", prompts: list[list[int]], capacity: int) -> None:
    if model.config.tensor_model_parallel_size > 1 or not (model.pre_process and model.post_process):
        raise ValueError(
            "decoding needs the whole model on one rank; got a part of it: load the weights without TP and PP"
        )
    if model.training:
        raise ValueError("decoding needs a model in evaluation mode; got one in training: call model.eval()")
    if not prompts or not all(prompts):
        raise ValueError("every prompt must hold at least one token; got an empty one: give it a start token")
    if max(map(len, prompts)) > capacity:
        raise ValueError(
            f"capacity must cover the longest prompt; got {capacity} for {max(map(len, prompts))} tokens: raise it"
        )


def _logits(model: "HybridModel", x_LBD: Tensor) -> Tensor:
    logits_LBV, _ = model.output_layer(model.decoder.final_norm(x_LBD))
    return logits_LBV[0]


def _split_projection(mixer: "Module", hidden_LBD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z, xBC and the raw step of each token."""
    state = mixer.ngroups * mixer.d_state
    projected, _ = mixer.in_proj(hidden_LBD)
    return projected.split([mixer.d_inner, mixer.d_inner + 2 * state, mixer.nheads], dim=-1)


def _split_convolved(mixer: "Module", xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., H, P), B and C (..., G, N)."""
    state = mixer.ngroups * mixer.d_state
    x, B, C = xBC.split([mixer.d_inner, state, state], dim=-1)
    return x.unflatten(-1, (-1, mixer.headdim)), *(t.unflatten(-1, (mixer.ngroups, -1)) for t in (B, C))


def _mamba_prefill(mixer: "Module", hidden_LBD: Tensor, padding_LB: Tensor) -> tuple[Tensor, MambaMemory]:
    z, xBC, dt = _split_projection(mixer, hidden_LBD)
    xBC = xBC.masked_fill(padding_LB.unsqueeze(-1), 0.0)
    keep = mixer.d_conv - 1
    conv = F.pad(xBC, (0, 0, 0, 0, max(keep - len(xBC), 0), 0))[-keep:]
    dt = mamba.step_size(dt, mixer.dt_bias, mixer.dt_limit).masked_fill(padding_LB.unsqueeze(-1), 0.0)
    x, B, C = _split_convolved(mixer, mamba.causal_conv(xBC, mixer.conv1d_weight.squeeze(1), mixer.conv1d_bias))
    y, ssm = mamba.chunked_scan(x, dt, -mixer.A_log.float().exp(), B, C, mixer.D, mixer.chunk_size)
    out_LBD, _ = mixer.out_proj(mixer.norm(y.flatten(-2) * F.silu(z)))
    return out_LBD, MambaMemory(conv, ssm)


def _mamba_step(mixer: "Module", hidden_1BD: Tensor, memory: MambaMemory) -> tuple[Tensor, MambaMemory]:
    z, xBC, dt = _split_projection(mixer, hidden_1BD)
    xBC_BC, conv = mamba.conv_step(xBC[0], memory.conv, mixer.conv1d_weight.squeeze(1), mixer.conv1d_bias)
    x, B, C = _split_convolved(mixer, xBC_BC)
    dt = mamba.step_size(dt[0], mixer.dt_bias, mixer.dt_limit)
    y = mamba.scan_step(x, dt, -mixer.A_log.float().exp(), B, C, mixer.D, memory.ssm)
    out_1BD, _ = mixer.out_proj(mixer.norm(y.flatten(-2).unsqueeze(0) * F.silu(z)))
    return out_1BD, MambaMemory(conv, memory.ssm)


def _query_key_value(attention: "Module", hidden_LBD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, groups, heads of a group, L, dim), scaled; key and value (B, groups, L, dim)."""
    groups, dim = attention.config.num_query_groups, attention.hidden_size_per_attention_head
    heads = attention.config.num_attention_heads // groups
    qkv, _ = attention.linear_qkv(hidden_LBD)
    qkv = qkv.view(*hidden_LBD.shape[:2], groups, heads + 2, dim).permute(1, 2, 3, 0, 4)
    return qkv[:, :, :heads] * dim**-0.5, qkv[:, :, heads], qkv[:, :, heads + 1]


def _attend(attention: "Module", query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
    """`hidden` (B, 1, 1, L or 1, keys) is True where a query may not look. Returns the layer's output (L, B, D)."""
    # Heads of a group and tokens are rows of one product: broadcasting over heads would copy every key and value.
    scores = (query.flatten(2, 3) @ key.transpose(-1, -2)).unflatten(2, query.shape[2:4])
    weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
    context = (weights.flatten(2, 3) @ value).unflatten(2, query.shape[2:4])
    out_LBD, _ = attention.linear_proj(context.permute(3, 0, 1, 2, 4).flatten(2))
    return out_LBD


def _attention_prefill(
    attention: "Module", hidden_LBD: Tensor, padding_LB: Tensor, capacity: int
) -> tuple[Tensor, AttentionMemory]:
    query, key, value = _query_key_value(attention, hidden_LBD)
    L = len(hidden_LBD)
    future = torch.ones(L, L, dtype=torch.bool, device=query.device).triu(1)
    itself = torch.eye(L, dtype=torch.bool, device=query.device)
    # A padded query sees itself: with nothing to see its softmax would be NaN and poison the row's later layers.
    hidden = future | (padding_LB.t().unsqueeze(1) & ~itself)
    room = (0, 0, 0, capacity - L)
    memory = AttentionMemory(F.pad(key, room), F.pad(value, room))
    return _attend(attention, query, key, value, hidden[:, None, None]), memory


def _attention_step(attention: "Module", hidden_1BD: Tensor, memory: AttentionMemory, state: DecodeState) -> Tensor:
    query, key, value = _query_key_value(attention, hidden_1BD)
    if state.length >= memory.keys.shape[2]:
        raise ValueError(
            f"the state has room for {memory.keys.shape[2]} tokens and is full: prefill with a larger capacity"
        )
    memory.keys[:, :, state.length] = key[:, :, 0]
    memory.values[:, :, state.length] = value[:, :, 0]
    seen = slice(None, state.length + 1)
    hidden = torch.arange(state.length + 1, device=query.device) < state.starts.unsqueeze(1)
    return _attend(attention, query, memory.keys[:, :, seen], memory.values[:, :, seen], hidden[:, None, None, None])
