"""Several sequences laid end to end in one row, as every layer must know them.

    packed = PackedSequences([17, 1, 40])
    losses = model(tokens, None, None, labels=labels, packed_seq_params=packed)  # tokens (1, 58): losses (1, 58)

It is Megatron's `PackedSeqParams` (its "thd" form), which Megatron hands down to attention, Mamba layers and
multi-token prediction heads, and its optional kernels understand it too. Convolution, state and attention begin anew at
each sequence. Padding is one more sequence, whose losses the caller leaves out. Import it after `build.prepare`.

T tokens of the row, S sequences, L tokens of the longest of them.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class PackedSequences(PackedSeqParams):
    """The lengths of the sequences, in their order, known on the host: no layer has to ask the device for them."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        if not lengths or min(lengths) < 1:
            raise ValueError(
                f"a pack must hold sequences of at least one token; got lengths {list(lengths)}: leave empty ones out"
            )
        self.lengths = tuple(lengths)
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        longest = max(lengths)
        super().__init__(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            total_tokens=sum(lengths),  # from which Megatron makes `seq_idx` (1, T), the sequence of each token
        )

    @cached_property
    def ends(self) -> Tensor:
        """`cu_seqlens_q` on the host, int64 (S + 1,)."""
        return torch.tensor([0, *accumulate(self.lengths)])

    @cached_property
    def batches(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """The row as right-padded batches of sequences of like length, for attention.

        Returns the token of each place of each batch (S, L), and for each token of the row its place among all places,
        counted through the batches (T,). A place past a sequence's end names its last token again. Lengths from 2^k + 1
        to 2^(k+1) share a batch, so fewer than half of the places are padding and a pack of any shape is a dozen
        batches: one call each instead of one a sequence, and no T x T mask, which costs 3 to 22 times the time on a
        CPU (2,048 tokens in sequences of 1,024 or 33).
        """
        starts = [0, *accumulate(self.lengths)]
        alike = defaultdict(list)
        for start, length in zip(starts, self.lengths, strict=False):
            alike[(length - 1).bit_length()].append((start, length))
        tokens, place_T, before = [], torch.empty(starts[-1], dtype=torch.long), 0
        for members in alike.values():
            start_S1, length_S1 = torch.tensor(members).unsqueeze(-1).unbind(1)
            offset_L = torch.arange(int(length_S1.max()))
            token_SL = start_S1 + torch.minimum(offset_L, length_S1 - 1)
            filled = (offset_L < length_S1).flatten()
            place_T[token_SL.flatten()[filled]] = before + filled.nonzero().squeeze(-1)
            before += filled.numel()
            tokens.append(token_SL.to(self.cu_seqlens_q.device))
        return tuple(tokens), place_T.to(self.cu_seqlens_q.device)


def expect_packed(packed: PackedSeqParams | None, num_tokens: int, num_rows: int) -> PackedSequences | None:
    """`packed` if it describes exactly this row, or None for an unpacked batch. Raises ValueError otherwise."""
    if packed is None:
        return None
    if not isinstance(packed, PackedSequences):
        raise ValueError(
            f"packed_seq_params must be PackedSequences; got {type(packed).__name__}: make it from lengths"
        )
    if num_rows != 1 or packed.total_tokens != num_tokens:
        raise ValueError(
            f"a pack of {packed.total_tokens} tokens needs tokens of shape (1, {packed.total_tokens}); "
            f"got ({num_rows}, {num_tokens}): lay the sequences end to end in one row"
        )
    return packed
