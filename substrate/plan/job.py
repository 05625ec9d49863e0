"""What is to be trained and how: everything besides the architecture and the layout that memory and time depend on."""

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_evolve.substrate.frozen import Frozen
from megatron_evolve.substrate.recipe import Adapter

GIB = 2**30


class Job(Frozen):
    """One way of training. bf16 is a GPU with fused kernels, `scan` apart; float32 the PyTorch path that a CPU runs."""

    mode: Literal["sft", "lora"] = Field(description="all weights, or adapters over frozen ones")
    sequence_length: int = Field(ge=1, description="tokens a row")
    micro_batch: int = Field(default=1, ge=1, description="rows that one rank takes at once")
    batch_size: int = Field(default=128, ge=1, description="rows an optimizer step over all ranks")
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="activations computed again in the backward pass: none, those of expert layers (Megatron's module "
        "moe, and layernorm), or all but each layer's input",
    )
    recompute_norms: bool = Field(
        default=True,
        description="of selective recompute: norms too, which Megatron 0.19 does with Transformer Engine's",
    )
    scan: Literal["mamba-ssm", "pytorch"] = Field(
        default="mamba-ssm",
        description="what Mamba layers run on in bf16, as `doctor` says of a machine; float32 always runs on pytorch",
    )
    loss: Literal["chunks", "logits"] = Field(
        default="chunks",
        description="of a trained output table: in chunks of logits (`model.head`), or Megatron's own, which keeps all",
    )
    precision: Literal["bf16", "float32"] = Field(default="bf16", description="of weights and activations")
    optimizer_state: Literal["full", "reduced"] = Field(
        default="full",
        description="gradients, master weights and two moments in float32, or in bf16, fp16 and bf16 (Megatron's "
        "precision-aware optimizer)",
    )
    offload: float = Field(default=0.0, ge=0, le=1, description="share of the optimizer's state kept in host memory")
    adapter: Adapter = Field(default=Adapter(rank=32, alpha=32), description="what LoRA trains")

    @model_validator(mode="after")
    def _state_fits(self) -> Self:
        if self.precision == "float32" and self.optimizer_state == "reduced":
            raise ValueError("optimizer_state reduced needs precision bf16; got float32: change one of them")
        return self

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight, and of an element of an activation."""
        return 2 if self.precision == "bf16" else 4

    @property
    def gradient_bytes(self) -> int:
        """Bytes of a trained parameter's gradient, whole on every rank."""
        return 2 if self.optimizer_state == "reduced" else 4

    @property
    def state_bytes(self) -> float:
        """Bytes of optimizer state a trained parameter on the device, over all the ranks that share it.

        Two moments and, where the weights are bf16, a master copy; in float32 the weights are their own master.
        """
        whole = 8 if self.precision == "float32" else 6 if self.optimizer_state == "reduced" else 12
        return whole * (1 - self.offload)

    def micro_batches(self, copies: int) -> int:
        """Micro-batches a step on each of so many data-parallel ranks. Raises ValueError where they do not divide."""
        rows = copies * self.micro_batch
        if self.batch_size % rows:
            raise ValueError(
                f"batch size {self.batch_size} must be a multiple of {copies} data-parallel ranks x {self.micro_batch} "
                "rows; change one of them"
            )
        return self.batch_size // rows


def memory_bytes(text: str) -> int:
    """`80GB` or `80GiB` in bytes, both 2^30: a GPU's label counts so (an H100 of "80GB" reports 81,559 MiB).

    Raises ValueError where the text is no such size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*Gi?B", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ValueError(f"a GPU's memory is written as in `80GB`; got {text!r}: give its label")
    return int(float(found[1]) * GIB)
