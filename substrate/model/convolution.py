"""The convolution before the PyTorch scan by flash-linear-attention's Triton kernel, called as `mamba.causal_conv` is.

Its kernel reads, keeps and writes a bfloat16 input as such, where plain PyTorch keeps two copies in float32; sequences
of a packed row are told to it by where they end. Who calls it has asked `operations.convolution` whether it is there.

L tokens, B rows, C channels, K taps.
"""

from torch import Tensor

from megatron_evolve.substrate.model.packed import PackedSequences

FLA = "flash-linear-attention"


def fla_causal_conv(x_LBC: Tensor, weight_CK: Tensor, bias_C: Tensor, packed: PackedSequences | None = None) -> Tensor:
    """silu of a depthwise causal convolution along L: (L, B, C), in the dtype of x."""
    from fla.modules.causal_conv1d import causal_conv1d

    # with the ends on the host, too, it need not ask the device for them
    ends = {} if packed is None else {"cu_seqlens": packed.cu_seqlens_q.long(), "cu_seqlens_cpu": packed.ends}
    out_BLC, _ = causal_conv1d(x_LBC.transpose(0, 1), weight_CK, bias_C, activation="silu", **ends)
    return out_BLC.transpose(0, 1)
