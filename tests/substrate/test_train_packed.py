"""Packed training is padded training: same rows, losses and gradient norms, whatever the packs; only the routing bias
sees less padding."""

import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from megatron_evolve.substrate.build import preset_named
from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.weights import state_of
from megatron_evolve.substrate.packing import PAD_MULTIPLE, Batch, Packer, Tally
from megatron_evolve.substrate.recipe import Recipe
from megatron_evolve.substrate.train.preload import preload
from tests.substrate.enlarged import SMALL, build_enlarged
from tests.substrate.rank_program import ADAPTER, ARCHITECTURE, packer

MODEL = SMALL.with_vocab(ARCHITECTURE.vocab_size)
# epsilon: Adam divides the noise of vanishing gradients by their own size (docs/results/model.md, layouts)
RECIPE = Recipe(steps=3, batch_size=24, warmup_steps=1, lr=1e-3, epsilon=1e-5, prompt_loss_weight=0.3)
CLOSE = 1e-5  # float32 sums in another order through six layers and three steps


@pytest.fixture(scope="module", autouse=True)
def _megatron() -> Iterator[None]:
    preload()
    build.start(seed=1)
    yield
    build.stop()


def batches(recipe: Recipe = RECIPE) -> list[Batch]:
    return list(packer(recipe).batches(Tally()))


def trained(recipe: Recipe, *, bias_moves: bool = True, **how: Any) -> dict[str, Any]:
    """What each step measured, the loss on held-out rows afterwards, and what the model then holds."""
    from megatron_evolve.substrate.model.lora import add_lora
    from megatron_evolve.substrate.train.step import Trainer

    model = build_enlarged(MODEL)
    if recipe.adapter:
        add_lora(model, rank=recipe.adapter.rank, alpha=8.0, targets=recipe.adapter.targets, seed=5)
    if not bias_moves:
        model.config.moe_router_bias_update_rate = 0.0
    trainer = Trainer([model], recipe, **how)
    steps = [trainer.step(batch, number) for number, batch in enumerate(batches(recipe))]
    held_out = trainer.held_out_loss(packer(recipe).held_out(32, uniform=True))
    measured = [[step.loss, step.grad_norm] for step in steps] + [[held_out, 0.0]]
    return {"measured": torch.tensor(measured), "state": {n: t.clone() for n, t in state_of(model).items()}}


def rows_of(batch: Batch) -> list[tuple[list[int], list[int], list[float]]]:
    """Tokens, labels and weights of each row without padding."""
    arrays = (batch.tokens_BT, batch.labels_BT, batch.weights_BT, batch.padding_BT)
    if batch.lengths:
        cuts = np.cumsum(batch.lengths)[:-1]
        padded = [zip(*(np.split(array[0], cuts) for array in arrays), strict=True)]
    else:
        padded = [zip(*arrays, strict=True)]
    return [tuple(one[~row[3]].tolist() for one in row[:3]) for rows in padded for row in rows]


@pytest.mark.parametrize("places", [None, 80, 160])
@pytest.mark.parametrize("at_least", [1, 13])
def test_packs_hold_every_row_whole_and_in_order(places: int | None, at_least: int) -> None:
    batch = batches()[0]
    packs = batch.packed(places, at_least)
    assert [row for pack in packs for row in rows_of(pack)] == rows_of(batch)
    assert tuple(name for pack in packs for name in pack.families) == batch.families
    assert sum(pack.num_tokens for pack in packs) == batch.num_tokens
    assert {pack.weight_sum for pack in packs} == {batch.weight_sum}
    assert len(packs) >= at_least and all(pack.tokens_BT.shape == (1, sum(pack.lengths)) for pack in packs)
    assert all(length % PAD_MULTIPLE == 0 for pack in packs for length in pack.lengths)
    if places:
        assert all(sum(pack.lengths) <= places for pack in packs)
        if at_least == 1:  # no row would have fitted in the pack before its own
            pairs = itertools.pairwise(packs)
            assert all(sum(pack.lengths) + after.lengths[0] > places for pack, after in pairs)


def test_no_more_packs_than_rows() -> None:
    batch = batches(RECIPE.replace(batch_size=4))[0]
    assert [len(pack.lengths) for pack in batch.packed(None, at_least=9)] == [1] * 4


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["full", "LoRA"])
def test_packed_steps_are_the_padded_steps(adapter: Any) -> None:
    recipe = RECIPE.replace(adapter=adapter)
    padded = trained(recipe, bias_moves=False)
    for micro_rows in (None, 2):
        packed = trained(recipe, bias_moves=False, packed=True, micro_rows=micro_rows)
        torch.testing.assert_close(packed["measured"], padded["measured"], rtol=CLOSE, atol=0)
        for name, value in padded["state"].items():
            torch.testing.assert_close(packed["state"][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_experts_load_is_the_same_in_all_packs() -> None:
    """By it full fine-tuning moves the routing bias. Each row brings its own padding to a multiple of 4, no other's."""
    from megatron_evolve.substrate.train.step import label_loss

    batch = batches()[0]
    places = sum(batch.packed(None)[0].lengths)
    loads = []
    for packs in (batch.packed(None), batch.packed(80), batch.part(0, 2).packed(80) + batch.part(1, 2).packed(80)):
        model = build_enlarged(MODEL)
        for pack in packs:
            label_loss(model, pack, "cpu")
        routers = [module for name, module in model.named_modules() if name.endswith("mlp.router")]
        loads.append(torch.stack([router.local_tokens_per_expert for router in routers]))
    assert loads[0].sum(1).tolist() == [MODEL.top_k * places] * MODEL.pattern.count("E")
    assert torch.equal(loads[0], loads[1]) and torch.equal(loads[0], loads[2])


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["challenge-cpu", "nano-cpu"])
def test_packing_pays_where_rows_differ_in_length(preset: str) -> None:
    """CPU time of a step, packed over padded, taken in turns; `-s` shows it. Nano rows are short and much alike."""
    from megatron_evolve.substrate.train.step import Trainer

    made = preset_named(preset)
    recipe, tokenizer = made.tuning.replace(steps=10, warmup_steps=2), made.tokenizer()
    source = Packer(made.mix(made.exposure), made.construction({}), tokenizer, recipe, seed=0)
    architecture = made.architecture.with_vocab(tokenizer.vocab_size)
    trainers = [Trainer([build.build_model(architecture, seed=2)], recipe, packed=packed) for packed in (False, True)]
    ratios = []
    for number, batch in enumerate(source.batches(Tally())):
        seconds = []
        for trainer in trainers:
            start = time.process_time()
            trainer.step(batch, number)
            seconds.append(time.process_time() - start)
        ratios.append(seconds[1] / seconds[0])
    ratio = statistics.median(ratios)
    print(f"\n{preset}: packed / padded {ratio:.2f}, {batch.num_tokens} tokens of {batch.tokens_BT.size} places")
    assert ratio < (1.0 if preset == "challenge-cpu" else 1.3)
