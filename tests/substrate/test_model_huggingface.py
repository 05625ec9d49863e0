"""HybridModel against transformers' NemotronHForCausalLM with the same weights, and against wrong weight maps.

The default initialisation is so small that a wrong scan passes, so all matrices are enlarged until the logits have a
standard deviation near 1; every negative control must then be far off.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from megatron_evolve.substrate.model import build, huggingface, weights
from megatron_evolve.substrate.model.architecture import Architecture

# Odd on purpose: groups of several sizes, a sequence of 3.1 chunks, an expert width that is no multiple of 8.
ODD = Architecture(
    name="odd",
    pattern="ME*MEM",
    hidden_size=48,
    vocab_size=96,
    num_attention_heads=6,
    num_query_groups=3,
    head_dim=10,
    mamba_num_heads=6,
    mamba_head_dim=12,
    mamba_state_dim=10,
    mamba_num_groups=2,
    mamba_chunk_size=64,
    num_experts=5,
    top_k=3,
    expert_ffn_size=37,
    shared_ffn_size=56,
    topk_scaling_factor=2.5,
    init_std=0.02,
    max_sequence_length=256,
    dt_min=1e-3,
)
# largest difference of two float32 logits near 1; measured 2e-6
CLOSE = 1e-5
# smallest effect of a wrong map that counts as broken; measured 0.4 and more
BROKEN = 0.1


def enlarge(state: dict[str, Tensor]) -> None:
    rng = torch.Generator().manual_seed(5)
    for name, value in state.items():
        if name.endswith("expert_bias"):
            value.copy_(torch.rand(value.shape, generator=rng) * 0.4)
        elif name.endswith(("in_proj.weight", "router.weight")):
            value.mul_(10)
        elif value.dim() == 2:
            value.mul_(6)
        elif name.endswith(("norm.weight", ".D")):
            value.mul_(0.5 + torch.rand(value.shape, generator=rng))


@pytest.fixture(scope="module")
def model() -> Iterator[torch.nn.Module]:
    build.start(seed=1)
    model = build.build_model(ODD, seed=1).eval()
    enlarge(weights.state_of(model))
    yield model
    build.stop()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, ODD.vocab_size, (3, 200), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, None, None)


@pytest.fixture(scope="module")
def their_logits(tokens: Tensor) -> Callable[..., Tensor]:
    """Logits of transformers' model for a state under its names."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    model = NemotronHForCausalLM._from_config(
        NemotronHConfig(**huggingface.huggingface_config(ODD)),
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()

    def run(state: dict[str, Tensor], dt_min: float = ODD.dt_min) -> Tensor:
        model.load_state_dict(state, strict=True)
        for layer in model.model.layers:
            if hasattr(layer.mixer, "time_step_limit"):
                layer.mixer.time_step_limit = (dt_min, float("inf"))
        with torch.no_grad():
            return model(tokens).logits

    return run


@pytest.fixture
def theirs(model: torch.nn.Module) -> dict[str, Tensor]:
    state = huggingface.to_huggingface(weights.state_of(model), ODD)
    return {name: value.clone() for name, value in state.items()}


def test_same_logits(logits: Tensor, theirs: dict[str, Tensor], their_logits: Callable[..., Tensor]) -> None:
    got = their_logits(theirs)
    assert logits.std() > 0.5
    assert (got - logits).abs().max() < CLOSE
    assert torch.equal(got.argmax(-1), logits.argmax(-1))


def _swap_rows(name: str, first: int, second: int, count: int) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        t = state[name]
        a, b = t[first : first + count].clone(), t[second : second + count].clone()
        t[first : first + count], t[second : second + count] = b, a

    return change


def _plain_qkv(state: dict[str, Tensor]) -> None:
    """Query, key and value cut from the stacked matrix as if it were not grouped."""
    parts = [state[f"model.layers.2.mixer.{letter}_proj.weight"] for letter in "qkv"]
    grouped = huggingface.from_huggingface(state, ODD)["decoder.layers.2.self_attention.linear_qkv.weight"]
    for part, wrong in zip(parts, grouped.split([len(p) for p in parts]), strict=True):
        part.copy_(wrong)


