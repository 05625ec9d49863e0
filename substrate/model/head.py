"""A model's output table and its loss as one operation: never are all logits there at once.

Megatron keeps logits and their float32 softmax, 6 bytes for each of tokens x vocabulary in bfloat16: 6 GiB at 8,192
tokens of 131,072 entries, and as much again for each further token that is predicted. Here the table hands its input
on, and the loss of it is `linear_cross_entropy` of `kernels`, in chunks. There is one loss a token as before, so loss
weights, padding and packed rows mean what they meant.

So where the table is frozen, and where it is trained and the logits are more than one chunk: making them twice is worth
it only then. A table that is adapted or shared with the embedding, and a call without labels, take Megatron's own way.

L sequence, B rows, H model width. Import it after `build.prepare`: it needs Megatron.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import multi_token_prediction
from torch import Tensor

from megatron_evolve.kernels.backend import backend, chunk_rows


class OutputTable(ColumnParallelLinear):
    """Megatron's output layer; while `passes`, it gives its input back in place of logits."""

    passes = False

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As the base class: (L, B, H) to logits (L, B, vocabulary of this rank), or the input itself."""
        return (input_, None) if self.passes else super().forward(input_, weight, runtime_gather_output)


class LossModel(HybridModel):
    """HybridModel with the loss of `kernels.backend(form)`; with "reference" it is Megatron's own throughout."""

    def __init__(self, *args: Any, form: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.linear_cross_entropy: Callable[..., Tensor] | None = None
        self.form = form
        if form != "reference" and type(getattr(self, "output_layer", None)) is ColumnParallelLinear:
            self.linear_cross_entropy = backend(form).linear_cross_entropy
            self.output_layer.__class__ = OutputTable
            multi_token_prediction._compute_mtp_acceptance_counts = _acceptance_counts

    def fuses(self, num_tokens: int) -> bool:
        """Whether losses of so many tokens are computed without logits."""
        table = getattr(self, "output_layer", None)
        if type(table) is not OutputTable or table.weight is None:
            return False
        return not table.weight.requires_grad or num_tokens > chunk_rows(self.form, table.weight)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the base class: losses (B, L) where labels are given, else logits (B, L, vocabulary of this rank)."""
        given = (input_ids, position_ids, attention_mask, decoder_input, labels)
        if labels is None or not self.fuses(labels.numel()):
            return super().forward(*given, **kwargs)
        self.output_layer.passes = True
        try:
            return super().forward(*given, **kwargs)
        finally:
            self.output_layer.passes = False

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """As the base class: labels (B, L) and logits (L, B, vocabulary) to losses (B, L).

        While the table passes its input on, that (L, B, H) stands in the place of logits.
        """
        if not getattr(self.output_layer, "passes", False):
            return super().compute_language_model_loss(labels, logits)
        weight, group = self.output_layer.weight, self.output_layer.tp_group
        split = {"first_entry": group.rank() * len(weight), "group": group} if group.size() > 1 else {}
        if self.config.sequence_parallel:
            # the loss gives every rank the whole gradient, so a rank's part of it is cut out and not summed
            logits = gather_from_sequence_parallel_region(logits, tensor_parallel_output_grad=False, group=group)
        target = labels.transpose(0, 1)
        losses = self.linear_cross_entropy(logits.flatten(0, 1), weight, target.flatten(), **split)
        return losses.view(target.shape).transpose(0, 1).contiguous()


_megatrons_counts = multi_token_prediction._compute_mtp_acceptance_counts


def _acceptance_counts(mtp_logits: Tensor, mtp_labels: Tensor, loss_mask: Tensor, output_layer: Any, *rest: Any) -> Any:
    """How many tokens a prediction head guesses right, of how many. Without logits nothing is counted: none of none.

    Megatron counts them for a log that is not kept here.
    """
    if getattr(output_layer, "passes", False):
        return torch.zeros((), device=loss_mask.device), torch.zeros((), device=loss_mask.device)
    return _megatrons_counts(mtp_logits, mtp_labels, loss_mask, output_layer, *rest)
