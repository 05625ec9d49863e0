"""GroupedExperts against Megatron's own SequentialMLP: same numbers, same gradients, same checkpoint entries."""

from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_evolve.kernels import reference
from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.architecture import NANO_CPU

# ||a - b|| / ||b|| in float32, both sides float32: sums in another order over up to 128 terms; measured at most 3e-7
CLOSE = 2e-6


@pytest.fixture(scope="module")
def megatron():
    """One process of Megatron with its groups; yields its process-group collection."""
    build.start(seed=7)
    from megatron.core.process_groups_config import ProcessGroupCollection

    yield ProcessGroupCollection.use_mpu_process_groups()
    build.stop()


def _grouped(pg, *, backend="eager", seed=7, **fields):
    from megatron_evolve.substrate.model.experts import GroupedExperts

    build.seed_generators(seed)
    config = build.transformer_config(NANO_CPU, **fields)
    return GroupedExperts(NANO_CPU.num_experts, config, pg_collection=pg, backend=backend)


def _sequential(pg, grouped):
    """Megatron's experts with the weights of `grouped`."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = SequentialMLP(NANO_CPU.num_experts, grouped.config, parts, pg_collection=pg)
    with torch.no_grad():
        for expert, fc1, fc2 in zip(
            experts.local_experts, grouped.linear_fc1.weights, grouped.linear_fc2.weights, strict=True
        ):
            expert.linear_fc1.weight.copy_(fc1)
            expert.linear_fc2.weight.copy_(fc2)
    return experts


def _by_expert(experts, gradients: bool) -> list[Tensor]:
    """fc1 of every expert, then fc2, of either class."""
    if hasattr(experts, "local_experts"):
        parts = [
            getattr(expert, name).weight for name in ("linear_fc1", "linear_fc2") for expert in experts.local_experts
        ]
    else:
        parts = [*experts.linear_fc1.weights, *experts.linear_fc2.weights]
    return [part.grad for part in parts] if gradients else parts


def _run(experts, counts: list[int]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(sum(counts), NANO_CPU.hidden_size, generator=rng).mul_(4).requires_grad_()
    p = torch.rand(sum(counts), generator=rng).requires_grad_()
    out, bias = experts(x, torch.tensor(counts), p)
    assert bias is None
    out.square().sum().backward()
    return [out.detach(), x.grad, p.grad, *_by_expert(experts, gradients=True)]


def _assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= CLOSE * b.norm()


@pytest.mark.parametrize("counts", [[9, 3, 20, 8], [0, 30, 0, 1], [0, 0, 0, 40], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_equals_sequential_mlp(megatron, backend, counts):
    grouped = _grouped(megatron, backend=backend)
    want = _run(_sequential(megatron, grouped), counts)
    _assert_close(_run(grouped, counts), want)


def test_equals_sequential_mlp_inside_a_layer(megatron):
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    from megatron_evolve.substrate.model.experts import GroupedExperts

    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    shared = partial(SharedExpertMLP, submodules=parts)
    build.seed_generators(7)
    layer = MoELayer(
        build.transformer_config(NANO_CPU),
        MoESubmodules(experts=GroupedExperts, shared_experts=shared),
        layer_number=1,
        pg_collection=megatron,
    )
    x = torch.randn(12, 3, NANO_CPU.hidden_size, generator=torch.Generator().manual_seed(2)).mul_(4)
    results = []
    for experts in (layer.experts, _sequential(megatron, layer.experts)):
        layer.experts = experts
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        out, _ = layer(leaf)
        out.square().sum().backward()
        results.append(
            [out.detach(), leaf.grad, layer.router.weight.grad.clone(), *_by_expert(experts, gradients=True)]
        )
    _assert_close(*results)


def test_initialised_by_seed_at_the_configured_width(megatron):
    first, again, other = _grouped(megatron), _grouped(megatron), _grouped(megatron, seed=8)
    for a, b, c in zip(*(_by_expert(experts, gradients=False) for experts in (first, again, other)), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    fc1, fc2 = first.linear_fc1.weight0, first.linear_fc2.weight0
    assert not torch.equal(fc1, first.linear_fc1.weight1)
    num_residual = len(NANO_CPU.pattern)  # output projections start smaller by the root of the residual branches
    assert fc1.std().item() == pytest.approx(NANO_CPU.init_std, rel=0.05)
    assert fc2.std().item() == pytest.approx(NANO_CPU.init_std / num_residual**0.5, rel=0.05)


def test_state_dict_keys_are_those_of_te_grouped_mlp(megatron):
    assert list(_grouped(megatron).state_dict()) == [
        f"linear_fc{i}.weight{e}" for i in (1, 2) for e in range(NANO_CPU.num_experts)
    ]


def test_checkpoint_entries_are_those_of_sequential_mlp(megatron):
    def entries(experts):
        sharded = experts.sharded_state_dict("decoder.layers.2.mlp.experts.", ((0, 2, 6),))
        return {
            (s.key, s.global_offset): (s.global_shape, s.local_shape, s.axis_fragmentations, s.replica_id)
            for name, s in sharded.items()
            if not name.endswith("_extra_state")
        }

    grouped = _grouped(megatron)
    assert entries(grouped) == entries(_sequential(megatron, grouped))


def test_router_definition_is_megatrons(megatron):
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    rng = torch.Generator().manual_seed(4)
    logits, bias = torch.randn(200, 8, generator=rng), torch.randn(8, generator=rng)
    for num_chosen in (1, 2, 6):
        idx, p = reference.router(logits, bias, num_chosen, 2.5)
        want_p, want_idx = topk_routing_with_score_function(
            logits, num_chosen, scaling_factor=2.5, score_function="sigmoid", expert_bias=bias, dense_output=True
        )
        assert torch.equal(idx, want_idx)
        torch.testing.assert_close(p, want_p, rtol=1e-6, atol=0)


def _microbatches(experts, count: int) -> None:
    """Forward and backward on different rows each time; the second leaves expert 1 without any."""
    for seed, counts in enumerate(([5, 2, 0, 7], [3, 0, 4, 1])[:count]):
        rng = torch.Generator().manual_seed(seed)
        x = torch.randn(sum(counts), NANO_CPU.hidden_size, generator=rng).to(experts.config.params_dtype)
        out, _ = experts(x.requires_grad_(), torch.tensor(counts), torch.rand(sum(counts), generator=rng))
        out.float().square().sum().backward()


def _main_grads(experts, count: int, **setting) -> list[Tensor]:
    """What Megatron's data-parallel wrapper holds after some micro-batches."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    wrapped = DistributedDataParallel(experts.config, DistributedDataParallelConfig(**setting), experts)
    wrapped.zero_grad_buffer()
    _microbatches(wrapped.module, count)
    weights = _by_expert(experts, gradients=False)
    assert all(weight.grad is None and not weight.allreduce for weight in weights)
    return [weight.main_grad for weight in weights]


