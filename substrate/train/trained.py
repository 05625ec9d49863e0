"""What training changes, by the names of the whole model: the adapter alone, or every parameter and routing bias."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from torch import Tensor

ADAPTER_ENDINGS = (".lora_A", ".lora_B")


def trained_tensors(chunks: "Sequence[HybridModel]", adapter: bool) -> dict[str, "Tensor"]:
    """This rank's trained tensors, sharing memory with the model."""
    from megatron_evolve.substrate.model.parts import parts_of

    return {
        name: tensor for name, (_, tensor) in parts_of(chunks).items() if not adapter or name.endswith(ADAPTER_ENDINGS)
    }


def put_trained_tensors(chunks: "Sequence[HybridModel]", tensors: Mapping[str, "Tensor"], adapter: bool) -> None:
    """The inverse of `trained_tensors`, on a model of the same layout."""
    import torch

    own = trained_tensors(chunks, adapter)
    if own.keys() != tensors.keys():
        other = sorted(own.keys() ^ tensors.keys())
        raise ValueError(
            f"expected the {len(own)} trained tensors of this rank; {', '.join(other[:3])} are in one and not in the "
            "other: use the layout and the recipe they were trained with"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
