"""Losses without logits are Megatron's own, of a frozen output table and of a trained one of many logits; elsewhere
Megatron's own way is taken."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_evolve.kernels.backend import LOSS_CHUNK_BYTES
from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.architecture import Architecture
from megatron_evolve.substrate.recipe import Adapter
from tests.substrate.enlarged import SMALL, build_enlarged

HEADED = Architecture.model_validate(SMALL.model_dump() | {"mtp_pattern": "*E", "mtp_depths": 2})
LENGTHS = [5, 1, 24, 2]
# float32 sums in another order, relative by norm: measured at most 7e-7 eager and 1.1e-6 with the fused kernels
CLOSE = 4e-6
CLOSE_TRAINED = 5e-5  # of all weights, whose smallest gradient (A_log's, 0.007 by norm) cancels: measured 1.7e-5


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    build.start(seed=1)
    yield
    build.stop()


def adapted(architecture: Architecture = SMALL, *more: str, **fields: Any) -> torch.nn.Module:
    from megatron_evolve.substrate.model.lora import add_lora

    model = build_enlarged(architecture, **fields)
    targets = (*Adapter(rank=2, alpha=4).targets, *more)
    add_lora(model, rank=2, alpha=4, targets=targets, seed=1)
    rng = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.1, generator=rng)  # so that A has a gradient
    return model


def outcome(model: torch.nn.Module, packed: bool = False) -> dict[str, Tensor]:
    """Losses of (1, 32) or (2, 16) labels, a part of which has weight 0, and every gradient of their weighted sum."""
    from megatron_evolve.substrate.model.packed import PackedSequences

    rng = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, 77, (2, *((1, 32) if packed else (2, 16))), generator=rng)
    weights = (torch.rand(labels.shape, generator=rng) - 0.4).clamp(min=0)
    packed_seq_params = PackedSequences(LENGTHS) if packed else None
    model.zero_grad()
    losses = model(tokens, None, None, labels=labels, loss_mask=weights, packed_seq_params=packed_seq_params)
    (losses * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"losses": losses.detach(), **gradients}


def unfused(monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module, **kwargs: Any) -> dict[str, Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "fuses", lambda self, num_tokens: False)
        return outcome(model, **kwargs)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], close: float = CLOSE) -> None:
    assert got.keys() == want.keys() and len(got) > 10
    for name, value in want.items():
        assert (got[name] - value).norm() <= close * value.norm(), name


@pytest.mark.parametrize("chunk", [None, 5], ids=["one chunk", "chunks of 5 tokens"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("architecture", [SMALL, HEADED], ids=["plain", "prediction heads"])
def test_losses_and_gradients_are_megatrons(
    architecture: Architecture, packed: bool, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(architecture)
    assert model.fuses(1)
    if chunk:
        monkeypatch.setitem(LOSS_CHUNK_BYTES, "eager", chunk * architecture.vocab_size * 4)
    want = unfused(monkeypatch, model, packed=packed)

    def no_logits(*_: Any) -> None:
        raise AssertionError("the table was asked for logits")

    monkeypatch.setattr(model.output_layer, "_forward_impl", no_logits)
    assert_close(outcome(model, packed=packed), want)
    assert model.output_layer.weight.grad is None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("architecture", [SMALL, HEADED], ids=["plain", "prediction heads"])
def test_losses_and_gradients_of_a_trained_table_are_megatrons(
    architecture: Architecture, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of 5 of 32 tokens: the table's own gradient among them, summed over its uses."""
    model = build_enlarged(architecture)
    monkeypatch.setitem(LOSS_CHUNK_BYTES, "eager", 5 * architecture.vocab_size * 4)
    assert model.fuses(6) and not model.fuses(5)
    want = unfused(monkeypatch, model, packed=packed)

    def no_logits(*_: Any) -> None:
        raise AssertionError("the table was asked for logits")

    monkeypatch.setattr(model.output_layer, "_forward_impl", no_logits)
    got = outcome(model, packed=packed)
    assert "output_layer.weight" in got
    assert_close(got, want, CLOSE_TRAINED)


def test_few_logits_of_a_trained_table_an_adapted_one_and_the_definition_take_megatrons_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for model in (build_enlarged(), adapted(SMALL, "output"), adapted(experts="reference")):
        assert not model.fuses(32)
        got, want = outcome(model), unfused(monkeypatch, model)
        assert all(torch.equal(got[name], value) for name, value in want.items())
    monkeypatch.setitem(LOSS_CHUNK_BYTES, "eager", 1)
    assert not adapted(SMALL, "output").fuses(32) and not adapted(experts="reference").fuses(32)


def test_without_labels_there_are_logits() -> None:
    model = adapted()
    tokens = torch.arange(12).view(2, 6)
    logits = model(tokens, None, None)
    assert logits.shape == (2, 6, SMALL.vocab_size)
    losses = model(tokens, None, None, labels=tokens)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    torch.testing.assert_close(losses.flatten(), want)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_step_keeps_no_logits(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd keeps, of 64 tokens x 4,096 entries: 1 MB less in float32."""
    wide = SMALL.with_vocab(4096)

    def kept(model: torch.nn.Module) -> int:
        held: dict[int, int] = {}

        def note(value: Tensor) -> Tensor:
            held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        tokens = torch.randint(0, 4096, (2, 32), generator=torch.Generator().manual_seed(0))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            losses = model(tokens, None, None, labels=tokens)
        del losses
        return sum(held.values())

    model = build_enlarged(wide) if trained else adapted(wide)
    monkeypatch.setitem(LOSS_CHUNK_BYTES, "eager", 16 * 4096 * 4)
    fused = kept(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "fuses", lambda self, num_tokens: False)
        plain = kept(model)
    logits = 64 * 4096 * 4
    assert plain - fused > 0.95 * logits, (plain, fused, logits)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's numbers")
def test_the_fused_kernels_are_taken_and_are_megatrons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gated norm, router and experts under the interpreter: a frozen table, packed rows, prediction heads."""
    from megatron_evolve.kernels import fused
    from megatron_evolve.substrate.model.mamba_ssm import GatedRMSNorm

    architecture = HEADED.model_copy(update={"pattern": "ME*"})
    model = adapted(architecture, experts="triton")
    norms = [module for module in model.modules() if isinstance(module, GatedRMSNorm)]
    assert len(norms) == 1 and norms[0].fused is fused.gated_rms_norm
    assert model.linear_cross_entropy is fused.linear_cross_entropy and model.fuses(1)
    plain = adapted(architecture, experts="eager")
    assert_close(outcome(model, packed=True), unfused(monkeypatch, plain, packed=True))