@pytest.mark.parametrize("overlap", [False, True], ids=["at the end", "overlapped"])
def test_main_gradients_are_what_autograd_accumulates(megatron, overlap):
    """To the bit in float32: either way a micro-batch's sum is rounded once, and once more where it is added."""
    plain, fused = (_grouped(megatron, backend="triton") for _ in range(2))
    _microbatches(plain, 2)
    got = _main_grads(fused, 2, overlap_grad_reduce=overlap)
    assert all(weight.grad_added_to_main_grad for weight in _by_expert(fused, gradients=False))
    for main_grad, want in zip(got, _by_expert(plain, gradients=True), strict=True):
        assert want.any()
        assert torch.equal(main_grad, want)


def test_main_gradients_of_bfloat16_are_not_rounded(megatron):
    """Each rounds to the gradient that autograd would have been given, and says more."""
    plain, fused = (_grouped(megatron, backend="triton", params_dtype=torch.bfloat16) for _ in range(2))
    _microbatches(plain, 1)
    got = _main_grads(fused, 1, grad_reduce_in_fp32=True)
    for main_grad, want in zip(got, _by_expert(plain, gradients=True), strict=True):
        assert torch.equal(main_grad.bfloat16(), want)
        assert torch.equal(main_grad, want.float()) == (not want.any())  # expert 2 has no rows here


@pytest.mark.parametrize(("backend", "in_float32"), [("triton", False), ("eager", True)])
def test_other_backends_and_other_buffers_take_the_ordinary_way(megatron, backend, in_float32):
    plain, wrapped = (_grouped(megatron, backend=backend, params_dtype=torch.bfloat16) for _ in range(2))
    _microbatches(plain, 1)
    got = _main_grads(wrapped, 1, grad_reduce_in_fp32=in_float32)
    assert not any(weight.grad_added_to_main_grad for weight in _by_expert(wrapped, gradients=False))
    for main_grad, want in zip(got, _by_expert(plain, gradients=True), strict=True):
        assert torch.equal(main_grad, want.to(main_grad.dtype))


def test_parameters_are_gathered_before_they_are_read(megatron, monkeypatch):
    """With overlap_param_gather Megatron fetches what other ranks updated when a module is called, as SequentialMLP's
    are: here every parameter is NaN until then, in a bucket of its own."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, param_and_grad_buffer

    arriving = {}

    def finish_param_sync(group, **_):
        for parameter in (parameter for bucket in group.buckets for parameter in bucket.params):
            parameter.data.copy_(arriving.pop(parameter, parameter.data))

    monkeypatch.setattr(param_and_grad_buffer._ParamAndGradBucketGroup, "finish_param_sync", finish_param_sync)
    setting = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    grouped, adapted = _grouped(megatron), _grouped(megatron)
    for weights in (adapted.linear_fc1, adapted.linear_fc2):
        weights.requires_grad_(False)
        count, (rows, columns) = weights.num_local_experts, weights.weight0.shape
        weights.lora_A = torch.nn.Parameter(torch.randn(count, 2, columns))
        weights.lora_B = torch.nn.Parameter(torch.randn(count, rows, 2))
    counts, x, p = torch.tensor([5, 2, 0, 7]), torch.randn(14, NANO_CPU.hidden_size), torch.rand(14)
    for experts in (_sequential(megatron, grouped), grouped, adapted):
        want, _ = experts(x, counts, p)
        wrapped = DistributedDataParallel(
            experts.config, DistributedDataParallelConfig(bucket_size=1, **setting), experts
        )
        trained = [parameter for parameter in experts.parameters() if parameter.requires_grad]
        arriving.update({parameter: parameter.detach().clone() for parameter in trained})
        for parameter in trained:
            parameter.data.fill_(float("nan"))
        assert torch.equal(wrapped(x, counts, p)[0], want)


def test_configurations_it_would_compute_wrongly_are_refused(megatron):
    with pytest.raises(ValueError, match="activation_func=squared_relu; got"):
        _grouped(megatron, activation_func=torch.nn.functional.gelu)
    with pytest.raises(ValueError, match="gated_linear_unit=False; got True"):
        _grouped(megatron, gated_linear_unit=True)
    with pytest.raises(ValueError, match="backend must be one of"):
        _grouped(megatron, backend="eagre")
