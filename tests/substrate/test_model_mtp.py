"""Multi-token prediction heads: the objective written out by hand, and everything that must not notice them."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_evolve.substrate.layout import Layout
from megatron_evolve.substrate.model import build, decode, huggingface, weights
from megatron_evolve.substrate.model.architecture import Architecture
from megatron_evolve.substrate.plan.parameters import adapter_share, stages
from megatron_evolve.substrate.recipe import Adapter
from tests.substrate.enlarged import SMALL, build_enlarged

DEPTHS, SCALE = 2, 0.3
HEADED = Architecture.model_validate(SMALL.model_dump() | {"mtp_pattern": "*E", "mtp_depths": DEPTHS})
# relative difference of two float32 gradients, the same sums in another order; measured 2e-6
CLOSE = 1e-5


@pytest.fixture(scope="module")
def model() -> Iterator[torch.nn.Module]:
    build.start(seed=1)
    yield build_enlarged(HEADED)
    build.stop()


@pytest.fixture(scope="module")
def rows(model: torch.nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and loss mask, each (3, 20)."""
    rng = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, 77, (2, 3, 20), generator=rng)
    return tokens, labels, (torch.rand(3, 20, generator=rng) < 0.7).float()


def ahead(row: Tensor, depth: int) -> Tensor:
    """What stands `depth` tokens later, 0 past the end."""
    return F.pad(row[:, depth:], (0, depth))


def head_states(model: torch.nn.Module, tokens: Tensor) -> list[Tensor]:
    """Final hidden states (L, B, D) of the main model and of each depth, from the parts of the model."""
    head = model.mtp.layers[0]
    states = [model.decoder(model.embedding(input_ids=tokens, position_ids=None), None)]
    for depth in range(1, DEPTHS + 1):
        following = model.embedding(input_ids=ahead(tokens, depth), position_ids=None)
        joined = torch.cat([head.enorm(following), head.hnorm(states[-1])], -1)
        states.append(head.final_layernorm(head.mtp_model_layer(joined @ head.eh_proj.weight.t(), None)))
    return states


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("masked", [False, True])
def test_the_objective_is_main_loss_and_scaled_mean_of_the_heads(
    masked: bool, model: torch.nn.Module, rows: tuple[Tensor, Tensor, Tensor]
) -> None:
    """loss = CE of the next token + 0.3 / D sum_d CE of the token d further on, each a mean over the labels it has."""
    tokens, labels, mask = rows
    mask = mask if masked else torch.ones_like(mask)
    losses = model(tokens, None, None, labels=labels, loss_mask=mask if masked else None)
    got = gradients(model, (losses * mask).sum() / mask.sum())
    wanted_loss = torch.zeros(())
    for depth, state in enumerate(head_states(model, tokens)):
        logits = state.transpose(0, 1) @ model.output_layer.weight.t()
        each = F.cross_entropy(logits.flatten(0, 1), ahead(labels, depth).flatten(), reduction="none").view_as(mask)
        if depth == 0:
            assert torch.allclose(losses, each, atol=1e-5)
        part = (each * ahead(mask, depth)).sum() / ahead(mask, depth).sum()
        wanted_loss = wanted_loss + part * (1.0 if depth == 0 else SCALE / DEPTHS)
    wanted = gradients(model, wanted_loss)
    for name, gradient in wanted.items():
        assert gradient.norm() > 0, name
        assert (got[name] - gradient).norm() <= CLOSE * gradient.norm(), name


def test_the_main_model_does_not_notice_its_heads(model: torch.nn.Module, rows: tuple[Tensor, Tensor, Tensor]) -> None:
    plain = build.build_model(SMALL, seed=9)
    main = {name: t for name, t in weights.state_of(model).items() if not name.startswith("mtp.")}
    weights.put_weights(plain, main)
    with torch.no_grad():
        assert torch.equal(model(rows[0], None, None), plain(rows[0], None, None))
        assert torch.equal(model(*rows[:1], None, None, labels=rows[1]), plain(rows[0], None, None, labels=rows[1]))


