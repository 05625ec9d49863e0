"""FusedRouter against Megatron's TopKRouter: same choice, shares, gradients, losses, counts and logs."""

import pytest
import torch
from torch import Tensor

from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.architecture import NANO_CPU

# ||a - b|| / ||b||, both float32: one exponential and one division, then sums over up to 74 tokens; measured at most
# 2.5e-7
CLOSE = 2e-6

# L, B, E, K
SHAPES = {
    "plain": (6, 2, 8, 2),
    "odd": (5, 3, 7, 3),
    "one choice": (4, 1, 5, 1),
    "all chosen": (3, 2, 6, 6),
    "more tokens than a block": (37, 2, 20, 4),
}
LOSSES = {
    "none": {},
    "sequence and z": {"moe_aux_loss_coeff": 1e-2, "moe_z_loss_coeff": 1e-3},
    "batch": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2},
    "sequence and global": {
        "moe_router_load_balancing_type": ["seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [1e-2, 3e-2],
    },
}


@pytest.fixture(scope="module")
def megatron():
    """One process of Megatron with its groups; yields its process-group collection."""
    build.start(seed=7)
    from megatron.core.process_groups_config import ProcessGroupCollection

    yield ProcessGroupCollection.use_mpu_process_groups()
    build.stop()


def both(pg, num_experts: int, num_chosen: int, **fields) -> list:
    """Megatron's router and ours, with the same matrix and the same bias, as layer 1."""
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_evolve.substrate.model.router import FusedRouter

    routers = []
    for kind in (TopKRouter, FusedRouter):
        build.seed_generators(3)
        sizes = {"num_moe_experts": num_experts, "moe_router_topk": num_chosen}
        router = kind(build.transformer_config(NANO_CPU, **sizes, **fields), pg_collection=pg)
        router.set_layer_number(1)
        router.weight.data.mul_(20)  # logits of order 3
        if router.expert_bias is not None:
            router.expert_bias.copy_(torch.randn(num_experts, generator=torch.Generator().manual_seed(4)) / 4)
        routers.append(router)
    return routers


