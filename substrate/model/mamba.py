"""Mamba-2 in plain PyTorch, on any device: convolution, chunked scan, gated norm, and one token at a time.

The recurrence, per head, with step dt_t > 0 and decay exp(dt_t A), A < 0:

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t + D x_t

is evaluated in chunks of Q tokens: inside a chunk as one masked Q x Q product, between chunks through S (Dao and Gu,
"Transformers are SSMs", arXiv 2405.21060, section 6). It takes the place of the `mamba_ssm` package where that is absent:
`install` gives Megatron's MambaMixer the three names it imports, with the signatures it calls.

L tokens, B sequences, H heads, P head dimension, G groups sharing B and C, N state, K taps, C convolved channels, Q chunk.
"""

import sys
import types
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NO_LIMIT = (0.0, float("inf"))


def step_size(dt_LBH: Tensor, dt_bias_H: Tensor, dt_limit: tuple[float, float] = NO_LIMIT) -> Tensor:
    """softplus(dt + bias) in float32, clamped to `dt_limit` where that limits anything."""
    dt_LBH = F.softplus(dt_LBH.float() + dt_bias_H.float())
    return dt_LBH if tuple(dt_limit) == NO_LIMIT else dt_LBH.clamp(*dt_limit)


def causal_conv(x_LBC: Tensor, weight_CK: Tensor, bias_C: Tensor) -> Tensor:
    """silu of a depthwise causal convolution along L, tokens before the first taken as zero. Returns (L, B, C).

    As K shifted multiply-adds: a grouped conv1d of one channel per group is slower on CPU, and L first keeps shifts contiguous.
    """
    L, K = x_LBC.shape[0], weight_CK.shape[1]
    weight_KC = weight_CK.t().contiguous()
    out_LBC = torch.addcmul(bias_C, x_LBC, weight_KC[K - 1])
    padded = F.pad(x_LBC, (0, 0, 0, 0, K - 1, 0))
    for k in range(K - 1):
        out_LBC = torch.addcmul(out_LBC, padded[k : k + L], weight_KC[k])
    return F.silu(out_LBC)


