"""The trainer's parts: its loss, its step, its schedule, when it calls a run diverged, which weights it keeps."""

import math
from pathlib import Path

import pytest
import torch

from megatron_evolve.substrate.manifest import Construction
from megatron_evolve.substrate.mix import Mix
from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.architecture import NANO_CPU, Architecture
from megatron_evolve.substrate.model.weights import state_of
from megatron_evolve.substrate.packing import Batch, Packer, Tally
from megatron_evolve.substrate.puzzles import families
from megatron_evolve.substrate.recipe import Adapter, Recipe
from megatron_evolve.substrate.tokenizer import nano_tokenizer
from megatron_evolve.substrate.train.divergence import PATIENCE, Watch
from megatron_evolve.substrate.train.fit import fit
from megatron_evolve.substrate.train.preload import preload
from megatron_evolve.substrate.train.record import read_metrics
from megatron_evolve.substrate.train.trained import trained_tensors

ROOT = Path(__file__).resolve().parents[2]
TINY = Architecture.model_validate(
    NANO_CPU.model_dump() | {"pattern": "M*E", "hidden_size": 32, "mamba_num_heads": 4, "expert_ffn_size": 32}
)
RECIPE = Recipe(steps=8, batch_size=16, warmup_steps=2, lr=3e-3)
NAMES = ("unit_conversion", "numeral")
STYLES = {name: families.styles_of(name, "nano") for name in NAMES}
POOL = Construction(families=NAMES, difficulty="nano", styles=STYLES)
MIX = Mix(weight=dict.fromkeys(NAMES, 1.0), style=dict.fromkeys(NAMES, "answer"))


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    preload()
    build.start(seed=1)
    yield
    build.stop()


def packer(recipe: Recipe = RECIPE, seed: int = 0) -> Packer:
    return Packer(MIX, POOL, nano_tokenizer(), recipe, seed)


def first_batch(**changes) -> Batch:
    return next(packer(RECIPE.replace(**changes)).batches(Tally()))


def trainer(recipe: Recipe = RECIPE, *, adapter: bool = False, architecture: Architecture = TINY, **fields):
    from megatron_evolve.substrate.model.lora import add_lora
    from megatron_evolve.substrate.train.step import Trainer

    model = build.build_model(architecture, seed=2, **fields)
    if adapter:
        add_lora(model, rank=2, alpha=4.0, targets=("attention", "mamba", "experts", "shared"), seed=5)
    return Trainer([model], recipe)


def gradients(trained) -> dict[str, torch.Tensor]:
    return {name: p.main_grad.clone() for name, p in trained.chunks[0].named_parameters() if p.requires_grad}


def test_the_loss_is_the_weighted_mean_over_the_batch():
    made = trainer(RECIPE.replace(lr=1e-7))
    batch = first_batch(prompt_loss_weight=0.3)
    with torch.no_grad():
        logits = made.chunks[0](torch.from_numpy(batch.tokens_BT), None, None)
    picked = logits.log_softmax(-1).gather(-1, torch.from_numpy(batch.labels_BT).unsqueeze(-1)).squeeze(-1)
    weights = torch.from_numpy(batch.weights_BT)
    expected = -(picked * weights).sum() / weights.sum()
    assert made.held_out_loss(batch) == pytest.approx(expected.item(), rel=1e-6)
    assert made.step(batch, 0).loss == pytest.approx(expected.item(), rel=1e-6)


def test_micro_batches_change_neither_loss_nor_gradient(monkeypatch):
    batch = first_batch(batch_size=64)
    parts = batch.narrowed(8)
    assert len(parts) == 2
    measured, found = [], []
    for pieces in (parts, [batch]):
        monkeypatch.setattr(Batch, "narrowed", lambda self, multiple, pieces=pieces: pieces)
        made = trainer()
        measured.append(made.step(batch, 0))
        found.append(gradients(made))
    assert measured[0].loss == pytest.approx(measured[1].loss, rel=1e-6)
    assert measured[0].grad_norm == pytest.approx(measured[1].grad_norm, rel=1e-5)
    for name, gradient in found[0].items():
        # float32 sums in another order; measured at most 4e-8
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("head", [{}, {"mtp_depths": 2, "mtp_pattern": "*E"}], ids=["plain", "a head used twice"])
def test_fused_experts_add_their_gradients_over_micro_batches(monkeypatch, head):
    """They write into Megatron's buffers themselves, and there stands what the eager experts' gradients add up to."""
    batch = first_batch(batch_size=8)
    monkeypatch.setattr(Batch, "narrowed", lambda self, multiple: self.rows_at_most(4))
    found = []
    for experts in ("eager", "triton"):
        made = trainer(architecture=Architecture.model_validate(TINY.model_dump() | head), experts=experts)
        made.step(batch, 0)
        found.append(gradients(made))
        weights = {name: p for name, p in made.chunks[0].named_parameters() if ".experts." in name}
        assert all(p.grad_added_to_main_grad == (experts == "triton") for p in weights.values())
    assert len(weights) == 2 * TINY.num_experts * (2 if head else 1)
    for name, gradient in found[0].items():
        # float32 sums in another order, the gated norm's too: measured at most 8e-7, and 2.4e-6 of dt_bias, whose four
        # sums mostly cancel
        assert (found[1][name] - gradient).norm() <= 4e-6 * gradient.norm(), name


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_megatron_s_scheduler_follows_the_recipe(schedule, warmup):
    from megatron_evolve.substrate.train.optimizer import set_step

    recipe = Recipe(steps=12, warmup_steps=warmup, schedule=schedule, min_lr_ratio=0.1, lr=0.01)
    made = trainer(recipe)
    for step in range(recipe.steps):
        assert set_step(made.scheduler, recipe, step) == pytest.approx(recipe.lr_at(step), rel=1e-12)
        assert len({group["lr"] for group in made.optimizer.param_groups}) == 1
    assert set_step(made.scheduler, recipe, 4) == pytest.approx(recipe.lr_at(4))  # a resumed run jumps there


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_steps_on_one_batch_lower_its_loss(optimizer):
    recipe = RECIPE.replace(optimizer=optimizer, steps=20, lr=0.01 if optimizer == "adam" else 0.3)
    made, batch = trainer(recipe), first_batch()
    measured = [made.step(batch, step) for step in range(20)]
    assert measured[-1].loss < 0.8 * measured[0].loss
    assert all(math.isfinite(m.grad_norm) and m.grad_norm > 0 for m in measured)