def outcome(router, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Everything a step of training takes from a router; the auxiliary losses count ten times."""
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker, get_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    destroy_moe_metrics_tracker()
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor([10.0])
    x = x.clone().requires_grad_()
    probs, chosen = router(x, mask)
    dprobs = torch.randn(probs.shape, generator=torch.Generator().manual_seed(5))
    probs.backward(dprobs.to(probs.dtype))
    MoEAuxLossAutoScaler.main_loss_backward_scale = None  # a scale of the class: the next test's trainer sets its own
    logged = {name: entry.values for name, entry in get_moe_metrics_tracker().metrics.items()}
    counts = {name: value for name, value in router.named_buffers() if value is not None}
    return {"probs": probs.detach(), "map": chosen, "dx": x.grad, "dW": router.weight.grad} | logged | counts


def tokens(length: int, batch: int, dtype=torch.float32) -> Tensor:
    return torch.randn(length, batch, NANO_CPU.hidden_size, generator=torch.Generator().manual_seed(6)).to(dtype)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = CLOSE) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        if tensor.dtype == torch.bool or name.endswith("tokens_per_expert"):
            assert torch.equal(got[name], tensor), name
        else:
            assert (got[name] - tensor).norm() <= tolerance * tensor.norm(), name


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_training_step_is_megatrons(megatron, shape, losses):
    length, batch, num_experts, num_chosen = SHAPES[shape]
    theirs, ours = both(megatron, num_experts, num_chosen, **LOSSES[losses])
    for router in (theirs, ours):
        outcome(router, tokens(length, batch).flip(0))  # counts and gradients add up over micro-batches
    want, got = (outcome(router, tokens(length, batch)) for router in (theirs, ours))
    assert want["local_tokens_per_expert"].sum() == 2 * length * batch * num_chosen
    assert ("seq_load_balancing_loss" in want) == losses.startswith("sequence")
    assert_same(got, want)


def test_evaluation_counts_nothing_and_logs_nothing(megatron):
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker, get_moe_metrics_tracker

    destroy_moe_metrics_tracker()
    found = []
    for router in both(megatron, 8, 2, **LOSSES["sequence and z"]):
        with torch.no_grad():
            found.append(router.eval()(tokens(6, 2)))
        assert not router.local_tokens_per_expert.any()
    assert not get_moe_metrics_tracker().metrics
    (want_p, want_map), (p, chosen) = found
    assert torch.equal(chosen, want_map)
    assert (p - want_p).norm() <= CLOSE * want_p.norm()


def test_without_a_bias_and_with_padding(megatron):
    """Padding counts in no loss. (With a bias Megatron 0.19 cannot take a mask at all.)"""
    fields = LOSSES["sequence and z"] | {"moe_router_enable_expert_bias": False}
    mask = torch.zeros(6, 2, dtype=torch.bool)
    mask[4:, 1] = True
    want, got = (outcome(router, tokens(6, 2), mask) for router in both(megatron, 8, 2, **fields))
    assert_same(got, want)


def test_ties_go_to_the_lowest_expert_and_shares_stay_megatrons(megatron):
    """All scores of experts 2 to 7 are equal for every token: which of them torch.topk takes, it does not say."""
    theirs, ours = both(megatron, 8, 4)
    for router in (theirs, ours):
        router.expert_bias.zero_()
        router.weight.data[2:] = router.weight.data[2]
        router.weight.data[:2] = 0
    x = tokens(6, 2)
    x = x * torch.sign(x @ ours.weight[2].detach()).unsqueeze(-1)  # so that these win
    want, got = (outcome(router, x) for router in (theirs, ours))
    assert got["map"].nonzero()[:, 1].view(-1, 4).tolist() == [[2, 3, 4, 5]] * 12
    assert torch.allclose(got["probs"].sort(-1).values, want["probs"].sort(-1).values, rtol=CLOSE, atol=0)
    assert got["local_tokens_per_expert"].tolist() == [0, 0, 12, 12, 12, 12, 0, 0]


def test_a_large_bias_hides_scores_but_does_not_weigh(megatron):
    """Bias 12, logits about -16: s + b is 12 for every expert, and the shares still are those of the scores."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    _, ours = both(megatron, 4, 2)
    ours.expert_bias.fill_(12.0)
    logits = torch.tensor([-16.0, -15.8, -15.6, -15.4]).view(1, 1, 4)
    probs, chosen = ours.routing(logits)
    assert chosen.tolist() == [[True, True, False, False]]
    want, _ = topk_routing_with_score_function(
        logits.view(1, 4),
        2,
        scaling_factor=NANO_CPU.topk_scaling_factor,
        score_function="sigmoid",
        precomputed_indices=torch.tensor([[0, 1]]),
    )
    assert torch.allclose(probs, want, rtol=CLOSE, atol=0)


def test_bfloat16_logits(megatron):
    """Shares and the gradient of the logits are rounded to their dtype, 2^-9 each, as Megatron's are."""
    fields = {"moe_router_dtype": None, "params_dtype": torch.bfloat16}
    want, got = (outcome(router, tokens(6, 2, torch.bfloat16)) for router in both(megatron, 8, 2, **fields))
    assert got["probs"].dtype == torch.bfloat16
    assert_same(got, want, tolerance=2**-7)


def test_a_nan_token_spoils_no_other(megatron):
    _, ours = both(megatron, 8, 2)
    x = tokens(6, 2)
    x[3, 1, 0] = torch.nan
    probs, chosen = ours(x)
    assert probs.isnan().any(-1).nonzero().flatten().tolist() == [7]
    assert (chosen.sum(-1) == 2).all()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False}, "to be 'sigmoid'; got"),
        ({"moe_router_num_groups": 4, "moe_router_group_topk": 2}, "moe_router_num_groups to be None or 1; got 4"),
        ({"moe_router_dtype": "fp64"}, "moe_router_dtype to be 'fp32' or None; got 'fp64'"),
        (
            {"moe_router_load_balancing_type": "sinkhorn", "moe_router_enable_expert_bias": False},
            "moe_router_load_balancing_type='sinkhorn': build with eager experts",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_choice_is_refused(megatron, fields, said):
    with pytest.raises(ValueError, match=said):
        both(megatron, 8, 2, **fields)
