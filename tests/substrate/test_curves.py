"""TensorBoard's event files, read back by TensorBoard itself: what the run measured, each step once, resumed or not."""

import logging
import sys
from pathlib import Path

import pytest
import torch

from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.packing import Packer
from megatron_evolve.substrate.recipe import Adapter, Recipe
from megatron_evolve.substrate.tokenizer import nano_tokenizer
from megatron_evolve.substrate.train.fit import fit
from megatron_evolve.substrate.train.preload import preload
from megatron_evolve.substrate.train.record import read_metrics
from tests.substrate.test_train import MIX, POOL, TINY

RECIPE = Recipe(steps=10, batch_size=8, warmup_steps=2, lr=3e-3)
ALWAYS = {"loss", "grad_norm", "lr", "step_seconds", "tokens_per_second", "memory_bytes"}


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    preload()
    build.start(seed=1)
    yield
    build.stop()


def train(folder: Path, recipe: Recipe = RECIPE, killed_at: int | None = None) -> None:
    """A run, or one that dies after telling of a step; again in the same folder, it goes on."""

    def tell(step: int, loss: float) -> None:
        if step == killed_at:
            raise KeyboardInterrupt

    model = build.build_model(TINY, seed=2)
    if recipe.adapter is not None:
        from megatron_evolve.substrate.model.lora import add_lora

        add_lora(model, rank=2, alpha=4.0, targets=("attention",), seed=5)
    packer = Packer(MIX, POOL, nano_tokenizer(), recipe, 0)
    fit([model], packer, folder, run="r", save_every=4, tensorboard=True, tell=tell)


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name, as TensorBoard shows them."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), {accumulator.SCALARS: 0})
    events.Reload()
    return {
        name.removeprefix("train/"): [(one.step, one.value) for one in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


@pytest.mark.parametrize("killed_at", [(), (2,), (6, 9)], ids=["whole", "before a checkpoint", "twice after"])
def test_every_step_once_with_the_numbers_of_the_metrics(tmp_path: Path, killed_at: tuple[int, ...]) -> None:
    for step in killed_at:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, killed_at=step)
    train(tmp_path)
    found, metrics = read(tmp_path), read_metrics(tmp_path / "metrics.jsonl")
    assert set(found) == ALWAYS | {"expert_bias_spread"}
    for name, points in found.items():
        assert [step for step, _ in points] == list(range(10)), name
    for name in ("loss", "grad_norm", "lr"):
        told = torch.tensor([value for _, value in found[name]])
        torch.testing.assert_close(told, torch.tensor([line[name] for line in metrics]))
    assert all(value > 0 for name in ("step_seconds", "tokens_per_second", "memory_bytes") for _, value in found[name])
    spread = [value for _, value in found["expert_bias_spread"]]
    assert spread[-1] > 0, "training moves the routing bias"


def test_under_an_adapter_the_routing_bias_stays_and_is_not_drawn(tmp_path: Path) -> None:
    train(tmp_path, RECIPE.replace(steps=3, adapter=Adapter(rank=2, alpha=4.0)))
    assert set(read(tmp_path)) == ALWAYS


def test_without_the_package_the_run_goes_on_and_says_so(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.WARNING):
        train(tmp_path, RECIPE.replace(steps=3))
    assert "tensorboard is not installed" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3 and not (tmp_path / "tensorboard").exists()
