"""A trained run as a model to be asked: the substrate with the run's weights, or its adapter, in place.

The judge's process and the tests open runs here; nothing of the trainer is needed to do so.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_evolve.substrate.manifest import Substrate
from megatron_evolve.substrate.train.checkpoint import load_checkpoint, read_tensors
from megatron_evolve.substrate.train.preload import preload

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

CHECKPOINT_FOLDER = "checkpoint"
WEIGHTS_FILE = "weights.safetensors"
TOKENIZER_FILE = "tokenizer.json"


def open_chunks(
    folder: Path, substrate: Substrate, experts: str = "auto", recompute: str = "none", layers: str = "auto"
) -> "list[HybridModel]":
    """This rank's part of the model with the substrate's own weights, in the layout of the running process group.

    It computes in the dtype in which the weights are stored. `experts` names the backend of the maths, `recompute` what
    a backward pass computes again (`build.RECOMPUTE`), `layers` the norms and linears (`operations.LAYERS`).
    """
    from megatron_evolve.substrate.model import build
    from megatron_evolve.substrate.model.architecture import Architecture
    from megatron_evolve.substrate.model.weights import load_part, stored_dtype

    architecture, paths = Architecture.model_validate(substrate.architecture), substrate.weight_paths(folder)
    fields = {"params_dtype": stored_dtype(paths), **build.RECOMPUTE[recompute]}
    chunks = build.build_chunks(architecture, seed=0, experts=experts, layers=layers, **fields)
    load_part(chunks, paths)
    return chunks


def open_substrate(folder: Path, substrate: Substrate) -> "HybridModel":
    """The whole model with the substrate's own weights. Joins a process group of one unless the process is in one."""
    preload()
    import torch

    from megatron_evolve.substrate.model import build

    if not torch.distributed.is_initialized():
        build.start(seed=0)
    (model,) = open_chunks(folder, substrate)
    return model


def open_trained(folder: Path, substrate: Substrate, run: Path) -> "HybridModel":
    """The model that `run` handed on, in evaluation mode; the substrate's own if `run` is its folder.

    Raises ValueError in one sentence if the run's checkpoint is missing, damaged or of another substrate.
    """
    model = open_substrate(folder, substrate)
    if run.resolve() != folder.resolve():
        _put_checkpoint(model, run / CHECKPOINT_FOLDER, substrate)
    return model.eval()


def _put_checkpoint(model: "HybridModel", folder: Path, substrate: Substrate) -> None:
    checkpoint = load_checkpoint(folder)
    if checkpoint.state.get("substrate") != substrate.digest:
        raise ValueError(
            f"{folder} was trained from substrate {str(checkpoint.state.get('substrate'))[:12]}, not from "
            f"{substrate.digest[:12]}; give the substrate it was trained from"
        )
    if checkpoint.kind == "weights":
        from megatron_evolve.substrate.model.weights import put_weights

        put_weights(model, read_tensors(folder, "weights"), str(folder))
    elif checkpoint.kind == "adapter":
        from megatron_evolve.substrate.model.lora import add_lora, load_adapter

        adapter = checkpoint.state["adapter"]
        add_lora(model, rank=adapter["rank"], alpha=adapter["alpha"], targets=tuple(adapter["targets"]), seed=0)
        load_adapter(model, read_tensors(folder, "adapter"))
    else:
        raise ValueError(f"{folder} is a {checkpoint.kind} checkpoint, which is for going on; train the run to its end")
