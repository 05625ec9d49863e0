"""How a killed run goes on: everything that the next step needs, on disk, whole or absent.

One process in float32 writes safetensors and goes on bit for bit. Several ranks each hold a part, so they write
Megatron's distributed checkpoint, which several ranks in any other layout read, optimizer state and all; one process of
bfloat16 weights writes it too, for the float32 copy that its optimizer keeps. That form keeps no random generators:
nothing draws from them once training has begun. Of optimizers it keeps Adam's state alone; SGD on several ranks or in
bfloat16 starts anew. A run's folder is its own; nothing here is read from anybody else.

    resume/step-000000050/manifest.json     last: digest of every file, the trainer's own state
                          *.safetensors     one process
                          distributed/      several ranks
"""

import functools
import logging
import queue
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_evolve.launch.fence import check_fence
from megatron_evolve.launch.rundir import make_folder, publish, write_json
from megatron_evolve.substrate.manifest import SourceFile
from megatron_evolve.substrate.train.checkpoint import (
    MANIFEST,
    Checkpoint,
    check_file,
    describe,
    generator_tensors,
    keep_only,
    latest_resume,
    optimizer_tensors,
    put_generator_tensors,
    put_optimizer_tensors,
    read_manifest,
    read_tensors,
    resume_folder,
    resume_folders,
    save_checkpoint,
)
from megatron_evolve.substrate.train.optimizer import torch_optimizers
from megatron_evolve.substrate.train.trained import put_trained_tensors, trained_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_evolve.substrate.train.selection import Selector
    from megatron_evolve.substrate.train.step import Trainer

DISTRIBUTED = "distributed"
log = logging.getLogger(__name__)
# The only form of Megatron 0.19 in which every parallel size may change between saving and loading.
FORM = "fully_reshardable"


def save_resume(
    folder: Path, run: str, step: int, trainer: "Trainer", selector: "Selector", own: dict[str, Any]
) -> None:
    """Write the checkpoint of `step` under `folder`, then remove older ones. All ranks call it."""
    if trainer.distributed:
        _save_distributed(folder, run, step, trainer, selector, own)
    if not _alone(trainer):
        return
    tensors = {
        "model": trained_tensors(trainer.chunks, trainer.recipe.adapter is not None),
        "optimizer": optimizer_tensors(trainer.chunks[0], torch_optimizers(trainer.optimizer)),
        "generators": generator_tensors(),
        "selected": selector.tensors,
    }
    newest = resume_folder(folder, step)
    save_checkpoint(newest, kind="resume", step=step, run=run, tensors=tensors, state=own)
    keep_only(folder, newest)


def restore_resume(folder: Path, run: str, trainer: "Trainer", selector: "Selector") -> Checkpoint | None:
    """Bring trainer and selector to the newest whole checkpoint of `run` and return its manifest, or None without one.

    Raises ValueError, on all ranks, for a checkpoint that this layout cannot read.
    """
    if trainer.distributed:
        return _restore_distributed(folder, run, trainer, selector)
    if not _alone(trainer):
        return None
    path = latest_resume(folder, run)
    if path is None:
        return None
    checkpoint = read_manifest(path)
    _fits(checkpoint, path, trainer)
    put_trained_tensors(trainer.chunks, read_tensors(path, "model"), trainer.recipe.adapter is not None)
    put_optimizer_tensors(trainer.chunks[0], torch_optimizers(trainer.optimizer), read_tensors(path, "optimizer"))
    put_generator_tensors(read_tensors(path, "generators"))
    chosen = checkpoint.state["selected"]
    selector.restore(chosen["step"], chosen["loss"], read_tensors(path, "selected"))
    return checkpoint


def _alone(trainer: "Trainer") -> bool:
    """Whether this is the one process in float32 whose state is plain tensors."""
    return trainer.world == 1 and not trainer.chunks[0].config.bf16


# --- several ranks ----------------------------------------------------------------------------------------------------


def _save_distributed(
    folder: Path, run: str, step: int, trainer: "Trainer", selector: "Selector", own: dict[str, Any]
) -> None:
    import torch
    from megatron.core import dist_checkpointing

    newest = resume_folder(folder, step)
    partial = newest.with_name(f".{newest.name}.tmp")  # one name for all ranks: they write into it together
    rank = torch.distributed.get_rank()
    if rank == 0:
        check_fence()
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial / DISTRIBUTED)
    torch.distributed.barrier()
    _hand_over_in_process()
    dist_checkpointing.save(_sharded(trainer, selector.tensors, is_loading=False), str(partial / DISTRIBUTED))
    described: list[Any] = [None] * trainer.world
    torch.distributed.all_gather_object(described, _describe_own(partial, rank))
    if rank == 0:
        files = {name: file for found in described for name, file in found.items()}
        state = {**own, "layout": trainer.layout.model_dump()}
        manifest = Checkpoint(kind="resume", step=step, run=run, state=state, files=files)
        check_fence()
        write_json(partial / MANIFEST, manifest.model_dump(mode="json", by_alias=True))
        shutil.rmtree(newest, ignore_errors=True)
        publish(partial, newest)
        keep_only(folder, newest)
    torch.distributed.barrier()


