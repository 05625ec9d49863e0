"""Transformer Engine's norms and dense linears, where asked for, hold and compute what torch's and Megatron's do.

Megatron's own wrappers build them, over feigned classes that compute in torch: Transformer Engine itself was not run.
"""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

from megatron_evolve.substrate import operations
from megatron_evolve.substrate.model import build, weights
from megatron_evolve.substrate.model.architecture import Architecture
from megatron_evolve.substrate.operations import TRANSFORMER_ENGINE, Machine
from tests.substrate import feigned_te
from tests.substrate.enlarged import SMALL

if TYPE_CHECKING:
    from megatron_evolve.substrate.train.selection import Selector
    from megatron_evolve.substrate.train.step import Trainer

HEADED = Architecture.model_validate(SMALL.model_dump() | {"mtp_pattern": "*E", "mtp_depths": 1})
TARGETS = ("attention", "mamba", "experts", "shared", "mtp")
THERE = Machine(True, {"transformer_engine": feigned_te.VERSION})


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    build.start(seed=1)
    yield
    build.stop()


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Transformer Engine as found by whoever builds a model and adapters."""
    from megatron.core.extensions import transformer_engine

    from megatron_evolve.substrate.model import layers, lora

    wrappers = feigned_te.megatrons_wrappers(monkeypatch)
    for name in ("TENorm", "TEColumnParallelLinear", "TERowParallelLinear"):
        monkeypatch.setattr(transformer_engine, name, getattr(wrappers, name))
        if hasattr(lora, name):
            monkeypatch.setattr(lora, name, getattr(wrappers, name))
    monkeypatch.setattr(layers, "HAVE_TE", True)
    monkeypatch.setattr(operations, "machine", lambda gpu: THERE)
    return wrappers


def built(layers: str, adapted: bool, **fields: Any) -> torch.nn.Module:
    """The same enlarged weights whatever the layers."""
    from megatron_evolve.substrate.model.lora import add_lora

    model = build.build_model(HEADED, seed=1, layers=layers, **fields)
    if adapted:
        add_lora(model, rank=3, alpha=6, targets=TARGETS, seed=1)
    rng = torch.Generator().manual_seed(5)
    for name, value in weights.state_of(model).items():
        if value.dim() >= 2 or name.endswith(("norm.weight", "expert_bias")):
            value.copy_(
                torch.randn(value.shape, generator=rng) * (0.2 if value.dim() >= 2 else 0.1) + (value.dim() < 2)
            )
    return model


def outcome(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, 77, (2, 2, 16), generator=rng)
    losses = model(tokens, None, None, labels=labels, loss_mask=torch.ones(labels.shape))
    losses.sum().backward()
    return {"losses": losses.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "LoRA"])
def test_losses_gradients_and_state_are_those_of_torch(adapted: bool, theirs: ModuleType, tmp_path: Path) -> None:
    from megatron_evolve.substrate.model.lora import adapter_state, merge
    from megatron_evolve.substrate.model.parts import parts_of

    asked, plain = built(TRANSFORMER_ENGINE, adapted), built("pytorch", adapted)
    kinds = [type(module) for module in asked.modules()]
    assert sum(kind is feigned_te.RMSNorm for kind in kinds) == sum(
        isinstance(module, torch.nn.RMSNorm) for module in plain.modules()
    )
    dense = [kind for kind in kinds if issubclass(kind, feigned_te.Linear)]
    assert len(dense) == 2 * len(SMALL.pattern) + 2 * len(HEADED.mtp_pattern) + 1  # two a layer, and the head's own
    assert any(kind.__name__ == "LoraTEColumnParallelLinear" for kind in dense) == adapted

    got, want = outcome(asked), outcome(plain)
    assert got.keys() == want.keys() and len(got) > 20
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    parts = {name: part for name, (part, _) in parts_of([asked]).items()}
    assert parts == {name: part for name, (part, _) in parts_of([plain]).items()}
    saved = [weights.save_weights(model, tmp_path / f"{n}") for n, model in enumerate((asked, plain))]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    if adapted:
        for take in (adapter_state, merge):
            ours, its = take(plain), take(asked)
            assert ours.keys() == its.keys() and all(torch.equal(its[name], value) for name, value in ours.items())


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "LoRA"])
def test_a_run_goes_on_with_either_kind_of_layers(adapted: bool, theirs: ModuleType, tmp_path: Path) -> None:
    """In bfloat16, whose resume checkpoint is Megatron's distributed one."""
    from megatron_evolve.substrate.packing import Tally
    from megatron_evolve.substrate.recipe import Adapter
    from megatron_evolve.substrate.train.resume import restore_resume, save_resume
    from megatron_evolve.substrate.train.selection import Selector
    from megatron_evolve.substrate.train.step import Trainer
    from tests.substrate.rank_program import RECIPE, packer

    recipe = RECIPE.replace(batch_size=8, adapter=Adapter(rank=3, alpha=6, targets=TARGETS) if adapted else None)

    def trainer(layers: str) -> "tuple[Trainer, Selector]":
        return Trainer([built(layers, adapted, params_dtype=torch.bfloat16)], recipe), Selector(packer(recipe))

    batches = list(packer(recipe).batches(Tally()))
    first, selector = trainer("pytorch")  # whose norms have no extra state, for which Transformer Engine's would ask
    losses = [first.step(batch, number).loss for number, batch in enumerate(batches[:2])]
    save_resume(tmp_path, "run", 2, first, selector, {"selected": {"step": None, "loss": None}})
    losses += [first.step(batch, number).loss for number, batch in enumerate(batches[2:], 2)]
    for layers in (TRANSFORMER_ENGINE, "pytorch"):
        again, selector = trainer(layers)
        assert restore_resume(tmp_path, "run", again, selector).step == 2
        assert [again.step(batch, number).loss for number, batch in enumerate(batches[2:], 2)] == losses[2:]


def test_what_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_evolve.substrate.model.layers import RMSNorm, layers_of

    for here, asked, reason in (
        (
            Machine(False, THERE.versions),
            TRANSFORMER_ENGINE,
            "cannot be had, no GPU on this machine: take layers pytorch",
        ),
        (Machine(True, {}), TRANSFORMER_ENGINE, "cannot be had, transformer-engine not installed"),
        (THERE, TRANSFORMER_ENGINE, "2.6.0 is installed, but Megatron could not import it"),
        (THERE, "te", "layers must be one of auto, pytorch, transformer-engine; got 'te'"),
    ):
        monkeypatch.setattr(operations, "machine", lambda gpu, here=here: here)
        with pytest.raises(ValueError, match=reason):
            layers_of(asked)
    assert layers_of("auto").norm is layers_of("pytorch").norm is RMSNorm
