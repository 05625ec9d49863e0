"""Training with `--recompute` is training without it, to the last bit; only what is kept differs.

How much less is kept is measured in `test_plan_measured` and `test_model_recompute`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.packing import Tally
from megatron_evolve.substrate.train import run
from tests.substrate.rank_program import ADAPTER, ARCHITECTURE, RECIPE, packer

STEPS = 3


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    build.start(seed=1)
    yield
    build.stop()


def trained(recompute: str, adapter: bool, packed: bool) -> dict[str, Any]:
    """Loss and gradient norm of each step, and the trained tensors after the last."""
    from megatron_evolve.substrate.model.lora import add_lora
    from megatron_evolve.substrate.train.step import Trainer

    recipe = RECIPE.replace(steps=STEPS, batch_size=16, adapter=ADAPTER if adapter else None)
    model = build.build_model(ARCHITECTURE, seed=3, **build.RECOMPUTE[recompute])
    if adapter:
        add_lora(model, rank=ADAPTER.rank, alpha=ADAPTER.alpha, targets=ADAPTER.targets, seed=5)
    trainer = Trainer([model], recipe, micro_rows=8, packed=packed)
    steps = [trainer.step(batch, number) for number, batch in enumerate(packer(recipe).batches(Tally()))]
    return {"steps": [(step.loss, step.grad_norm) for step in steps], "state": model.state_dict()}


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "packed"), [(False, False), (True, False), (True, True)])
def test_same_bits(adapter: bool, packed: bool) -> None:
    want = trained("none", adapter, packed)
    assert len(want["steps"]) == STEPS and want["steps"][0] != want["steps"][-1]
    for recompute in ("selective", "full"):
        got = trained(recompute, adapter, packed)
        assert got["steps"] == want["steps"], recompute
        for name, value in want["state"].items():
            assert not isinstance(value, torch.Tensor) or torch.equal(got["state"][name], value), (recompute, name)


def test_another_word_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--substrate", str(tmp_path), "--candidate", "c.json", "--seed", "1", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        run.main([*argv, "--recompute", "some"])
    assert "invalid choice: 'some'" in capsys.readouterr().err
