"""Every training setting of a candidate as one frozen value; no setting stands twice.

A recipe says how the substrate is tuned, never what it is tuned on (that is the mix) nor where it runs (that is the
launcher). Ranges are wide enough for a search to fail honestly and narrow enough to catch a slip of the decimal point.
"""

from typing import Literal

from pydantic import Field, model_validator

from megatron_evolve.substrate.frozen import Frozen

LoraTarget = Literal["attention", "mamba", "experts", "shared", "output", "mtp"]
Schedule = Literal["cosine", "linear", "constant"]
Selection = Literal["last", "lowest-loss", "lowest-loss-uniform"]


class Adapter(Frozen):
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): W x + alpha/rank * B A x with W frozen."""

    rank: int = Field(ge=1, le=512, description="rank r of every adapter")
    alpha: float = Field(gt=0, le=1024, description="the adapter's output is scaled by alpha / rank")
    targets: tuple[LoraTarget, ...] = Field(
        default=("attention", "mamba", "experts", "shared"),
        min_length=1,
        description="which projections get an adapter: by kind, of the main model's layers; its output; and with `mtp` "
        "those of the layers in prediction heads",
    )

    @model_validator(mode="after")
    def _each_target_once(self) -> "Adapter":
        if len(set(self.targets)) != len(self.targets):
            raise ValueError(f"each adapter target may stand once, got {', '.join(self.targets)}; leave out the second")
        return self

    @property
    def in_heads(self) -> tuple[LoraTarget, ...]:
        """The kinds of projections that get an adapter within prediction heads."""
        return ("attention", "mamba", "experts", "shared") if "mtp" in self.targets else ()

    @property
    def on_experts(self) -> bool:
        """Whether routed experts get adapters."""
        return "experts" in (*self.targets, *self.in_heads)


class Recipe(Frozen):
    """How a candidate is trained from the substrate."""

    adapter: Adapter | None = Field(default=None, description="low-rank adapter; none means full fine-tuning")
    optimizer: Literal["adam", "sgd"] = Field(default="adam", description="AdamW, or SGD with momentum = beta1")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(default=0.98, ge=0, lt=1, description="decay of the second moment")
    epsilon: float = Field(default=1e-8, gt=0, le=1e-3, description="added to the root of the second moment")
    lr: float = Field(default=3e-3, ge=1e-7, le=1.0, description="peak learning rate")
    schedule: Schedule = Field(default="cosine", description="decay from the peak after warm-up")
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1, description="final learning rate as a share of the peak")
    warmup_steps: int = Field(default=10, ge=0, le=100_000, description="steps of linear warm-up from zero")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="decoupled weight decay")
    clip_grad: float = Field(default=1.0, ge=0, le=1000, description="clip the global gradient norm; 0 is off")
    batch_size: int = Field(default=64, ge=1, le=65_536, description="rows per optimizer step over all ranks")
    steps: int = Field(default=140, ge=1, le=1_000_000, description="optimizer steps")
    sequence_length: int = Field(
        default=80, ge=8, le=1_048_576, description="longest row in tokens; longer is an error"
    )
    prompt_loss_weight: float = Field(default=0.0, ge=0, le=1, description="loss weight of prompt tokens")
    trace_loss_weight: float = Field(default=1.0, ge=0, le=10, description="loss weight of worked-trace tokens")
    answer_loss_weight: float = Field(default=1.0, gt=0, le=10, description="loss weight of the boxed answer's tokens")
    checkpoint_selection: Selection = Field(
        default="last",
        description="which weights a run hands on: the last, or of the last half's quarter points those of lowest "
        "held-out loss, families weighted as in the mix or equally",
    )

    @model_validator(mode="after")
    def _warmup_fits(self) -> "Recipe":
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})")
        return self

    def lr_at(self, step: int) -> float:
        """Learning rate of optimizer step `step` (0-based)."""
        import math

        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[self.schedule]
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * shape)
