"""A run as a folder that other people's servers load: its adapter, or the whole model with the adapter merged in.

    adapter_config.json  adapter_model.safetensors
    config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json

The tokenizer is ours to the id: the same pieces, cut by the same regular expression, and text that looks like a special
token stays text.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_evolve.eval.engines.seam import Examinee
from megatron_evolve.launch.rundir import make_folder, write_whole
from megatron_evolve.substrate.tokenizer import EOS, PAD, PieceTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
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
    """Writes the whole model, the adapter merged in. Raises ValueError if the checkpoint is damaged."""
    from safetensors.torch import save_file

    from megatron_evolve.substrate.model.huggingface import huggingface_config

    architecture, state = merged_state(examinee)
    tokenizer = examinee.tokenizer
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    make_folder(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    _write(folder / "config.json", {**huggingface_config(architecture), **special, "dtype": dtype})
    _write(folder / "generation_config.json", {**special, "do_sample": False})
    write_tokenizer(tokenizer, folder)


def merged_state(examinee: Examinee) -> "tuple[Architecture, dict[str, Tensor]]":
    """The run's shapes, and its weights under transformers 5 names with the adapter added in; each tensor its own."""
    from megatron_evolve.substrate.model.architecture import Architecture
    from megatron_evolve.substrate.model.huggingface import to_huggingface

    model = examinee.open()
    from megatron_evolve.substrate.model.lora import merge  # needs Megatron, which `open` prepares

    architecture = Architecture.model_validate(examinee.substrate.architecture)
    state = to_huggingface(merge(model), architecture)
    return architecture, {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}


def write_tokenizer(tokenizer: PieceTokenizer, folder: Path) -> None:
    """Our tokenizer in the format of the `tokenizers` package, and what transformers wants to know of it."""
    write_whole(folder / "tokenizer.json", fast_tokenizer(tokenizer).to_str(pretty=False))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # "<eos>" in a prompt is five characters, as it is with us
        },
    )


def fast_tokenizer(tokenizer: PieceTokenizer) -> "Tokenizer":
    """A word-level tokenizer whose words are our pieces. A character that no piece covers is an error there too."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    # An id past the pieces is reserved, and decodes to its name.
    texts = [PAD, EOS, *(tokenizer.decode([token]) for token in range(2, tokenizer.vocab_size))]
    fast = Tokenizer(models.WordLevel({text: token for token, text in enumerate(texts)}, unk_token="<none>"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(tokenizer.pattern), behavior="isolated")
    fast.decoder = decoders.Fuse()
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (PAD, EOS)])
    fast.encode_special_tokens = True
    return fast


def _write(path: Path, document: dict) -> None:
    write_whole(path, json.dumps(document, indent=2) + "\n")
