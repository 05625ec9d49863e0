"""Weights stored in bfloat16 are trained so: near float32, with a float32 copy that a resumed run finds again."""

import multiprocessing
from pathlib import Path

import pytest
import torch

from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.weights import save_weights, stored_dtype
from megatron_evolve.substrate.packing import Tally
from megatron_evolve.substrate.recipe import Adapter, Recipe
from megatron_evolve.substrate.train.preload import preload
from tests.substrate.rank_program import ADAPTER, ARCHITECTURE, packer

RECIPE = Recipe(steps=6, batch_size=16, warmup_steps=1, lr=3e-3, checkpoint_selection="lowest-loss")
SAVED_AT = 4


@pytest.fixture(scope="module", autouse=True)
def megatron_is_started():
    preload()
    build.start(seed=1)
    yield
    build.stop()


def made(recipe: Recipe, dtype: torch.dtype, seed: int = 2):
    from megatron_evolve.substrate.model.lora import add_lora
    from megatron_evolve.substrate.train.selection import Selector
    from megatron_evolve.substrate.train.step import Trainer

    chunks = build.build_chunks(ARCHITECTURE, seed=seed, params_dtype=dtype)
    if recipe.adapter is not None:
        with torch.no_grad():  # the base is frozen and in no checkpoint: the same for every seed
            for parameter in chunks[0].parameters():
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
        add_lora(chunks[0], rank=recipe.adapter.rank, alpha=8.0, targets=recipe.adapter.targets, seed=5)
    return Trainer(chunks, recipe), Selector(packer(recipe))


def losses(trainer, selector, first: int = 0, save: Path | None = None) -> list[float]:
    from megatron_evolve.substrate.train.resume import save_resume
    from megatron_evolve.substrate.train.trained import trained_tensors

    found, adapter = [], trainer.recipe.adapter is not None
    for number, batch in enumerate(packer(trainer.recipe).batches(Tally(), start=first), first):
        found.append(trainer.step(batch, number).loss)
        selector.consider(trainer, number + 1, lambda: trained_tensors(trainer.chunks, adapter))
        if save is not None and number + 1 == SAVED_AT:
            own = {"selected": {"step": selector.step, "loss": selector.loss}}
            save_resume(save, "run", SAVED_AT, trainer, selector, own)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["full", "LoRA"])
def test_near_float32_and_resumed_bit_for_bit(adapter: Adapter | None, tmp_path: Path) -> None:
    from megatron_evolve.substrate.train.resume import restore_resume

    recipe = RECIPE.replace(adapter=adapter)
    exact, low = losses(*made(recipe, torch.float32)), losses(*(one := made(recipe, torch.bfloat16)), save=tmp_path)
    assert not multiprocessing.active_children()  # a save starts no process, which would outlive a killed rank
    assert low == pytest.approx(exact, rel=0.005)  # 8 bits of mantissa in every layer; measured 0.001
    assert exact != low and low[-1] < low[0]
    trainer, selector = made(recipe, torch.bfloat16, seed=9)
    assert restore_resume(tmp_path, "run", trainer, selector).step == SAVED_AT
    assert losses(trainer, selector, first=SAVED_AT) == low[SAVED_AT:]
    assert (selector.step, selector.loss) == (one[1].step, one[1].loss)


def test_a_model_computes_in_the_dtype_of_its_files(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = build.build_model(ARCHITECTURE, seed=1, params_dtype=dtype)
        assert stored_dtype([save_weights(model, tmp_path / "weights.safetensors")]) == dtype
    save_weights(model.half(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="must hold float32 or bfloat16; got F16"):
        stored_dtype([tmp_path / "weights.safetensors"])