def chunked_scan(
    x_LBHP: Tensor,
    dt_LBH: Tensor,
    A_H: Tensor,
    B_LBGN: Tensor,
    C_LBGN: Tensor,
    D_H: Tensor,
    chunk_size: int,
    initial_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence above over L tokens. Returns y (L, B, H, P) and the state after the last token (B, H, P, N).

    `dt_LBH` is the step itself (see `step_size`); a token with step 0 leaves the state as it was, which is how padding is
    skipped. Chunks are made equal and at most `chunk_size` long, so that 56 tokens in chunks of 16 are 4 x 14, not 4 x 16
    with padding.
    """
    L, batch, H, P = x_LBHP.shape
    G, N = B_LBGN.shape[2:]
    num_chunks = -(-L // chunk_size)
    Q = -(-L // num_chunks)
    tail = num_chunks * Q - L

    def chunks(t: Tensor) -> Tensor:  # (L, B, heads, last) -> (chunk, B, heads, Q, last)
        t = F.pad(t, (0, 0) * (t.dim() - 1) + (0, tail)) if tail else t
        return t.reshape(num_chunks, Q, *t.shape[1:]).permute(0, 2, 3, 1, 4)

    xdt = chunks(x_LBHP * dt_LBH.unsqueeze(-1))
    B, C = chunks(B_LBGN), chunks(C_LBGN)
    log_decay = chunks((dt_LBH * A_H).unsqueeze(-1)).squeeze(-1).cumsum(-1)  # (chunk, B, H, Q), <= 0
    future = torch.ones(Q, Q, dtype=torch.bool, device=x_LBHP.device).triu(1)
    decay = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).masked_fill(future, float("-inf")).exp()

    def per_head(t: Tensor) -> Tensor:  # groups -> heads, without a copy
        return t.unsqueeze(3).expand(*t.shape[:3], H // G, *t.shape[3:])

    mixing = (per_head(C @ B.transpose(-1, -2)) * decay.unflatten(2, (G, H // G))).flatten(2, 3)
    y = mixing @ xdt

    into_state = xdt * (log_decay[..., -1:] - log_decay).exp().unsqueeze(-1)
    added = into_state.transpose(-1, -2).unflatten(2, (G, H // G)) @ per_head(B)  # (chunk, B, G, H/G, P, N)
    added, kept = added.flatten(2, 3), log_decay[..., -1].exp()[..., None, None]
    state = initial_BHPN if initial_BHPN is not None else torch.zeros_like(added[0])
    before = []
    for n in range(num_chunks):
        before.append(state)
        state = torch.addcmul(added[n], state, kept[n])
    if num_chunks > 1 or initial_BHPN is not None:
        carried = per_head(C) @ torch.stack(before).unflatten(2, (G, H // G)).transpose(-1, -2)
        y = torch.addcmul(y, carried.flatten(2, 3), log_decay.exp().unsqueeze(-1))

    y_LBHP = y.permute(0, 3, 1, 2, 4).reshape(num_chunks * Q, batch, H, P)[:L]
    return torch.addcmul(y_LBHP, x_LBHP, D_H.unsqueeze(-1)), state


def conv_step(x_BC: Tensor, state_KBC: Tensor, weight_CK: Tensor, bias_C: Tensor) -> tuple[Tensor, Tensor]:
    """`causal_conv` for one token. `state_KBC` holds the K-1 inputs before it; returns (B, C) and the next state."""
    window = torch.cat([state_KBC, x_BC.unsqueeze(0)])
    out_BC = torch.addcmul(bias_C, window[0], weight_CK[:, 0])
    for k in range(1, len(window)):
        out_BC = torch.addcmul(out_BC, window[k], weight_CK[:, k])
    return F.silu(out_BC), window[1:]


def scan_step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, D_H: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence for one token. Returns y (B, H, P) and the next state (B, H, P, N)."""
    batch, H, P = x_BHP.shape
    G, N = B_BGN.shape[1:]
    B = B_BGN.unsqueeze(2).expand(batch, G, H // G, N).reshape(batch, H, 1, N)
    C = C_BGN.unsqueeze(2).expand(batch, G, H // G, N).reshape(batch, H, N, 1)
    kept = state_BHPN * (dt_BH * A_H).exp()[..., None, None]
    state_BHPN = torch.addcmul(kept, (x_BHP * dt_BH.unsqueeze(-1)).unsqueeze(-1), B)
    return torch.addcmul((state_BHPN @ C).squeeze(-1), x_BHP, D_H.unsqueeze(-1)), state_BHPN


def group_rms_norm(x: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """RMS norm over blocks of `group_size` channels of the last axis, in float32, then the weight."""
    grouped = x.float().unflatten(-1, (-1, group_size))
    scale = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    return (grouped * scale).flatten(-2).to(x.dtype) * weight


class GatedRMSNorm(nn.Module):
    """`mamba_ssm.ops.triton.layernorm_gated.RMSNorm` for a gate applied before the norm or already applied."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm_before_gate:
            raise ValueError(
                "norm_before_gate must be False, as in Nemotron; got True: install mamba-ssm for the other order"
            )
        self.eps = eps
        self.group_size = group_size or hidden_size
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x (..., hidden), gate z likewise or None."""
        return group_rms_norm(x if z is None else x * F.silu(z), self.weight, self.eps, self.group_size)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = False,
) -> Tensor:
    """`mamba_ssm`'s function of this name, for what Megatron asks of it: (B, L, z+x+B+C+dt) to gated (B, L, H P).

    Raises ValueError for packed sequences, another activation or a gate after the norm, which only `mamba_ssm` has.
    """
    if seq_idx is not None or activation != "silu" or norm_before_gate or headdim is None:
        raise ValueError(
            "the PyTorch scan serves unpacked sequences, silu, one D a head and a gate before the norm; got something else: "
            "install mamba-ssm"
        )
    inner = D.shape[0] * headdim
    state = (conv1d_weight.shape[0] - inner) // 2
    z, xBC, dt = zxbcdt.transpose(0, 1).split([inner, inner + 2 * state, D.shape[0]], dim=-1)
    x, B, C = causal_conv(xBC, conv1d_weight, conv1d_bias).split([inner, state, state], dim=-1)
    y, _ = chunked_scan(
        x.unflatten(-1, (-1, headdim)),
        step_size(dt, dt_bias, dt_limit),
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        D,
        chunk_size,
    )
    return (y.flatten(2) * F.silu(z)).transpose(0, 1)


def mamba_chunk_scan_combined(*_args: object, **_kwargs: object) -> Tensor:
    """Megatron's inference engine calls this; ours is `decode`. Raises RuntimeError."""
    raise RuntimeError(
        "Megatron's inference engine needs mamba-ssm; got the PyTorch scan: decode with substrate.model.decode"
    )


def supply_mamba_ssm() -> None:
    """Import Megatron's MambaMixer, with the names above standing in where `mamba_ssm` is not installed.

    The stand-in leaves `sys.modules` again at once: transformers looks there too, and a parity test would otherwise compare
    this scan with itself. Idempotent. Raises RuntimeError if the mixer was imported before without either.
    """
    mixer = sys.modules.get("megatron.core.ssm.mamba_mixer")
    if mixer is not None:
        if not mixer.HAVE_MAMBA_SSM:
            raise RuntimeError(
                "supply_mamba_ssm() must come before the first import of Megatron's mamba_mixer: move it up"
            )
        return
    stand_in = {} if find_spec("mamba_ssm") else _stand_in()
    sys.modules.update(stand_in)
    try:
        import megatron.core.ssm.mamba_mixer  # noqa: F401
    finally:
        for name in stand_in:
            del sys.modules[name]


def _stand_in() -> dict[str, types.ModuleType]:
    norm = types.ModuleType("mamba_ssm.ops.triton.layernorm_gated")
    norm.RMSNorm = GatedRMSNorm
    scan = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")
    scan.mamba_chunk_scan_combined = mamba_chunk_scan_combined
    scan.mamba_split_conv1d_scan_combined = mamba_split_conv1d_scan_combined
    packages = [types.ModuleType(name) for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")]
    return {module.__name__: module for module in [*packages, norm, scan]}