@functools.cache
def _hand_over_in_process() -> None:
    """What was written is told through a queue of this process.

    For saves in the background Megatron 0.19 starts a process for that queue, also where there are none: 0.57 GB and
    seconds of imports beside every rank, and it outlives a rank that is killed.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()


def _describe_own(partial: Path, rank: int) -> dict[str, SourceFile]:
    """The digests of the files this rank wrote, `__<rank>_<n>.distcp`; rank 0 also takes what belongs to no rank."""
    found = {}
    for path in sorted((partial / DISTRIBUTED).iterdir()):
        owner = path.name.removeprefix("__").split("_")[0]
        if owner == str(rank) or (rank == 0 and not owner.isdecimal()):
            found[f"{DISTRIBUTED}/{path.name}"] = describe(path)
    return found


def _restore_distributed(folder: Path, run: str, trainer: "Trainer", selector: "Selector") -> Checkpoint | None:
    import torch
    from megatron.core import dist_checkpointing

    for path in resume_folders(folder):
        checkpoint = _whole(path, run, trainer)
        if checkpoint is not None:
            break
    else:
        return None
    _fits(checkpoint, path, trainer)
    chosen = checkpoint.state["selected"]
    asked = trained_tensors(trainer.chunks, trainer.recipe.adapter is not None) if chosen["step"] is not None else {}
    _seed_moments(trainer)
    state = _sharded(trainer, {name: torch.empty_like(value) for name, value in asked.items()}, is_loading=True)
    loaded = dist_checkpointing.load(state, str(path / DISTRIBUTED))
    for number, chunk in enumerate(trainer.chunks):
        _, unknown = chunk.load_state_dict(loaded[f"model{number}"], strict=False)
        assert not unknown, unknown
    for kind, optimizer in _optimizers(trainer).items():
        own = optimizer.state_dict()
        for group in own["optimizer"]["param_groups"]:
            group["step"] = checkpoint.step
        moments = {"param_state": loaded["optimizer"][kind], "param_state_sharding_type": FORM}
        optimizer.load_state_dict({**own, **moments})
    selector.restore(chosen["step"], chosen["loss"], loaded["selected"])
    return checkpoint


def _whole(path: Path, run: str, trainer: "Trainer") -> Checkpoint | None:
    """The checkpoint if it belongs to the run and every byte is as written; ranks share out the hashing."""
    import torch

    problem, checkpoint = "", None
    try:
        checkpoint = read_manifest(path)
        if checkpoint.run == run:
            for name in sorted(checkpoint.files)[torch.distributed.get_rank() :: trainer.world]:
                check_file(path / name, checkpoint.files[name])
    except ValueError as error:
        problem = str(error)
    found: list[Any] = [None] * trainer.world
    torch.distributed.all_gather_object(found, (problem, checkpoint is not None and checkpoint.run == run))
    problems = [text for text, _ in found if text]
    if problems and torch.distributed.get_rank() == 0:
        log.warning("not resuming from %s: %s", path.name, problems[0])
    return checkpoint if not problems and all(mine for _, mine in found) else None


def _fits(checkpoint: Checkpoint, path: Path, trainer: "Trainer") -> None:
    """Raises ValueError where the checkpoint has the other of the two forms."""
    saved = checkpoint.state.get("layout")
    if (saved is None) == trainer.distributed:
        writer, reader = ("one process", "several ranks")[:: 1 if saved is None else -1]
        raise ValueError(
            f"{path} was written by {writer} and is read by {reader}, which keep another form: go on as it was begun, "
            "or start the run anew in an empty folder"
        )


def _sharded(trainer: "Trainer", selected: dict[str, "Tensor"], *, is_loading: bool) -> dict[str, Any]:
    """What Megatron saves and loads: the trained tensors, their optimizer, the selected ones."""
    from megatron_evolve.substrate.model.parts import global_name

    adapter = trainer.recipe.adapter is not None
    state: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    for number, chunk in enumerate(trainer.chunks):
        entries = chunk.sharded_state_dict()
        # Transformer Engine's 8-bit scales, of which there are none: so either kind of layers reads the other's state
        entries = {name: entry for name, entry in entries.items() if not name.endswith("_extra_state")}
        if adapter:  # the frozen base stands in the substrate
            entries = {name: entry for name, entry in entries.items() if name.endswith((".lora_A", ".lora_B"))}
        state[f"model{number}"] = entries
        for name, entry in entries.items():
            if (of := global_name(chunk, name)) in selected:
                chosen[of] = replace(entry, key=f"selected.{entry.key}", data=selected[of])
    # Of an optimizer the moments alone: what else it holds follows from the recipe and the step, and differs by rank.
    form = {"distrib_optim_sharding_type": FORM}
    moments = {
        kind: optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=form)["param_state"]
        for kind, optimizer in _optimizers(trainer).items()
    }
    return {**state, "optimizer": moments, "selected": chosen}


def _optimizers(trainer: "Trainer") -> dict[str, Any]:
    """This rank's optimizers by what they hold. A pipeline stage without experts has none for them."""
    parts = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    return {
        "dense" if getattr(part.buffers[0].params[0], "allreduce", True) else "experts": part
        for part in parts
        if part.buffers
    }


def _seed_moments(trainer: "Trainer") -> None:
    """Adam's moments as they are before the first step: Megatron loads into a state, it does not make one."""
    import torch

    for optimizer in torch_optimizers(trainer.optimizer):
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            zero = torch.zeros_like(parameter)
            optimizer.state[parameter] = {"step": torch.zeros(()), "exp_avg": zero, "exp_avg_sq": zero.clone()}
