"""One training run as a process: from a frozen substrate, a candidate and a seed to a checkpoint and `result.json`.

    python -m megatron_evolve.substrate.train.run --substrate DIR --candidate candidate.json --seed N --out RUNDIR

also on several ranks under torchrun or srun, spread as `--layout tp=2,ep=2` says, or as `main(argv)` in a child that a
warm parent forked after `preload`. The layout changes where a run is computed, not what. In RUNDIR:

    metrics.jsonl    while it trains; how far it is stands in its attempt's progress.json
    resume/step-N/   how to go on after a kill; gone when the run is done
    checkpoint/      the weights or the adapter that the run hands on
    tensorboard/     event files, where --tensorboard asks for them
    result.json      last: the run is done, trained or diverged

A diverged run is a result and exits 0. SIGTERM makes all ranks save after the same step and exit 75; anything else
that stops a run exits 1. Either way one sentence stands on stderr and there is no result.json; the same command again
goes on from the last whole `resume` checkpoint, bit for bit.
"""

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_evolve.kernels.backend import resolved
from megatron_evolve.launch.fence import check_fence
from megatron_evolve.launch.rundir import RunDirError, make_folder, read_json, write_json
from megatron_evolve.substrate import logs, operations
from megatron_evolve.substrate.checkpoint_tokenizer import read_tokenizer
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.layout import Layout
from megatron_evolve.substrate.manifest import Substrate, check_start, read_manifest
from megatron_evolve.substrate.model.architecture import Architecture
from megatron_evolve.substrate.packing import Packer, read_excluded
from megatron_evolve.substrate.ranks import place_in
from megatron_evolve.substrate.recipe import Recipe
from megatron_evolve.substrate.settings import Settings
from megatron_evolve.substrate.train.checkpoint import Kind, save_checkpoint, streamed
from megatron_evolve.substrate.train.fit import RESUME_FOLDER, Fit, fit
from megatron_evolve.substrate.train.open import CHECKPOINT_FOLDER, open_chunks
from megatron_evolve.substrate.train.optimizer import optimizer_taken
from megatron_evolve.substrate.train.preload import preload
from megatron_evolve.substrate.train.record import finite
from megatron_evolve.substrate.train.stopping import AGAIN_STATUS, Interrupted, StopFlag
from megatron_evolve.substrate.train.trained import trained_tensors

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

RESULT_FILE = "result.json"
log = logging.getLogger(__name__)
SAVE_EVERY = 50  # steps; a resume checkpoint of the nano model costs 0.02 CPU-seconds


def main(argv: list[str]) -> int:
    """Train one run; returns the exit status."""
    arguments = _parser().parse_args(argv)
    logs.of_job(otherwise="train")
    try:
        with StopFlag() as stop:
            return _run(arguments, stop)
    except Interrupted as stopped:
        log.error("megatron-evolve train: %s", stopped)
        return AGAIN_STATUS
    except (ValueError, OSError, RunDirError) as error:
        log.error("megatron-evolve train: %s", error)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_evolve.substrate.train.run", description="one training run"
    )
    parser.add_argument("--substrate", type=Path, required=True, metavar="DIR", help="frozen substrate")
    parser.add_argument("--candidate", type=Path, required=True, metavar="FILE", help="candidate.json")
    parser.add_argument("--seed", type=int, required=True, help="seed of the rows and of an adapter's start")
    parser.add_argument("--out", type=Path, required=True, metavar="RUNDIR", help="folder of this run")
    parser.add_argument(
        "--save-every", type=int, default=SAVE_EVERY, metavar="STEPS", help="between resume checkpoints"
    )
    parser.add_argument(
        "--exclude", type=Path, metavar="FILE", help="instance hashes of rows not to train on, one a line"
    )
    parser.add_argument("--layout", default="", metavar="SIZES", help="as tp=2,ep=2; what is left is data parallel")
    parser.add_argument(
        "--check", type=int, metavar="RANKS", help="whether so many ranks can run it, by the manifest alone; runs none"
    )
    parser.add_argument("--micro-rows", type=int, metavar="N", help="most rows that a rank computes at once")
    parser.add_argument("--packed", action="store_true", help="rows end to end in place of padded ones")
    parser.add_argument("--tensorboard", action="store_true", help="also write event files for TensorBoard")
    parser.add_argument(
        "--recompute",
        default="none",
        choices=("none", "selective", "full"),
        help="computed again in the backward pass: nothing, expert layers, or all layers",
    )
    parser.add_argument("--experts", default="auto", metavar="BACKEND", help="auto, eager, triton or reference")
    parser.add_argument("--layers", default="auto", help=f"norms and dense linears: {', '.join(operations.LAYERS)}")
    return parser


