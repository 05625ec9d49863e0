"""One optimizer step on a global batch, by Megatron's wrapper, schedule, gradient reduction and optimizer.

The loss is the mean cross-entropy of the labels under their loss weights, over the *global* batch:

    loss = sum_i w_i ce_i / sum_i w_i

Each rank divides its own part by the weight sum of the whole batch, which it knows because it drew the whole batch. So
any number of data-parallel ranks computes what one process does. The mean is not over tokens counted as integers
(Megatron's `calculate_per_token_loss`), since weights are fractions. No auxiliary loss: the router's bias keeps
experts balanced.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_evolve.substrate.packing import PAD_MULTIPLE, Batch
from megatron_evolve.substrate.recipe import Recipe
from megatron_evolve.substrate.train.optimizer import make_optimizer, make_scheduler, set_step

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from torch import Tensor


ROWS_MULTIPLE = 8  # so up to eight data-parallel ranks cut a batch into the same micro-batches


@dataclass(frozen=True)
class Measured:
    """What one step tells of itself, equal on all ranks."""

    loss: float
    grad_norm: float
    lr: float


def label_loss(model: Any, batch: Batch, device: Any) -> "Tensor":
    """Cross-entropy of each label (B, T), float32, padding included (its weight is 0).

    On a pipeline stage before the last: what the next stage reads.
    """
    import torch

    # No padding_mask: with a routing bias Megatron 0.19 combines it, (tokens,), with the routing map, (tokens,
    # experts), and raises. So padding counts in the experts' load; it comes after the row and reaches nothing else.
    tokens, labels, weights = (
        torch.from_numpy(array).to(device) for array in (batch.tokens_BT, batch.labels_BT, batch.weights_BT)
    )
    packed = None
    if batch.lengths:
        from megatron_evolve.substrate.model.packed import PackedSequences

        packed = PackedSequences(batch.lengths, device)
    # The mask is for prediction heads alone, which would otherwise learn padding; Megatron reads it nowhere else.
    return model(tokens, None, None, labels=labels, loss_mask=weights, packed_seq_params=packed)


def weighted_loss(losses_BT: "Tensor", batch: Batch) -> "Tensor":
    """This slice's part of the global batch's loss; parts of all data-parallel ranks add up to it."""
    import torch

    weights = torch.from_numpy(batch.weights_BT).to(losses_BT.device)
    return (losses_BT * weights).sum() / batch.weight_sum


class Trainer:
    """A model with its optimizer and schedule; `step` changes them in place. All ranks give it the same batches.

    `chunks` is this rank's part of the model (`build.build_chunks`). `micro_rows` are the most rows that a rank puts
    through the model at once: fewer take less memory and keep more pipeline stages busy, and change no result. With
    `packed` rows lie end to end, so many as fit in the room of `micro_rows` rows of the recipe's sequence length.

    Packed or padded, a step's loss and gradient are the same sums. Of the experts' load, by which full fine-tuning
    moves the routing bias, padding is a part: between the two that bias moves apart, and so it may where a layout pads
    further (tp=8: up to 4 places a row or pack). Prediction heads are the other exception: Megatron takes their loss as
    a mean over each micro-batch, so it weighs rows by where they were cut.
    """

    def __init__(
        self,
        chunks: "Sequence[HybridModel]",
        recipe: Recipe,
        *,
        micro_rows: int | None = None,
        packed: bool = False,
    ) -> None:
        import torch
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.distributed.finalize_model_grads import finalize_model_grads

        from megatron_evolve.substrate.model import build

        self.chunks = list(chunks)
        self.recipe = recipe
        self.micro_rows, self.packed = micro_rows, packed
        self.device = torch.cuda.current_device()
        self.layout = build.running_layout()
        assert not (packed and self.layout.cp > 1), "a pack is not cut for context parallelism"
        self.world = torch.distributed.get_world_size()
        self.writes = torch.distributed.get_rank() == 0
        self.rank, self.copies = (
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )
        # One rank has nothing to share out, but saves the float32 copy of bfloat16 weights only in that form. Megatron
        # shares out no other optimizer's state than Adam's.
        bf16 = self.chunks[0].config.bf16
        self.distributed = (self.world > 1 or bf16) and recipe.optimizer == "adam"
        setting = DistributedDataParallelConfig(use_distributed_optimizer=self.distributed, grad_reduce_in_fp32=bf16)
        self.parallel = [
            DistributedDataParallel(chunk.config, setting, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(self.chunks)
        ]
        self.optimizer = make_optimizer(self.parallel, recipe, distributed=self.distributed)
        self.scheduler = make_scheduler(self.optimizer, recipe)
        for chunk in self.chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads
            chunk.config.grad_scale_func = self.optimizer.scale_loss

    def step(self, batch: Batch, number: int) -> Measured:
        """Optimizer step `number` (0-based) on a global batch. Weights change even if the loss is not finite."""
        for chunk in self.parallel:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        lr = set_step(self.scheduler, self.recipe, number)
        loss = self._run(self._micro_batches(batch), forward_only=False)
        _, grad_norm, _ = self.optimizer.step()
        return Measured(self._over_ranks(loss), self._norm(grad_norm), lr)

    def held_out_loss(self, batch: Batch) -> float:
        """Loss on a batch that is not trained on; every data-parallel rank computes the whole of it."""
        import torch

        for chunk in self.parallel:
            chunk.eval()
        parts = batch.packed(self._places()) if self.packed else batch.rows_at_most(self.micro_rows)
        parts = self._cut(parts)
        if self.layout.vp > 1:  # the interleaved schedule wants a multiple of pp; what is asked twice weighs nothing
            nothing = replace(parts[-1], weights_BT=np.zeros_like(parts[-1].weights_BT))
            parts += [nothing] * (-len(parts) % self.layout.pp)
        with torch.no_grad():
            loss = self._run(parts, forward_only=True)
        return self._over_ranks(loss / self.copies)

    def on_any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; the same answer on all, which all must ask for."""
        import torch

        if self.world == 1:
            return flag
        flags = torch.tensor(int(flag), device=self.device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        return bool(flags)

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        """This rank's part of the batch, in as many micro-batches as every other rank has."""
        if not self.packed:
            parts = [part.part(self.rank, self.copies) for part in batch.narrowed(max(ROWS_MULTIPLE, self.copies))]
            return self._cut([one for part in parts for one in part.rows_at_most(self.micro_rows)])
        shares = [batch.part(rank, self.copies) for rank in range(self.copies)]
        most = max(len(share.packed(self._places())) for share in shares)
        # Experts wait for the tokens of all ranks, and virtual stages want a multiple of pp.
        multiple = self.layout.pp if self.layout.vp > 1 else 1
        return self._cut(shares[self.rank].packed(self._places(), at_least=-(-most // multiple) * multiple))

    def _cut(self, parts: list[Batch]) -> list[Batch]:
        """Micro-batches of a width that tensor-parallel ranks can split; of each, this context-parallel rank's part."""
        from megatron.core import parallel_state

        rank, cp = parallel_state.get_context_parallel_rank(), self.layout.cp
        parts = [part.widened(self.layout.padded(part.tokens_BT.shape[1])) for part in parts]
        return [part.mirrored(rank, cp) for part in parts] if cp > 1 else parts

    def _places(self) -> int | None:
        row = -(-self.recipe.sequence_length // PAD_MULTIPLE) * PAD_MULTIPLE
        return self.micro_rows and self.micro_rows * row

    def _run(self, parts: list[Batch], *, forward_only: bool) -> "Tensor":
        """Puts micro-batches through the model by Megatron's schedule. This rank's part of the loss, () float32."""
        import torch
        from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

        if self.layout.vp > 1 and len(parts) % self.layout.pp:
            raise ValueError(
                f"virtual stages need a rank's micro-batches in multiples of pp={self.layout.pp}; got {len(parts)} of "
                f"at most {self.micro_rows} rows: change the rows of a micro-batch, or set vp=1"
            )
        losses = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=[iter([(part, len(parts)) for part in parts]) for _ in self.parallel],
            model=self.parallel,
            num_microbatches=len(parts),
            seq_length=parts[0].tokens_BT.shape[1],  # of several stages each micro-batch's own width is told
            micro_batch_size=len(parts[0].tokens_BT),
            forward_only=forward_only,
        )
        return sum(losses, torch.zeros((), device=self.device))  # none but the last stage has losses

    def _forward(self, parts: Iterator[tuple[Batch, int]], model: Any) -> tuple["Tensor", Any]:
        batch, num_parts = next(parts)

        def loss_of(losses_BT: "Tensor") -> tuple["Tensor", "Tensor"]:
            loss = weighted_loss(losses_BT, batch)
            # The wrapper averages gradients over ranks and the schedule over micro-batches; this loss is a sum over
            # both. Context-parallel ranks the schedule has accounted for.
            return loss * (self.copies * num_parts), loss.detach()

        return label_loss(model, batch, self.device), loss_of

    def _over_ranks(self, part: "Tensor") -> float:
        import torch
        from megatron.core import parallel_state

        if self.world > 1:
            # Tensor-parallel ranks have the same loss: one of them counts.
            part = part * (parallel_state.get_tensor_model_parallel_rank() == 0)
            torch.distributed.all_reduce(part)
        return float(part)

    def _norm(self, grad_norm: float | None) -> float:
        return float(self.optimizer.get_grad_norm() if grad_norm is None else grad_norm)  # None where clipping is off
