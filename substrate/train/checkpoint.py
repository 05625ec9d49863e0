"""Checkpoints: a folder that is whole or absent, with a manifest that names each file by its sha256.

Two kinds. `weights` or `adapter` is what a run hands on to its evaluation. `resume` also holds the optimizer's
moments, the random generators and the trainer's own state, so that a run killed after it goes on bit for bit as if it
had not been. Files are safetensors and JSON, no pickles: 0.02 CPU-seconds (nano).

A folder is written under a temporary name, its manifest last, and renamed. What a run hands on is one whole model,
which rank 0 writes as it gathers it, a tensor at a time; how several ranks save what they need to go on is `resume`'s
matter.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from megatron_evolve.launch.fence import check_fence
from megatron_evolve.launch.rundir import RunDirError, make_folder, publish, read_json, write_json, write_whole
from megatron_evolve.substrate.digest import digest_file
from megatron_evolve.substrate.frozen import Frozen
from megatron_evolve.substrate.manifest import SourceFile
from megatron_evolve.substrate.model.tensor_file import Outgoing, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_evolve.substrate.model.parts import Whole

MANIFEST = "manifest.json"
log = logging.getLogger(__name__)
Kind = Literal["weights", "adapter", "resume"]


class Checkpoint(Frozen):
    """A checkpoint's manifest."""

    schema_: Literal["checkpoint/1"] = Field(default="checkpoint/1", alias="schema")
    kind: Kind
    step: int = Field(ge=0, description="optimizer steps taken")
    run: str = Field(description="digest of what is trained: two checkpoints of one run have the same")
    state: dict[str, Any] = Field(
        default_factory=dict, description="what the trainer needs to go on, or wishes to tell"
    )
    files: dict[str, SourceFile]


def save_checkpoint(
    folder: Path,
    *,
    kind: Kind,
    step: int,
    run: str,
    tensors: dict[str, "dict[str, Tensor] | list[Outgoing]"],
    state: dict[str, Any],
) -> None:
    """Write `tensors` and the manifest as `folder`, replacing an older one. Rank 0 only.

    A file's stem leads to named tensors, or to what `streamed` gives, which needs no more memory than one tensor.
    Raises RunDirError in one sentence for a full disk, a read-only folder, or a run folder that a later start has
    taken; an older checkpoint is then still whole.
    """
    from safetensors.torch import save

    check_fence()
    for left_behind in folder.parent.glob(f".{folder.name}.*.tmp"):  # by a killed attempt; a run folder has one writer
        shutil.rmtree(left_behind)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    make_folder(unfinished)
    files = {}
    try:
        for stem, named in tensors.items():
            path = unfinished / f"{stem}.safetensors"
            if isinstance(named, list):
                files[path.name] = write_tensors(path, named, marked=False)
                continue
            # Megatron keeps parameters as views of one buffer; a file wants each tensor by itself.
            write_whole(path, save({name: value.detach().contiguous().clone() for name, value in named.items()}))
            files[path.name] = describe(path)
        manifest = Checkpoint(kind=kind, step=step, run=run, state=state, files=files)
        write_json(unfinished / MANIFEST, manifest.model_dump(mode="json", by_alias=True))
        check_fence()
        if folder.exists():
            shutil.rmtree(folder)
        publish(unfinished, folder)
    except RunDirError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        told = (error.strerror or str(error)).lower()
        raise RunDirError(f"cannot write {folder}: {told}; free space there, or make it writable") from error


def streamed(whole: "Whole", stream: "Iterator[tuple[str, Tensor]]") -> list[Outgoing]:
    """The tensors of `stream`, an iterator of `whole`, for `save_checkpoint`: each asked for when it is written."""
    import torch

    def bytes_of(name: str) -> "Iterator[memoryview]":
        found, tensor = next(stream)
        assert found == name, f"{found} came for {name}"
        yield memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())

    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return [Outgoing(one.name, names[one.dtype], one.shape, partial(bytes_of, one.name)) for one in whole.parts]