def _run(arguments: argparse.Namespace, stop: StopFlag) -> int:
    substrate = read_manifest(arguments.substrate)
    document = read_json(arguments.candidate)
    settings = _settings(document, substrate, arguments.candidate)
    layout = _layout(arguments, substrate, settings)
    if arguments.check is not None:
        return 0
    excluded = read_excluded(arguments.exclude) if arguments.exclude else frozenset()
    identity = {
        "candidate": document["id"],
        "substrate": substrate.digest,
        "settings": digest_of(settings),
        "seed": arguments.seed,
        "excluded": digest_of(sorted(excluded)) if excluded else None,
        **({"packed": True} if arguments.packed else {}),  # it decides bits: see `Trainer`
    }
    if _is_done(arguments.out, identity):
        return 0
    # One rank looks for its node's disk; the others wait for it where they all meet.
    check_start(arguments.substrate, files=place_in(os.environ).local_rank == 0)
    make_folder(arguments.out)
    preload()
    from megatron_evolve.substrate.model import build

    runtime = build.start(arguments.seed, layout)
    try:
        chunks = open_chunks(arguments.substrate, substrate, arguments.experts, arguments.recompute, arguments.layers)
        tokenizer = read_tokenizer(arguments.substrate)
        packer = Packer(settings.mix, substrate.construction, tokenizer, settings.recipe, arguments.seed, excluded)
        how = {name: getattr(arguments, name) for name in ("save_every", "micro_rows", "packed", "tensorboard")}
        how |= {"stop": stop}
        fitted = train(chunks, packer, arguments.out, identity, **how)
    finally:
        build.stop()
    if runtime.rank == 0:
        check_fence()
        taken = _taken(resolved(arguments.experts), settings.recipe, layout, arguments.layers)
        write_json(arguments.out / RESULT_FILE, {**result_of(fitted, identity), **taken})
        shutil.rmtree(arguments.out / RESUME_FOLDER, ignore_errors=True)
        log.info(
            "%s after %d steps in %.1f s", "diverged" if fitted.diverged else "trained", fitted.steps, fitted.seconds
        )
    return 0


def _taken(form: str, recipe: Recipe, layout: Layout, layers: str) -> dict[str, str]:
    """Which implementation each operation ran on; a loss of `logits` is Megatron's own (see `model.head`)."""
    from megatron_evolve.substrate.model.mamba_ssm import package_serves

    adapted = recipe.adapter is not None and "output" in recipe.adapter.targets  # the output table
    loss = f"logits, or {form} where they are more than a chunk" if recipe.adapter is None else form
    ours = "triton" if form == "triton" and layout.cp == 1 else "pytorch"
    return {
        "experts": form,
        "loss": "logits" if adapted or form == "reference" else loss,
        "gated_norm": "mamba-ssm" if package_serves() else ours,
        "layers": operations.linear(_here(), layers).path,
        "optimizer": optimizer_taken(recipe),
    }


def _is_done(out: Path, identity: dict[str, Any]) -> bool:
    """Whether an earlier call of the same command finished. Raises ValueError if another run's result stands there."""
    if not (out / RESULT_FILE).is_file():
        return False
    result = read_json(out / RESULT_FILE)
    other = [name for name in {**identity, "packed": True} if result.get(name) != identity.get(name)]
    if other:
        raise ValueError(
            f"{out} holds the result of another run ({', '.join(other)} differ); give each run its own folder"
        )
    return True


