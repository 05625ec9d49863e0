"""Latent experts against transformers' NemotronH with the same weights, and what the projections refuse."""

from collections.abc import Iterator

import pytest
import torch

from megatron_evolve.substrate.model import build, huggingface, weights
from megatron_evolve.substrate.model.architecture import Architecture
from tests.substrate.enlarged import SMALL, build_enlarged

# neither a multiple nor a divisor of the width, 64
LATENT = Architecture.model_validate(SMALL.model_dump() | {"latent_size": 24, "dt_min": 1e-3})
# largest difference of two float32 logits, and smallest effect of a wrong projection; measured 3.3e-6 and 0.55
CLOSE, BROKEN = 1e-5, 0.1


@pytest.fixture(scope="module")
def model() -> Iterator[torch.nn.Module]:
    build.start(seed=1)
    yield build_enlarged(LATENT).eval()
    build.stop()


@pytest.fixture(scope="module")
def theirs(model: torch.nn.Module) -> torch.nn.Module:
    from transformers import NemotronHConfig, NemotronHForCausalLM

    config = NemotronHConfig(**huggingface.huggingface_config(LATENT))
    other = NemotronHForCausalLM._from_config(config, attn_implementation="eager", experts_implementation="eager")
    other.load_state_dict(huggingface.to_huggingface(weights.state_of(model), LATENT), strict=True)
    return other.eval()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, LATENT.vocab_size, (3, 50), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_same_logits(model: torch.nn.Module, theirs: torch.nn.Module, tokens: torch.Tensor) -> None:
    ours, wanted = model(tokens, None, None), theirs(tokens).logits
    assert ours.std() > 0.5
    assert (ours - wanted).abs().max() < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("name", ["fc1_latent_proj", "fc2_latent_proj"])
def test_each_projection_is_seen(
    name: str, model: torch.nn.Module, theirs: torch.nn.Module, tokens: torch.Tensor
) -> None:
    weight = getattr(theirs.model.layers[2].mixer, name).weight
    kept = weight.clone()
    weight[:, :2] = kept[:, [1, 0]]
    try:
        assert (theirs(tokens).logits - model(tokens, None, None)).abs().max() > BROKEN
    finally:
        weight.copy_(kept)


def test_same_gradients(model: torch.nn.Module, theirs: torch.nn.Module, tokens: torch.Tensor) -> None:
    model.zero_grad()
    theirs.zero_grad()
    for logits in (model(tokens, None, None), theirs(tokens).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for layer in (2, 5):
        for name in ("fc1_latent_proj", "fc2_latent_proj"):
            ours = getattr(model.decoder.layers[layer].mlp, name).weight.grad
            wanted = gradients[f"model.layers.{layer}.mixer.{name}.weight"]
            assert (ours - wanted).norm() <= CLOSE * wanted.norm() and wanted.norm() > 1e-3


def test_the_weight_map_goes_back(model: torch.nn.Module) -> None:
    state = weights.state_of(model)
    back = huggingface.from_huggingface(huggingface.to_huggingface(state, LATENT), LATENT)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_experts_are_narrow_and_counted(model: torch.nn.Module) -> None:
    layer = model.decoder.layers[2].mlp
    assert layer.fc1_latent_proj.weight.shape == (24, 64) and layer.fc2_latent_proj.weight.shape == (64, 24)
    assert layer.experts.linear_fc1.weight0.shape == (128, 24)
    assert layer.shared_experts.linear_fc1.weight.shape == (128, 64)
    assert sum(p.numel() for p in model.parameters()) == LATENT.num_parameters()


def test_anything_but_a_duplicated_projection_is_refused(model: torch.nn.Module) -> None:
    from megatron_evolve.substrate.model.latent import DuplicatedLinear

    common = {"config": model.config, "init_method": model.config.init_method, "is_expert": False}
    with pytest.raises(ValueError, match="got parallel_mode='column'"):
        DuplicatedLinear(4, 2, parallel_mode="column", bias=False, **common)
    with pytest.raises(ValueError, match="bias=True"):
        DuplicatedLinear(4, 2, parallel_mode="duplicated", bias=True, **common)


def test_overlap_of_the_shared_expert_is_off_and_refused_by_megatron(model: torch.nn.Module) -> None:
    assert model.config.moe_shared_expert_overlap is False
    overlapped = build.build_model(LATENT, seed=1, moe_shared_expert_overlap=True)
    with pytest.raises(AssertionError, match="overlap with MoE latent projections is not supported"):
        overlapped(torch.zeros(1, 8, dtype=torch.long), None, None)