@torch.no_grad()
def test_decoding_ignores_them(model: torch.nn.Module, rows: tuple[Tensor, Tensor, Tensor]) -> None:
    model.eval()
    logits, state = decode.prefill(model, rows[0].tolist(), pad_id=0, capacity=24)
    after, _ = decode.step(model, rows[1][:, 0], state)
    whole = model(torch.cat([rows[0], rows[1][:, :1]], 1), None, None)
    model.train()
    assert torch.allclose(torch.stack([logits, after], 1), whole[:, -2:], atol=1e-5)


def test_one_head_serves_every_depth_and_is_counted(model: torch.nn.Module) -> None:
    assert len(model.mtp.layers) == 1
    heads = sum(p.numel() for p in model.mtp.parameters())
    assert heads == HEADED.num_mtp_parameters()
    assert sum(p.numel() for p in model.parameters()) == HEADED.num_parameters() + heads


@pytest.mark.parametrize("named", [False, True])
def test_adapters_leave_heads_alone_unless_named(named: bool) -> None:
    from megatron_evolve.substrate.model.lora import add_lora

    model = build_enlarged(HEADED)
    kinds = ("attention", "mamba", "experts", "shared", "output")
    adapter = Adapter(rank=2, alpha=4.0, targets=(*kinds, "mtp") if named else kinds)
    add_lora(model, rank=2, alpha=4.0, targets=adapter.targets, seed=0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    in_heads = {name for name in trained if name.startswith("mtp.")}
    assert len(in_heads) == (2 * (2 + 4) if named else 0)  # A and B of one attention and one expert layer
    assert len(trained) - len(in_heads) == 2 * (2 * len(HEADED.pattern) + 2 * HEADED.pattern.count("E") + 1)
    (stage,) = stages(HEADED, Layout())
    assert sum(p.numel() for p in trained.values()) == adapter_share(HEADED, Layout(), stage, adapter).total


def test_the_main_model_learns_from_frozen_heads(model: torch.nn.Module, rows: tuple[Tensor, Tensor, Tensor]) -> None:
    """The heads' loss reaches the adapters of the layers below them, as in Megatron-Bridge's recipes."""
    from megatron_evolve.substrate.model.lora import add_lora

    found = {}
    for scale in (SCALE, 0.0):
        adapted = build_enlarged(HEADED, mtp_loss_scaling_factor=scale)
        add_lora(adapted, rank=2, alpha=4.0, targets=("attention",), seed=0)
        adapted(rows[0], None, None, labels=rows[1]).mean().backward()
        found[scale] = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(name.startswith("decoder.") for name in found[SCALE])
    assert any(not torch.allclose(found[SCALE][name], found[0.0][name]) for name in found[SCALE])


def test_the_weight_map_has_them_under_their_own_names(model: torch.nn.Module) -> None:
    state = weights.state_of(model)
    theirs = huggingface.to_huggingface(state, HEADED)
    assert {name.split(".")[0] for name in theirs} == {"model", "lm_head", "mtp"}
    back = huggingface.from_huggingface(theirs, HEADED)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_heads_of_packed_sequences_do_not_see_each_other(
    model: torch.nn.Module, rows: tuple[Tensor, Tensor, Tensor]
) -> None:
    from megatron_evolve.substrate.model.packed import PackedSequences

    lengths = [7, 1, 2, 30, 20]
    kept: list[Tensor] = []
    hook = model.mtp.register_forward_hook(lambda module, args, kwargs, output: kept.append(output), with_kwargs=True)
    row = rows[0].view(1, -1)
    with torch.no_grad():
        model(row, None, None, packed_seq_params=PackedSequences(lengths))
        for part in row.split(lengths, 1):
            model(part, None, None)
    hook.remove()
    together, *alone = (states.unflatten(0, (1 + DEPTHS, -1)) for states in kept)
    assert torch.allclose(together, torch.cat(alone, 1), atol=1e-5)
