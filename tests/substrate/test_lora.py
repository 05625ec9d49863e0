"""Adapters: nothing changes at step 0, gradients are those of the full matrices, states come and go whole."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from megatron_evolve.substrate.merged import MergedEntry, trained_entries
from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.architecture import NANO_CPU
from megatron_evolve.substrate.model.tensor_file import read_header
from megatron_evolve.substrate.model.weights import save_weights
from megatron_evolve.substrate.train.checkpoint import save_checkpoint
from tests.substrate.enlarged import SMALL, build_enlarged

ALL = ("attention", "mamba", "experts", "shared", "output")
# ||a - b|| / ||b|| in float32 through six layers; measured at most 2e-6
CLOSE = 2e-5


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    build.start(seed=7)
    yield
    build.stop()


def _model(*, large: bool = False):
    """A nano model; `large` scales the weights so that every layer matters to the logits."""
    model = build.build_model(NANO_CPU, seed=3)
    if large:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4)
    return model


def _adapted(*, rank=3, alpha=6.0, targets=ALL, seed=11, trained=False, large=False):
    from megatron_evolve.substrate.model.lora import add_lora

    model = _model(large=large)
    add_lora(model, rank=rank, alpha=alpha, targets=targets, seed=seed)
    if trained:
        rng = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.05)
    return model


def _logits(model):
    tokens = torch.randint(NANO_CPU.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    return model(tokens, torch.arange(24).expand(2, -1), None)


def _distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_logits_and_base_keys_are_unchanged_at_step_0():
    plain, adapted = _model(), _adapted()
    assert torch.equal(_logits(adapted), _logits(plain))
    assert [name for name in adapted.state_dict() if "lora_" not in name] == list(plain.state_dict())


def test_only_adapters_train():
    model = _adapted(targets=("experts", "mamba"), rank=2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = {"M": ("mixer.in_proj", "mixer.out_proj"), "E": ("mlp.experts.linear_fc1", "mlp.experts.linear_fc2")}
    assert trained == {
        f"decoder.layers.{i}.{layer}.lora_{part}"
        for i, letter in enumerate(NANO_CPU.pattern)
        for layer in layers.get(letter, ())
        for part in "AB"
    }


def test_the_routing_bias_stands_still():
    from megatron.core import parallel_state
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    moved = {}
    for kind, model in {"plain": _model(), "adapted": _adapted()}.items():
        _logits(model.train())
        _update_router_expert_bias([model], model.config, tp_dp_cp_group=group)
        moved[kind] = any(b.any().item() for name, b in model.named_buffers() if name.endswith("expert_bias"))
    assert moved == {"plain": True, "adapted": False}


def test_output_and_gradients_are_those_of_the_merged_matrices():
    """With W' = W + s B A the chain rule says dA = s B^T dW' and dB = s dW' A^T, layer by layer."""
    from megatron_evolve.substrate.model.lora import merge

    adapted, plain = _adapted(trained=True, large=True), _model()
    plain.load_state_dict(merge(adapted), strict=False)
    logits = {"adapted": _logits(adapted), "plain": _logits(plain)}
    assert _distance(logits["adapted"], logits["plain"]) < CLOSE
    assert _distance(logits["adapted"], _logits(_model(large=True))) > 0.01  # the adapters do matter here
    for value in logits.values():
        value.square().sum().backward()
    full = dict(plain.named_parameters())
    checked = 0
    for name, layer in adapted.named_modules():
        if getattr(layer, "lora_A", None) is None:
            continue
        A, B, scale = layer.lora_A, layer.lora_B, layer.lora_scale
        if A.dim() == 3:
            dW = torch.stack([full[f"{name}.weight{e}"].grad for e in range(len(A))])
        else:
            dW = full[f"{name}.weight"].grad
        assert dW.norm() > 0
        assert _distance(A.grad, scale * B.transpose(-1, -2) @ dW) < CLOSE
        assert _distance(B.grad, scale * dW @ A.transpose(-1, -2)) < CLOSE
        assert all(p.grad is None for n, p in layer.named_parameters() if not n.startswith("lora_"))
        checked += 1
    assert checked == 2 * len(NANO_CPU.pattern) + 2 * NANO_CPU.pattern.count("E") + 1  # experts also have shared ones


