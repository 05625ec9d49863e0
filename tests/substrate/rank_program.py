"""One rank of a job that trains the same few steps in several layouts; run by `test_train_layouts`.

    python rank_program.py WEIGHTS FOLDER CASES.json

RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR come from the environment.

Each case is a process group of its own at its own port, in a child forked for it: Megatron's gradient hooks keep a
model and its groups' threads for as long as the process lives, and some twenty cases would slow the last fivefold. Rank
0 writes what it measured to FOLDER/<world size>.json.
"""

import json
import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_evolve.substrate.layout import Layout
from megatron_evolve.substrate.manifest import Construction
from megatron_evolve.substrate.mix import Mix
from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.architecture import NANO_CPU, Architecture
from megatron_evolve.substrate.packing import Packer, Tally
from megatron_evolve.substrate.puzzles import families
from megatron_evolve.substrate.recipe import Adapter, Recipe
from megatron_evolve.substrate.tokenizer import nano_tokenizer
from megatron_evolve.substrate.train.preload import preload

NAMES = ("unit_conversion", "numeral")
ARCHITECTURE = NANO_CPU.with_vocab(nano_tokenizer().vocab_size)
RECIPE = Recipe(steps=4, batch_size=48, warmup_steps=1, lr=1e-3, epsilon=1e-5, checkpoint_selection="lowest-loss")
SAVED_AT = 2  # of four steps
ADAPTER = Adapter(rank=4, alpha=8.0, targets=("attention", "mamba", "experts", "shared", "output"))


def packer(recipe: Recipe) -> Packer:
    """Short rows of two families; with 48 of them one step has two micro-batches of unequal width."""
    styles = {name: families.styles_of(name, "nano") for name in NAMES}
    mix = Mix(weight=dict.fromkeys(NAMES, 1.0), style=dict.fromkeys(NAMES, "answer"))
    return Packer(mix, Construction(families=NAMES, difficulty="nano", styles=styles), nano_tokenizer(), recipe, seed=0)


def recipe_of(case: dict[str, Any]) -> Recipe:
    return RECIPE.replace(adapter=adapter_of(case) if case["adapter"] else None, **case.get("recipe", {}))


def adapter_of(case: dict[str, Any]) -> Adapter:
    left_out = [] if "*" in architecture_of(case).pattern else ["attention"]
    left_out += ["output"] if case.get("frozen_table") else []  # then its losses are made without logits
    return ADAPTER.replace(targets=tuple(name for name in ADAPTER.targets if name not in left_out))


def architecture_of(case: dict[str, Any]) -> Architecture:
    return Architecture.model_validate(ARCHITECTURE.model_dump() | case.get("architecture", {}))


def model_of(case: dict[str, Any], weights: Path) -> list[Any]:
    """This rank's chunks with the given weights, adapted if the case says so."""
    import torch

    from megatron_evolve.substrate.model.lora import add_lora
    from megatron_evolve.substrate.model.weights import load_part

    dtype = torch.bfloat16 if case.get("bf16") else torch.float32
    fields = {"params_dtype": dtype, **build.RECOMPUTE[case.get("recompute", "none")]}
    chunks = build.build_chunks(architecture_of(case), seed=3, **fields)
    load_part(chunks, [weights])
    if case["adapter"]:
        for chunk in chunks:
            add_lora(chunk, rank=ADAPTER.rank, alpha=ADAPTER.alpha, targets=adapter_of(case).targets, seed=5)
    return chunks


def steps_of(case: dict[str, Any], weights: Path) -> dict[str, Any]:
    """Trains the case's steps from the weights, or from the checkpoint it names; returns what every step measured."""
    from megatron_evolve.substrate.model.parts import Whole
    from megatron_evolve.substrate.train.resume import restore_resume, save_resume
    from megatron_evolve.substrate.train.selection import Selector
    from megatron_evolve.substrate.train.step import Trainer
    from megatron_evolve.substrate.train.trained import trained_tensors

    recipe = recipe_of(case)
    chunks, source = model_of(case, weights), packer(recipe)
    how = {"micro_rows": case.get("micro_rows"), "packed": case.get("packed", False)}
    trainer, selector = Trainer(chunks, recipe, **how), Selector(source)
    first = 0
    if case.get("restore"):
        first = restore_resume(Path(case["restore"]), "run", trainer, selector).step
    measured = []
    for number, batch in zip(range(first, recipe.steps), source.batches(Tally(), start=first), strict=True):
        step = trainer.step(batch, number)
        measured.append([step.loss, step.grad_norm])
        selector.consider(trainer, number + 1, lambda: trained_tensors(chunks, case["adapter"]))
        if case.get("save") and number + 1 == SAVED_AT:
            own = {"selected": {"step": selector.step, "loss": selector.loss}}
            save_resume(Path(case["save"]), "run", SAVED_AT, trainer, selector, own)
    # sums over all values of a tensor: whatever is joined wrongly moves them
    sums = {name: [t.double().sum().item(), _ramp(t)] for name, t in Whole(chunks)}
    chosen = {name: _ramp(tensor) for name, tensor in Whole(chunks, selector.tensors)}
    found = {"steps": measured, "held_out": selector.loss, "chosen_step": selector.step, "sums": sums, "chosen": chosen}
    return {**found, "children": len(multiprocessing.active_children())}


def _ramp(tensor: Any) -> float:
    """A sum in which every place has a weight of its own."""
    import torch

    flat = tensor.double().flatten()
    return (flat * torch.linspace(1, 2, len(flat), dtype=torch.float64)).sum().item()


def answer(case: dict[str, Any], weights: Path, reply: Connection) -> None:
    """What a case measured, or the error by which it was refused, to whoever waits for it."""
    os.environ["MASTER_PORT"] = str(case["port"])
    build.start(1, Layout.from_text(case["layout"]))
    try:
        found = steps_of(case, weights)
    except ValueError as error:
        found = {"error": str(error)}
    build.stop()
    reply.send(found)


def in_a_child(case: dict[str, Any], weights: Path) -> dict[str, Any]:
    """What `answer` tells from a process of its own. Raises EOFError where that died, with its traceback in the log."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=answer, args=(case, weights, sender))
    child.start()
    sender.close()  # so that a child that dies is seen
    found = receiver.recv()
    child.join()
    return found


def main(weights: str, folder: str, cases: str) -> None:
    preload()
    found = {
        name: in_a_child(case, Path(case.get("weights", weights)))
        for name, case in json.loads(Path(cases).read_text()).items()
    }
    if os.environ.get("RANK", "0") == "0":
        Path(folder, f"{os.environ.get('WORLD_SIZE', '1')}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