def describe(path: Path) -> SourceFile:
    """Digest and size of a file as a manifest names it."""
    return SourceFile(sha256=digest_file(path), bytes=path.stat().st_size)


def read_manifest(folder: Path) -> Checkpoint:
    """The manifest of a checkpoint, its files not looked at. Raises ValueError in one sentence."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"expected a checkpoint in {folder}, it has no {MANIFEST}: it is missing or was never finished; train again"
        )
    try:
        return Checkpoint.parse(read_json(path), where=str(path))
    except RunDirError as error:
        raise ValueError(f"{error}; or train again") from error


def load_checkpoint(folder: Path) -> Checkpoint:
    """The manifest of a checkpoint after every byte it names was hashed. Raises ValueError in one sentence."""
    checkpoint = read_manifest(folder)
    for name, expected in checkpoint.files.items():
        check_file(Path(folder) / name, expected)
    return checkpoint


def check_file(path: Path, expected: SourceFile) -> None:
    """Raises ValueError in one sentence unless the file is there, byte for byte."""
    if not path.is_file():
        raise ValueError(
            f"expected the checkpoint file {path} with {expected.bytes} bytes; it is missing, or was pruned to free "
            "its space: train the run again to have it back"
        )
    size = path.stat().st_size
    if size != expected.bytes:
        raise ValueError(
            f"expected {expected.bytes} bytes in {path}, got {size}: it is truncated or changed; train again"
        )
    if digest_file(path) != expected.sha256:
        raise ValueError(f"expected sha256 {expected.sha256[:12]} of {path}, got {digest_file(path)[:12]}; train again")


def read_tensors(folder: Path, stem: str) -> dict[str, "Tensor"]:
    """The named tensors of one file of a loaded checkpoint."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / f"{stem}.safetensors")


def latest_resume(folder: Path, run: str) -> Path | None:
    """The newest whole `resume` checkpoint under `folder` that belongs to `run`, or None.

    A damaged one is passed over, which the log tells: starting earlier costs time and changes no bit.
    """
    for path in resume_folders(folder):
        try:
            if load_checkpoint(path).run == run:
                return path
        except ValueError as error:
            log.warning("not resuming from %s: %s", path.name, error)
    return None


def resume_folders(folder: Path) -> list[Path]:
    """The checkpoints to go on from under `folder`, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def resume_folder(folder: Path, step: int) -> Path:
    """Where the `resume` checkpoint of `step` stands; names sort by step."""
    return folder / f"step-{step:09d}"


def keep_only(folder: Path, newest: Path) -> None:
    """Remove every checkpoint under `folder` but `newest`, and what killed runs left behind."""
    for path in folder.iterdir():
        if path != newest:
            shutil.rmtree(path, ignore_errors=True)


def optimizer_tensors(model: Any, optimizers: list[Any]) -> dict[str, "Tensor"]:
    """The moments and step counts of torch optimizers, by `<what>/<parameter name>`."""
    import torch

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{what}/{names[id(parameter)]}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for what, value in state.items()
        if torch.is_tensor(value)
    }


def put_optimizer_tensors(model: Any, optimizers: list[Any], tensors: dict[str, "Tensor"]) -> None:
    """The inverse of `optimizer_tensors`, on a model and optimizers freshly made from the same recipe."""
    parameters = dict(model.named_parameters())
    owner = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for key, value in tensors.items():
        what, name = key.split("/", 1)
        parameter = parameters[name]
        owner[id(parameter)].state[parameter][what] = value.clone()


def generator_tensors() -> dict[str, "Tensor"]:
    """The states of torch's generator and of Megatron's tracked ones."""
    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return {
        "torch": torch.get_rng_state(),
        **{f"tracked/{name}": s for name, s in get_cuda_rng_tracker().get_states().items()},
    }


def put_generator_tensors(tensors: dict[str, "Tensor"]) -> None:
    """The inverse of `generator_tensors`."""
    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.set_rng_state(tensors["torch"])
    tracked = {name.removeprefix("tracked/"): state for name, state in tensors.items() if name.startswith("tracked/")}
    get_cuda_rng_tracker().set_states(tracked)