def test_merged_in_memory_it_has_the_bits_of_the_merged_files(tmp_path):
    """As engine `transformers` takes it, and as `export-hf` writes it piece by piece: one rounding to bfloat16 each."""
    from megatron_evolve.substrate.model.lora import adapter_state, add_lora, merge

    model = build_enlarged(params_dtype=torch.bfloat16)
    stored = read_header(save_weights(model, tmp_path / "weights.safetensors"))
    adapter = {"rank": 3, "alpha": 5.0, "targets": ALL}
    add_lora(model, **adapter, seed=11)
    with torch.no_grad():
        for name, value in adapter_state(model).items():
            if name.endswith("lora_B"):
                value.normal_(std=0.2, generator=torch.Generator().manual_seed(5))
    state, tensors = {"substrate": "s", "adapter": adapter}, {"adapter": adapter_state(model)}
    save_checkpoint(tmp_path / "checkpoint", kind="adapter", step=1, run="r", tensors=tensors, state=state)
    merged, changed = merge(model), 0
    for name, entry in trained_entries(stored, tmp_path, SimpleNamespace(digest="s")).items():
        cuts = (0, entry.shape[0] // 3, entry.shape[0])
        written = b"".join(chunk for first, last in pairwise(cuts) for chunk in entry.rows(first, last).read())
        assert written == merged[name].contiguous().view(torch.uint8).numpy().tobytes(), name
        changed += isinstance(entry, MergedEntry)
    assert changed == 2 * (4 + 2 * (1 + SMALL.num_experts)) + 1  # two matrices a layer and an expert, and the table


def test_state_goes_into_another_model():
    from megatron_evolve.substrate.model.lora import adapter_state, load_adapter

    trained, fresh = _adapted(trained=True), _adapted(seed=12)
    state = {name: tensor.clone() for name, tensor in adapter_state(trained).items()}
    load_adapter(fresh, state)
    assert torch.equal(_logits(fresh), _logits(trained))
    assert "decoder.layers.2.mlp.experts.linear_fc1.lora_A" in state
    assert "output_layer.lora_B" in state


def test_a_state_that_does_not_fit_is_refused_and_nothing_is_copied():
    from megatron_evolve.substrate.model.lora import adapter_state, load_adapter

    model = _adapted()
    before = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    with pytest.raises(ValueError, match=r"must have shape \(3, 64\); got \(4, 64\)"):
        load_adapter(model, adapter_state(_adapted(rank=4, trained=True)))
    with pytest.raises(ValueError, match=r"2 are missing \['output_layer.lora_A', 'output_layer.lora_B'\]"):
        load_adapter(model, adapter_state(_adapted(targets=ALL[:-1], trained=True)))
    with pytest.raises(ValueError, match="1 are unknown"):
        load_adapter(model, {**before, "elsewhere.lora_A": torch.zeros(3, 64)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state(model).items())


def test_same_seed_same_adapters():
    from megatron_evolve.substrate.model.lora import adapter_state

    first, again, other = (adapter_state(_adapted(seed=seed)) for seed in (1, 1, 2))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if name.endswith("lora_A"):
            assert not torch.equal(tensor, other[name])
            assert tensor.abs().max() <= tensor.size(-1) ** -0.5
        else:
            assert not tensor.any()
    draws = [tensor.flatten()[:8].tolist() for name, tensor in first.items() if name.endswith("lora_A")]
    assert len({tuple(draw) for draw in draws}) == len(draws)  # no two layers share a draw


def test_what_cannot_be_adapted_is_refused():
    from megatron_evolve.substrate.model.lora import add_lora

    with pytest.raises(ValueError, match=r"must be among attention, .*; got \['norm'\]"):
        _adapted(targets=("norm",))
    with pytest.raises(ValueError, match="got none"):
        _adapted(targets=())
    model = _adapted()
    with pytest.raises(ValueError, match="has them already"):
        add_lora(model, rank=2, alpha=2.0, targets=("mamba",), seed=0)
    headless = _model()
    del headless.output_layer
    with pytest.raises(ValueError, match="target 'output' must name layers"):
        add_lora(headless, rank=2, alpha=2.0, targets=("output",), seed=0)
    assert all(parameter.requires_grad for parameter in headless.parameters())


def test_sharded_state_names_every_adapter():
    model = _adapted()
    sharded = model.sharded_state_dict(metadata={"dp_cp_group": _data_parallel_group()})
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            assert name in sharded
            part = sharded[name]
            if hasattr(part, "global_shape"):
                assert part.local_shape == tensor.shape


def _data_parallel_group():
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)
