"""The `mamba_ssm` package as far as Megatron's MambaMixer needs it, served by `mamba`.

Megatron imports three names from that package and refuses to build a mixer without them. `supply` gives it ours, on any
device, unless the package can serve: its kernels need a GPU and the package causal-conv1d.
"""

import functools
import sys
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_evolve.substrate import operations
from megatron_evolve.substrate.model import mamba


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
        self.fused: Callable[..., Tensor] | None = None  # `gated_rms_norm` of `kernels`, where gate and norm are one
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x (..., hidden), gate z likewise or None."""
        if z is not None and self.fused is not None:
            width = len(self.weight)
            rows = x.reshape(-1, width), z.reshape(-1, width)
            return self.fused(*rows, self.weight, width // self.group_size, self.eps).view(x.shape)
        return mamba.group_rms_norm(x if z is None else x * F.silu(z), self.weight, self.eps, self.group_size)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = mamba.NO_LIMIT,
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = False,
) -> Tensor:
    """`mamba_ssm`'s function of this name, for what Megatron asks of it: (B, L, z+x+B+C+dt) to gated (B, L, H P).

    `seq_idx` (B, L) numbers the sequence of each token. Raises ValueError for another activation or a gate after the
    norm, which only `mamba_ssm` has.
    """
    if activation != "silu" or norm_before_gate or headdim is None:
        raise ValueError(
            "the PyTorch scan serves silu, one D a head and a gate before the norm; got something else: "
            "install mamba-ssm"
        )
    sequence = None if seq_idx is None else seq_idx.t()
    given = (zxbcdt.transpose(0, 1), conv1d_weight, conv1d_bias, dt_bias, A, D)
    shapes = {"chunk_size": chunk_size, "dt_limit": dt_limit, "headdim": headdim, "ngroups": ngroups}
    conv = functools.partial(mamba.causal_conv, sequence_LB=sequence)
    y, z = conv_and_scan(*given, conv=conv, sequence_LB=sequence, **shapes)
    return (y * F.silu(z)).transpose(0, 1)


def conv_and_scan(
    zxBCdt_LBC: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    conv: Callable[[Tensor, Tensor, Tensor], Tensor],
    chunk_size: int,
    sequence_LB: Tensor | None,
    dt_limit: tuple[float, float],
    headdim: int,
    ngroups: int,
) -> tuple[Tensor, Tensor]:
    """Projected input (L, B, z+x+B+C+dt) to the scan's output and its gate, not applied: both (L, B, H P).

    `conv` is called with input (L, B, C), taps (C, K) and bias (C,), and knows its sequences itself.
    """
    inner = D.shape[0] * headdim
    state = (conv1d_weight.shape[0] - inner) // 2
    z, xBC, dt = zxBCdt_LBC.split([inner, inner + 2 * state, D.shape[0]], dim=-1)
    x, B, C = conv(xBC, conv1d_weight, conv1d_bias).split([inner, state, state], dim=-1)
    y, _ = mamba.chunked_scan(
        x.unflatten(-1, (-1, headdim)),
        mamba.step_size(dt, dt_bias, dt_limit),
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        D,
        chunk_size,
        sequence_LB=sequence_LB,
    )
    return y.flatten(2), z


def mamba_chunk_scan_combined(*_args: object, **_kwargs: object) -> Tensor:
    """Megatron's inference engine calls this; ours is `decode`. Raises RuntimeError."""
    raise RuntimeError(
        "Megatron's inference engine needs mamba-ssm; got the PyTorch scan: decode with substrate.model.decode"
    )


def package_serves() -> bool:
    """Whether Mamba layers of this process run on the kernels of `mamba_ssm` rather than on the scan of `mamba`."""
    return operations.mamba_scan(operations.machine(torch.cuda.is_available())).path == "mamba-ssm"


def supply() -> None:
    """Import Megatron's MambaMixer, with the names above standing in where `mamba_ssm` cannot serve.

    The stand-in leaves `sys.modules` again at once: transformers looks there too, and a parity test would otherwise
    compare this scan with itself. Idempotent. Raises RuntimeError if the mixer was imported before without either.
    """
    mixer = sys.modules.get("megatron.core.ssm.mamba_mixer")
    if mixer is not None:
        if not mixer.HAVE_MAMBA_SSM:
            raise RuntimeError("supply() must come before the first import of Megatron's mamba_mixer: move it up")
        return
    stand_in = {} if package_serves() else _stand_in()
    hidden = {name: sys.modules[name] for name in stand_in if name in sys.modules}
    sys.modules.update(stand_in)
    try:
        import megatron.core.ssm.mamba_mixer  # noqa: F401
    finally:
        for name in stand_in:
            del sys.modules[name]
        sys.modules.update(hidden)


def _stand_in() -> dict[str, types.ModuleType]:
    norm = types.ModuleType("mamba_ssm.ops.triton.layernorm_gated")
    norm.RMSNorm = GatedRMSNorm
    scan = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")
    scan.mamba_chunk_scan_combined = mamba_chunk_scan_combined
    scan.mamba_split_conv1d_scan_combined = mamba_split_conv1d_scan_combined
    packages = [types.ModuleType(name) for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")]
    return {module.__name__: module for module in [*packages, norm, scan]}
