"""Context parallelism: the trainer's part of it on real processes, with layers that need no Transformer Engine.

And when Transformer Engine's attention is taken, which itself was not run.
"""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_evolve.substrate import operations
from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.architecture import NANO_CPU
from megatron_evolve.substrate.operations import Machine
from megatron_evolve.substrate.recipe import Recipe
from megatron_evolve.substrate.train import run as run_module
from tests.substrate.test_train_layouts import LORA, assert_same, run, weights_of

CASE = {"architecture": {"pattern": "MEME"}}
SPREAD = {
    "context, data": {**CASE, "layout": "cp=2"},
    "context, data" + LORA: {**CASE, "layout": "cp=2", "adapter": True},
    "context, data, frozen table" + LORA: {**CASE, "layout": "cp=2", "adapter": True, "frozen_table": True},
    "tensor, context": {**CASE, "layout": "tp=2,cp=2"},
    "context, expert": {**CASE, "layout": "cp=2,ep=4"},
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Enlarged weights, so that the scan matters, trained alone and on four ranks."""
    folder = tmp_path_factory.mktemp("context")
    weights = weights_of(CASE, folder / "weights.safetensors")
    adapted = {**CASE, "layout": "", "adapter": True}
    alone = {
        "alone": {**CASE, "layout": ""},
        "alone" + LORA: adapted,
        "alone, frozen table" + LORA: {**adapted, "frozen_table": True},
    }
    return run(1, alone, weights, folder / "1") | run(4, SPREAD, weights, folder / "4")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="checks what is supplied where no GPU is present")
@pytest.mark.parametrize("name", SPREAD)
def test_rows_split_over_ranks_train_as_one_process_does(name: str, measured: dict[str, Any]) -> None:
    alone = next(kind for kind in (", frozen table" + LORA, LORA, "") if name.endswith(kind))
    assert_same(measured[name], measured[f"alone{alone}"])


@pytest.fixture
def layer_spec() -> ModuleType:
    build.prepare()
    from megatron_evolve.substrate.model import layer_spec

    return layer_spec


def test_attention_is_transformer_engine_s_only_where_it_must_and_can(
    layer_spec: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.extensions import transformer_engine

    assert layer_spec.core_attention(1).__name__ == "CausalAttention"
    for here, reason in (
        (Machine(False, {"transformer_engine": "9.1"}), "attention, and no GPU on this machine: set cp=1"),
        (Machine(True, {}), "attention, and transformer-engine not installed: set cp=1"),
        (Machine(True, {"transformer_engine": "9.1"}), "but Megatron could not import it"),
    ):
        monkeypatch.setattr(operations, "machine", lambda gpu, here=here: here)
        with pytest.raises(ValueError, match=reason):
            layer_spec.core_attention(2)
    theirs = type("TEDotProductAttention", (), {})
    monkeypatch.setattr(layer_spec, "HAVE_TE", True)
    monkeypatch.setattr(transformer_engine, "TEDotProductAttention", theirs)
    assert layer_spec.core_attention(2) is theirs
    assert layer_spec.core_attention(1).__name__ == "CausalAttention"


def test_the_trainer_offers_it_where_it_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    given = ["--substrate", "s", "--candidate", "c", "--seed", "1", "--out", "o", "--layout", "cp=2"]
    arguments, settings = run_module._parser().parse_args(given), SimpleNamespace(recipe=Recipe())
    substrate = SimpleNamespace(architecture=NANO_CPU.model_dump())
    monkeypatch.setattr(operations, "machine", lambda gpu: Machine(True, {"transformer_engine": "9.1"}))
    assert run_module._layout(arguments, substrate, settings).cp == 2
    monkeypatch.setattr(operations, "machine", lambda gpu: Machine(True, {}))
    with pytest.raises(ValueError, match="needs a GPU and Transformer Engine's attention; set cp=1"):
        run_module._layout(arguments, substrate, settings)