def _edit(name: str, change: Callable[[Tensor], object]) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: change(state[name])


INNER, STATE = ODD.mamba_inner_size, ODD.mamba_num_groups * ODD.mamba_state_dim
CONTROLS = {
    "z and x swapped": _swap_rows("model.layers.0.mixer.in_proj.weight", 0, INNER, INNER),
    "B and C swapped": _swap_rows("model.layers.0.mixer.in_proj.weight", 2 * INNER, 2 * INNER + STATE, STATE),
    "qkv not grouped": _plain_qkv,
    "routing bias zeroed": _edit("model.layers.1.mixer.gate.e_score_correction_bias", lambda t: t.zero_()),
    "expert copied": _edit("model.layers.1.mixer.experts.up_proj", lambda t: t[0].copy_(t[1])),
    "A_log + 0.5": _edit("model.layers.0.mixer.A_log", lambda t: t.add_(0.5)),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_a_wrong_map_is_seen(
    control: str, logits: Tensor, theirs: dict[str, Tensor], their_logits: Callable[..., Tensor]
) -> None:
    CONTROLS[control](theirs)
    assert (their_logits(theirs) - logits).abs().max() > BROKEN


def test_the_step_clamp_matters_and_is_one_knob(
    model: torch.nn.Module,
    tokens: Tensor,
    theirs: dict[str, Tensor],
    their_logits: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With steps near exp(-8) < 1e-3 a model that clamps and one that does not disagree; equal knobs agree."""
    mixers = [layer.mixer for layer in model.decoder.layers if hasattr(layer, "mixer")]
    assert all(mixer.dt_limit == (1e-3, float("inf")) for mixer in mixers)
    low = {name: t - 8 if name.endswith("dt_bias") else t for name, t in theirs.items()}
    kept = {name: t.clone() for name, t in weights.state_of(model).items()}
    weights.put_weights(model, huggingface.from_huggingface(low, ODD))
    try:
        with torch.no_grad():
            clamped = model(tokens, None, None)
            for mixer in mixers:
                monkeypatch.setattr(mixer, "dt_limit", (0.0, float("inf")))
            free = model(tokens, None, None)
    finally:
        weights.put_weights(model, kept)
    assert (clamped - free).abs().max() > BROKEN
    assert (their_logits(low, 1e-3) - clamped).abs().max() < CLOSE
    assert (their_logits(low, 0.0) - free).abs().max() < CLOSE


def test_no_clamp_is_written_as_a_number_that_transformers_can_take_the_logarithm_of() -> None:
    config = huggingface.huggingface_config(ODD.model_copy(update={"dt_min": 0.0}))
    assert 0 < config["time_step_min"] < 1e-20


def test_there_and_back_is_the_identity(model: torch.nn.Module, theirs: dict[str, Tensor]) -> None:
    state = weights.state_of(model)
    back = huggingface.from_huggingface(theirs, ODD)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_hub_names(model: torch.nn.Module, theirs: dict[str, Tensor]) -> None:
    hub = {}
    for name, value in theirs.items():
        name = name.replace("model.", "backbone.", 1)
        if ".experts." in name:
            stem, projection = name.rsplit(".", 1)
            hub |= {f"{stem}.{e}.{projection}.weight": matrix for e, matrix in enumerate(value)}
        else:
            hub[name] = value
    back, state = huggingface.from_huggingface(hub, ODD), weights.state_of(model)
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "name", ["model.layers.2.mixer.k_proj.weight", "model.layers.1.mixer.experts.up_proj", "lm_head.weight"]
)
def test_missing_and_left_over_are_named(theirs: dict[str, Tensor], name: str) -> None:
    theirs["model.layers.9.odd"] = theirs.pop(name)
    with pytest.raises(ValueError, match=rf"missing: {name}; left over: model\.layers\.9\.odd"):
        huggingface.from_huggingface(theirs, ODD)
    with pytest.raises(ValueError, match=r"missing: .*; left over: lm_head\.weight"):
        huggingface.to_huggingface({"lm_head.weight": theirs["model.norm_f.weight"]}, ODD)
