"""A recipe's optimizer and learning-rate schedule as Megatron's own objects."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_evolve.substrate.recipe import Recipe

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from torch import Tensor


def make_optimizer(
    chunks: "Sequence[DistributedDataParallel]", recipe: Recipe, *, distributed: bool
) -> "MegatronOptimizer":
    """AdamW or SGD over the trainable parameters; Megatron exempts vectors (norms, biases, A_log) from weight decay.

    `distributed`: each data-parallel rank keeps the state of a share of the parameters, as the chunks are wrapped for.
    """
    import torch
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

    bf16 = chunks[0].config.bf16  # then the optimizer keeps a float32 copy of the weights
    config = OptimizerConfig(
        optimizer=recipe.optimizer,
        lr=recipe.lr,
        min_lr=recipe.lr * recipe.min_lr_ratio,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.beta1,
        adam_beta2=recipe.beta2,
        adam_eps=recipe.epsilon,
        sgd_momentum=recipe.beta1,
        clip_grad=recipe.clip_grad,
        use_distributed_optimizer=distributed,
        bf16=bf16,
        params_dtype=chunks[0].config.params_dtype,
    )
    overrides = get_standard_config_overrides(config)
    if bf16:
        # What stays in float32 (A_log, D) gets a group of its own, with nothing changed: in a group of both dtypes
        # Megatron 0.19 numbers parameters in one order and keeps them in another, and saves one's moments as another's.
        wide = ParamPredicate(name="float32", fn=lambda parameter: parameter.dtype == torch.float32)
        overrides[ParamKey(predicate=wide)] = {"eps": recipe.epsilon}
    if optimizer_taken(recipe).startswith("torch."):
        _mend_loading()
    return get_megatron_optimizer(config, list(chunks), config_overrides=overrides, use_gloo_process_groups=False)


def optimizer_taken(recipe: Recipe) -> str:
    """The class that steps, by module and name: the first that Megatron could import (see `operations.optimizer`)."""
    from megatron.core import optimizer

    kind = optimizer.Adam if recipe.optimizer == "adam" else optimizer.SGD
    return f"{kind.__module__}.{kind.__qualname__}"


@functools.cache
def _mend_loading() -> None:
    """Loading the state of a distributed torch AdamW (Apex and Transformer Engine keep `step` elsewhere)."""
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_states, load = DistributedOptimizer._set_main_param_and_optimizer_states, DistributedOptimizer.load_state_dict

    def set_states_with_step(self: Any, model_param: "Tensor", tensors: dict[str, Any]) -> None:
        # It looks up every tensor of the torch state, `step` among them, which the checkpoint does not hold (KeyError).
        group_index, group_order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group_index]["params"][group_order]]
        set_states(self, model_param, {"step": state.get("step"), **tensors})

    def load_with_own_steps(self: Any, state_dict: dict[str, Any]) -> None:
        # It gives every parameter the same `step` tensor, which AdamW then advances once per parameter in each step.
        load(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_with_step
    DistributedOptimizer.load_state_dict = load_with_own_steps


def torch_optimizers(optimizer: "MegatronOptimizer") -> list[Any]:
    """The optimizers behind Megatron's, one for dense and one for expert parameters where these are kept apart."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.optimizer for part in chained if part.optimizer is not None]


def make_scheduler(optimizer: "MegatronOptimizer", recipe: Recipe) -> "OptimizerParamScheduler":
    """Megatron's scheduler for `Recipe.lr_at`; bring it to a step with `set_step`."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=recipe.lr,
        min_lr=recipe.lr * recipe.min_lr_ratio,
        lr_warmup_steps=recipe.warmup_steps,
        lr_decay_steps=recipe.steps,
        lr_decay_style=recipe.schedule,
        start_wd=recipe.weight_decay,
        end_wd=recipe.weight_decay,
        wd_incr_steps=recipe.steps,
        wd_incr_style="constant",
    )


def set_step(scheduler: "OptimizerParamScheduler", recipe: Recipe, step: int) -> float:
    """Set the learning rate of optimizer step `step` (0-based) and return it.

    Megatron counts from 0 and would waste the first step of a warm-up on lr 0; a recipe starts above 0 and reaches its
    peak with the last warm-up step. So warm-up steps stand one further on in Megatron's count.
    """
    count = step + 1 if step < recipe.warmup_steps else step
    scheduler.step(increment=count - scheduler.num_steps)
    return scheduler.optimizer.param_groups[0]["lr"]
