"""One optimizer step on a global batch, by Megatron's wrapper, schedule, gradient reduction and optimizer.

The loss is the mean cross-entropy of the labels under their loss weights, over the *global* batch:

    loss = sum_i w_i ce_i / sum_i w_i

Each rank divides its own part by the weight sum of the whole batch, which it knows because it drew the whole batch. So
any number of data-parallel ranks computes what one process does. The mean is not over tokens counted as integers
(Megatron's `calculate_per_token_loss`), since weights are fractions. No auxiliary loss: the router's bias keeps
experts balanced.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_evolve.substrate.packing import Batch
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
    """Cross-entropy of each label (B, T), float32, padding included (its weight is 0)."""
    import torch

    # No padding_mask: with a routing bias Megatron 0.19 combines it, (tokens,), with the routing map, (tokens,
    # experts), and raises. So padding counts in the experts' load; it comes after the row and reaches nothing else.
    tokens, labels = torch.from_numpy(batch.tokens_BT).to(device), torch.from_numpy(batch.labels_BT).to(device)
    return model(tokens, None, None, labels=labels)


def weighted_loss(losses_BT: "Tensor", batch: Batch) -> "Tensor":
    """This slice's part of the global batch's loss; parts of all ranks add up to it."""
    import torch

    weights = torch.from_numpy(batch.weights_BT).to(losses_BT.device)
    return (losses_BT * weights).sum() / batch.weight_sum


class Trainer:
    """A model with its optimizer and schedule; `step` changes them in place. All ranks give it the same batches."""

    def __init__(self, model: "HybridModel", recipe: Recipe) -> None:
        import torch
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.distributed.finalize_model_grads import finalize_model_grads

        self.model = model
        self.recipe = recipe
        self.device = torch.cuda.current_device()
        self.rank, self.world = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        self.parallel = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
        self.optimizer = make_optimizer(self.parallel, recipe)
        self.scheduler = make_scheduler(self.optimizer, recipe)
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.grad_scale_func = self.optimizer.scale_loss

    def step(self, batch: Batch, number: int) -> Measured:
        """Optimizer step `number` (0-based) on a global batch. Weights change even if the loss is not finite."""
        from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining

        self.parallel.train()
        self.parallel.zero_grad_buffer()
        self.optimizer.zero_grad()
        lr = set_step(self.scheduler, self.recipe, number)
        parts = batch.narrowed(max(ROWS_MULTIPLE, self.world))
        losses = forward_backward_no_pipelining(
            forward_step_func=self._forward,
            data_iterator=iter([(part.part(self.rank, self.world), len(parts)) for part in parts]),
            model=self.parallel,
            num_microbatches=len(parts),
            seq_length=batch.tokens_BT.shape[1],
            micro_batch_size=len(batch.tokens_BT) // self.world,
        )
        _, grad_norm, _ = self.optimizer.step()
        return Measured(self._over_ranks(sum(losses)), self._norm(grad_norm), lr)

    def held_out_loss(self, batch: Batch) -> float:
        """Loss on a batch that is not trained on; every rank computes the whole of it."""
        import torch

        self.parallel.eval()
        with torch.no_grad():
            return float(weighted_loss(label_loss(self.model, batch, self.device), batch))

    def _forward(self, parts: Iterator[tuple[Batch, int]], model: Any) -> tuple["Tensor", Any]:
        batch, num_parts = next(parts)

        def loss_of(losses_BT: "Tensor") -> tuple["Tensor", "Tensor"]:
            loss = weighted_loss(losses_BT, batch)
            # The wrapper averages gradients over ranks and the schedule over micro-batches; this loss is a sum over
            # both.
            return loss * (self.world * num_parts), loss.detach()

        return label_loss(model, batch, self.device), loss_of

    def _over_ranks(self, part: "Tensor") -> float:
        import torch

        if self.world > 1:
            torch.distributed.all_reduce(part)
        return float(part)

    def _norm(self, grad_norm: float | None) -> float:
        return float(self.optimizer.get_grad_norm() if grad_norm is None else grad_norm)  # None where clipping is off