def _layout(arguments: argparse.Namespace, substrate: Substrate, settings: Settings) -> Layout:
    """Raises ValueError, before anything slow is imported, where the layout cannot train this model on these ranks."""
    layout = Layout.from_text(arguments.layout)
    ranks = place_in(os.environ).world_size if arguments.check is None else arguments.check
    if arguments.micro_rows is not None and arguments.micro_rows < 1:
        raise ValueError(f"--micro-rows must be at least 1; got {arguments.micro_rows}: leave it out for no limit")
    if arguments.packed and layout.cp > 1:
        raise ValueError(f"--packed lays rows whole on a rank; got cp={layout.cp}: set cp=1 or leave --packed out")
    layout.check(
        Architecture.model_validate(substrate.architecture),
        ranks=ranks,
        batch_size=settings.recipe.batch_size,
        adapter=settings.recipe.adapter is not None and settings.recipe.adapter.on_experts,
        context_parallel=operations.context_parallel(_here()).serves,
    )
    operations.check_layers(_here(), arguments.layers)
    return layout


def _here() -> operations.Machine:
    return operations.machine(bool(operations.gpu_names()))


def _settings(document: Any, substrate: Substrate, path: Path) -> Settings:
    if not isinstance(document, dict) or not {"id", "substrate", "settings"} <= document.keys():
        raise ValueError(
            f"{path}: expected a candidate with id, substrate and settings; got something else: write it anew"
        )
    if document["substrate"] != substrate.digest:
        raise ValueError(
            f"{path}: the candidate belongs to substrate {str(document['substrate'])[:12]}, the folder holds "
            f"{substrate.digest[:12]}; give the substrate it was proposed for"
        )
    return Settings.parse(document["settings"], where=str(path))


def train(
    chunks: "Sequence[HybridModel]",
    packer: Packer,
    folder: Path,
    identity: dict[str, Any],
    **how: Any,
) -> Fit:
    """Tune the model by the packer's recipe and write the checkpoint that its evaluation opens, unless it diverged.

    All ranks call it with their part of the model; rank 0 writes the whole as it comes. `how` as in `fit`.
    """
    adapter = packer.recipe.adapter
    if adapter is not None:
        from megatron_evolve.substrate.model.lora import add_lora

        for chunk in chunks:
            add_lora(chunk, rank=adapter.rank, alpha=adapter.alpha, targets=adapter.targets, seed=packer.seed)
    run = digest_of(identity)
    fitted = fit(chunks, packer, folder, run=run, **how)
    if fitted.diverged is not None:
        return fitted
    state = {**identity, "adapter": adapter.model_dump(mode="json") if adapter else None}
    kind = "weights" if adapter is None else "adapter"
    hand_on(chunks, folder / CHECKPOINT_FOLDER, kind=kind, step=fitted.chosen_step, run=run, state=state)
    return fitted


def hand_on(chunks: "Sequence[HybridModel]", folder: Path, *, kind: Kind, **fields: Any) -> None:
    """Write what training changed as one whole model. All ranks call it; `fields` as in `save_checkpoint`."""
    import torch

    from megatron_evolve.substrate.model.parts import Whole

    whole = Whole(chunks, trained_tensors(chunks, kind == "adapter"))
    stream = iter(whole)
    try:
        if torch.distributed.get_rank() == 0:
            save_checkpoint(folder, kind=kind, tensors={kind: streamed(whole, stream)}, **fields)
    finally:
        for _ in stream:  # the other ranks' way to send; and where rank 0 could not write, they are heard out
            pass


def result_of(fitted: Fit, identity: dict[str, Any]) -> dict[str, Any]:
    """What `result.json` says."""
    diverged = fitted.diverged
    return {
        "schema": "result/1",
        "ending": "diverged" if diverged else "trained",
        "diverged": {"step": diverged[0], "reason": diverged[1]} if diverged else None,
        **identity,
        "steps": fitted.steps,
        "chosen_step": None if diverged else fitted.chosen_step,
        "loss": {
            "first": finite(fitted.first_loss),
            "last": finite(fitted.last_loss),
            "held_out": fitted.held_out_loss,
        },
        **fitted.tally.as_json(),
        "seconds": round(fitted.seconds, 2),
        "cpu_seconds": round(fitted.cpu_seconds, 2),
        "checkpoint": None if diverged else CHECKPOINT_FOLDER,
    }


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
