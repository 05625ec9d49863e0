"""Weights on disk: back bit for bit, or a refusal that names what is wrong."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_evolve.substrate.model import build, weights
from megatron_evolve.substrate.model.architecture import NANO_CPU


@pytest.fixture(scope="module")
def model() -> Iterator[torch.nn.Module]:
    build.start(seed=3)
    yield build.build_model(NANO_CPU, seed=3)
    build.stop()


@pytest.fixture
def saved(model: torch.nn.Module, tmp_path: Path) -> Path:
    return weights.save_weights(model, tmp_path / "weights.safetensors")


def test_round_trip(model: torch.nn.Module, saved: Path) -> None:
    other = build.build_model(NANO_CPU, seed=4)
    before = {name: value.clone() for name, value in weights.state_of(other).items()}
    state = weights.state_of(model)
    assert any(not torch.equal(before[name], state[name]) for name in state)
    weights.load_part([other], [saved])
    assert all(torch.equal(value, state[name]) for name, value in weights.state_of(other).items())
    assert any(name.endswith("router.expert_bias") for name in state)
    assert [path.name for path in saved.parent.iterdir()] == ["weights.safetensors"]


def test_same_model_same_bytes(model: torch.nn.Module, saved: Path) -> None:
    again = weights.save_weights(model, saved.with_name("again.safetensors"))
    assert again.read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("keep", [0, 5, 2000, -1], ids=["empty", "in the length", "in the data", "one byte short"])
def test_truncated_file(model: torch.nn.Module, saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        weights.load_part([model], [saved])


def test_absent_file(model: torch.nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected the weights file .*none; it is missing"):
        weights.load_part([model], [tmp_path / "none"])


def test_wrong_names_and_shapes_are_all_named_and_nothing_changes(model: torch.nn.Module) -> None:
    tensors = {name: torch.full_like(value, 7) for name, value in weights.state_of(model).items()}
    tensors["odd"] = tensors.pop("output_layer.weight")
    tensors["decoder.final_norm.weight"] = torch.ones(3)
    expected = (
        "missing: output_layer.weight; unexpected: odd; of another shape: decoder.final_norm.weight (3,) for (64,)"
    )
    with pytest.raises(ValueError) as refusal:
        weights.put_weights(model, tensors)
    assert expected in str(refusal.value)
    assert not (model.embedding.word_embeddings.weight == 7).any()
