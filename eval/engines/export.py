"""A run as a folder that other people's servers load: its adapter, or the whole model with the adapter merged in.

    adapter_config.json  adapter_model.safetensors
    config.json  model*.safetensors  tokenizer.json  tokenizer_config.json

And the merged weights in memory, for who decodes in this process.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_evolve.eval.engines.seam import Examinee

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_evolve.substrate.model.architecture import Architecture


@contextmanager
def exported(examinee: Examinee, name: str, write: Callable[[Examinee, Path], None]) -> Iterator[Path]:
    """The run as a folder of that name, for as long as it is needed: what it holds, the run keeps already."""
    folder = (examinee.work / name).resolve()
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
    try:
        write(examinee, folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_adapter(examinee: Examinee, folder: Path) -> None:
    """Writes the run's adapter in PEFT's format, one tensor per expert as vLLM reads it. The model is not opened.

    Raises ValueError for a run without an adapter.
    """
    from megatron_evolve.substrate.adapter import export_adapter

    export_adapter(examinee.run, examinee.substrate_folder, folder, layout="each")


def write_model(examinee: Examinee, folder: Path) -> None:
    """Writes the whole model, the adapter merged in, from file to file. Raises ValueError for a damaged checkpoint.

    Of the substrate, which the campaign's start hashed, large files are sampled.
    """
    from megatron_evolve.substrate.exchange import export_hf

    export_hf(examinee.substrate_folder, folder, run=None if examinee.is_substrate else examinee.run, sampled=True)


def merged_state(examinee: Examinee) -> "tuple[Architecture, dict[str, Tensor]]":
    """The run's shapes, and its weights under transformers 5 names with the adapter added in; each tensor its own."""
    from megatron_evolve.substrate.model.architecture import Architecture
    from megatron_evolve.substrate.model.huggingface import to_huggingface

    model = examinee.open()
    from megatron_evolve.substrate.model.lora import merge  # needs Megatron, which `open` prepares

    architecture = Architecture.model_validate(examinee.substrate.architecture)
    state = to_huggingface(merge(model), architecture)
    return architecture, {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}