def test_clipping_bounds_the_step_and_weight_decay_spares_vectors():
    made = trainer(RECIPE.replace(clip_grad=0.001, weight_decay=0.5))
    made.step(first_batch(), 3)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients(made).values()))
    assert norm == pytest.approx(0.001, rel=1e-3)
    decayed = {len(p.shape) for group in made.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {2, 3} or decayed == {2}


def test_the_routing_bias_moves_in_full_training_and_not_under_an_adapter():
    for adapter, moves in ((False, True), (True, False)):
        made = trainer(adapter=adapter)
        before = {name: value.clone() for name, value in made.chunks[0].state_dict().items() if torch.is_tensor(value)}
        for step in range(3):
            made.step(first_batch(), step)
        changed = {name for name, value in state_of(made.chunks[0]).items() if not torch.equal(value, before[name])}
        assert any("expert_bias" in name for name in changed) == moves
        if adapter:
            assert changed and all("lora_" in name for name in changed)


def test_not_a_number_and_a_lasting_rise_are_divergence():
    calm = Watch()
    for _ in range(60):
        calm = calm.after(1.0)
        assert calm.verdict(1.0, 1.0) is None
    assert calm.verdict(math.nan, 1.0) == "loss is nan"
    assert calm.verdict(1.0, math.inf) == "gradient norm is inf"
    watch = calm
    for step in range(PATIENCE):
        assert watch.verdict(3.1, 1.0) is None, step
        watch = watch.after(3.1)
    assert "above 3 times its running median (1) for 20 steps" in watch.verdict(3.1, 1.0)


def test_a_passing_rise_and_a_falling_loss_are_not():
    watch = Watch()
    for step in range(200):
        watch = watch.after(5.0 / (1 + step))
        assert watch.verdict(1.0, 1.0) is None
    for _ in range(PATIENCE - 1):
        watch = watch.after(99.0)
    assert watch.after(0.02).after(99.0).verdict(99.0, 1.0) is None


def test_a_run_that_diverges_ends_with_its_step(tmp_path):
    model = build.build_model(TINY, seed=2)
    with torch.no_grad():
        model.embedding.word_embeddings.weight[10] = float("nan")
    fitted = fit([model], packer(), tmp_path, run="r", save_every=0)
    assert fitted.diverged == (0, "loss is nan") and fitted.steps == 1
    assert [entry["loss"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [None]


@pytest.mark.parametrize("rule", ["lowest-loss", "lowest-loss-uniform"])
def test_selection_hands_on_the_best_of_four_points(tmp_path, rule):
    recipe = RECIPE.replace(checkpoint_selection=rule, lr=0.02, schedule="constant", steps=16)
    source = packer(recipe)
    held_out = source.held_out(256, uniform=rule.endswith("uniform"))
    model = build.build_model(TINY, seed=2)
    fitted = fit([model], source, tmp_path, run="r", save_every=0)
    losses = {}
    for points in (10, 12, 14, 16):
        again = trainer(recipe)
        for step, batch in zip(range(points), source.batches(Tally()), strict=False):
            again.step(batch, step)
        losses[points] = again.held_out_loss(held_out)
    best = min(losses, key=losses.__getitem__)
    assert fitted.chosen_step == best and fitted.held_out_loss == losses[best]


def test_an_adapter_run_trains_its_adapter_alone(tmp_path):
    recipe = RECIPE.replace(adapter=Adapter(rank=2, alpha=4.0))
    made = trainer(recipe, adapter=True)
    fit(made.chunks, packer(recipe), tmp_path, run="r", save_every=0)
    tensors = trained_tensors(made.chunks, adapter=True)
    assert all(name.endswith(("lora_A", "lora_B")) for name in tensors)
    assert any(value.abs().max() > 0 for name, value in tensors.items() if name.endswith("lora_B"))
