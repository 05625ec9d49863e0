"""The plan's arithmetic: parameters, memory, operations, traffic, ranking. No torch."""

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_evolve.substrate.layout import Layout
from megatron_evolve.substrate.model.architecture import NANO_CPU, PRESETS, Architecture
from megatron_evolve.substrate.plan.communication import traffic
from megatron_evolve.substrate.plan.flops import layer_forward, pattern_flops, token_flops
from megatron_evolve.substrate.plan.job import GIB, Job, memory_bytes
from megatron_evolve.substrate.plan.memory import by_stage, peak
from megatron_evolve.substrate.plan.parameters import adapter_share, stage_share, stages
from megatron_evolve.substrate.plan.ranking import RESERVED_BYTES, assess, candidates, rank
from megatron_evolve.substrate.recipe import Adapter

NANO, SUPER, ULTRA = (PRESETS[f"nemotron3-{size}"] for size in ("nano", "super", "ultra"))


def job(mode: str = "sft", length: int = 4096, **fields: Any) -> Job:
    return Job(mode=mode, sequence_length=length, **fields)


@given(
    st.sampled_from([NANO_CPU, NANO, SUPER, ULTRA]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 3, 6]),
    st.sampled_from([1, 2]),
)
def test_ranks_together_hold_the_model_once(a: Architecture, ep: int, pp: int, vp: int) -> None:
    if pp * vp > len(a.pattern) or (pp == 1 and vp > 1):
        return
    layout = Layout(ep=ep, pp=pp, vp=vp)
    shares = [stage_share(a, layout, stage) for stage in stages(a, layout)]
    copied = a.vocab_size * a.hidden_size if pp > 1 and a.mtp_depths else 0
    held = sum(share.dense + ep * share.expert for share in shares)
    assert held == a.num_parameters() + a.num_mtp_parameters() + copied


def test_tensor_parallelism_splits_all_but_norms_router_and_latent_projections() -> None:
    (whole,), (eighth,) = (
        [stage_share(SUPER, layout, stage) for stage in stages(SUPER, layout)] for layout in (Layout(), Layout(tp=8))
    )
    layers = SUPER.pattern + SUPER.mtp_pattern
    per_layer = SUPER.num_experts + 2 * SUPER.latent_size
    kept = (len(layers) + 4 + layers.count("E") * per_layer) * SUPER.hidden_size  # 3 norms of the head, the final one
    assert eighth.dense == pytest.approx((whole.dense - kept) / 8 + kept)
    assert eighth.expert == whole.expert  # experts are split by ep and etp


def test_adapters_of_a_small_model_counted_by_hand() -> None:
    adapter, (stage,) = Adapter(rank=2, alpha=2), stages(NANO_CPU, Layout())
    share = adapter_share(NANO_CPU, Layout(), stage, adapter)
    hidden, inner, projected, qkv = 64, 128, 2 * 128 + 2 * 32 + 8, 64 + 2 * 32
    mamba = 2 * (hidden + projected + inner + hidden)
    attention = 2 * (hidden + qkv + 64 + hidden)
    shared = 2 * 2 * (hidden + 128)
    assert share.dense == 2 * mamba + 2 * attention + 2 * shared  # pattern M*EM*E
    assert share.expert == 2 * 4 * 2 * 2 * (64 + 128)


def test_states_by_hand() -> None:
    """Nano on 16 ranks with 8 expert-parallel ones: experts in 2 copies, the rest in 16."""
    memory = peak(NANO, Layout(ep=8), 16, job())
    experts = 23 * 128 * NANO.routed_expert_parameters()
    dense = NANO.num_parameters() - experts
    assert memory.weights == 2 * (dense + experts / 8)
    assert memory.gradients == 4 * (dense + experts / 8)
    assert memory.optimizer == pytest.approx(12 * (dense / 16 + experts / 8 / 2))
    reduced = peak(NANO, Layout(ep=8), 16, job(optimizer_state="reduced", offload=0.5))
    assert reduced.gradients == memory.gradients / 2 and reduced.optimizer == pytest.approx(memory.optimizer / 4)
    frozen = peak(NANO, Layout(ep=8), 16, job("lora"))
    assert frozen.weights == memory.weights and frozen.gradients < memory.gradients / 10


def test_more_recompute_keeps_less_and_longer_rows_keep_more() -> None:
    def kept(**fields: Any) -> float:
        memory = peak(NANO, Layout(tp=2, ep=8), 16, job(**fields))
        return memory.activations + memory.logits

    assert kept(recompute="full") < kept(recompute="selective") < kept()
    assert kept(length=8192) > kept() > kept(length=2048)
    assert kept(micro_batch=2) == pytest.approx(kept(length=8192), rel=0.01)  # flash attention keeps no L x L matrix


def test_early_stages_hold_more_micro_batches() -> None:
    alike = Architecture.model_validate(NANO.model_dump() | {"pattern": "ME" * 24})
    first, *_, last = by_stage(alike, Layout(pp=4, ep=8), 32, job())
    assert first.activations > 3 * last.activations and first.logits == 0 < last.logits
    few = by_stage(alike, Layout(pp=4, ep=8), 32, job(batch_size=8))  # one micro-batch a step
    assert few[0].activations == pytest.approx(few[1].activations)
    interleaved = by_stage(alike, Layout(pp=4, vp=2, ep=8), 32, job())  # 2 x 3 + 4 + 1 pieces of 6 layers, not 4 x 12
    assert interleaved[0].activations == pytest.approx(first.activations * 11 * 6 / (4 * 12), rel=0.03)


@pytest.mark.parametrize(
    ("model", "routed", "router", "shared", "latent"),
    [
        (NANO, 119.73, 0.69, 39.91, 0),
        (SUPER, 242.22, 4.19, 88.08, 16.78),
        (ULTRA, 922.75, 8.39, 335.54, 67.11),
    ],
)
def test_operations_of_an_expert_layer(
    model: Architecture, routed: float, router: float, shared: float, latent: float
) -> None:
    found = layer_forward(model, "E", 4096)
    got = [found[kind] / 1e6 for kind in ("experts", "router", "shared", "latent")]
    assert got == pytest.approx([routed, router, shared, latent], abs=0.01)


def test_operations_of_a_token() -> None:
    """Products with weights are two operations each; the rest is scores, scan and convolution."""
    kinds = [layer_forward(NANO, letter, 8192) for letter in NANO.pattern]
    between = sum(one.get("scores", 0) + one.get("scan", 0) for one in kinds)
    full = token_flops(NANO, job(length=8192))
    assert (full.forward - between) / 1e9 == pytest.approx(6.45, abs=0.01)
    tables = 2 * NANO.vocab_size * NANO.hidden_size
    assert full.forward - between == pytest.approx(2 * NANO.num_active_parameters() - tables, rel=2e-3)
    assert full.train == 3 * full.forward and full.executed - full.train == tables  # logits that are made again
    for plain in (job(length=8192, loss="logits"), job(length=512)):  # Megatron's loss, and few logits
        assert token_flops(NANO, plain).executed == token_flops(NANO, plain).train
    frozen = token_flops(NANO, job("lora", 8192))
    assert 2 / 3 < frozen.train / full.train < 0.74  # adapters of rank 32, scores and scan on top
    again = token_flops(NANO, job(length=8192, recompute="full"))
    assert (
        again.train == full.train
        and again.executed - full.executed == pattern_flops(NANO, NANO.pattern, job(length=8192)).forward
    )


def test_traffic_by_hand() -> None:
    wide = 4096 * NANO.hidden_size * 2
    alone = traffic(NANO, Layout(), 1, job(batch_size=4))
    assert alone.total == 0
    copies = traffic(NANO, Layout(), 2, job(batch_size=4))
    assert copies.total == copies.data == NANO.num_parameters() * (4 + 2) / 2
    experts = traffic(NANO, Layout(ep=2), 2, job(batch_size=4))
    assert experts.expert == 2 * 23 * 4 * NANO.top_k * wide / 2  # 2 micro-batches, half stays at home
    split = traffic(NANO, Layout(tp=2, ep=2), 2, job("lora", batch_size=4))
    assert split.tensor == 4 * (4 * 52 + 4) * wide / 2 and split.data == 0
    pipeline = traffic(NANO, Layout(pp=4), 4, job(batch_size=4))
    assert pipeline.pipeline == 4 * 2 * wide and pipeline.data == 0
    twice = traffic(NANO, Layout(tp=2, ep=2), 2, job("lora", batch_size=4, recompute="full"))
    assert twice.tensor - split.tensor == 4 * 2 * 52 * wide / 2


@given(st.integers(1, 64), st.booleans())
def test_candidates_divide_the_gpus_and_are_all_different(gpus: int, context_parallel: bool) -> None:
    found = list(candidates(gpus, context_parallel=context_parallel))
    assert Layout() in found and len(set(found)) == len(found)
    assert all(gpus % layout.ranks == 0 for layout in found)
    assert context_parallel or all(layout.cp == 1 for layout in found)


def test_ranking_puts_what_fits_first_and_gives_a_reason_to_each_other() -> None:
    found = rank(NANO, 8, 80 * GIB, job())
    fits = [one for one in found if one.fits]
    assert fits == found[: len(fits)] and 0 < len(fits) < len(found)
    assert [one.cost_s for one in fits] == sorted(one.cost_s for one in fits)
    for one in found:
        assert one.fits == (one.memory is not None and one.memory.total + RESERVED_BYTES <= 80 * GIB)
        assert one.fits or ("\n" not in one.reason and len(one.reason) > 20)


@pytest.mark.parametrize(
    ("layout", "fields", "said"),
    [
        ("", {}, "needs 216.8 GB of 80: gradients 117.6, weights 58.8, optimizer 22.1; raise ep"),
        ("tp=16", {}, "mamba_num_groups 8 must be a multiple of tp=16"),
        (
            "ep=8",
            {"batch_size": 64, "micro_batch": 8},
            "batch size 64 must be a multiple of 16 data-parallel ranks x 8",
        ),
        ("ep=8", {"batch_size": 100}, "batch_size 100 must be a multiple of the 16 data-parallel ranks"),
        ("pp=4,vp=2,ep=4", {"batch_size": 40}, "multiples of pp=4; got 10"),
        ("cp=2", {}, "needs a GPU and Transformer Engine"),
        ("tp=2,etp=2", {"mode": "lora"}, "adapters on experts need etp=1"),
    ],
)
def test_reasons(layout: str, fields: dict[str, Any], said: str) -> None:
    one = assess(NANO, Layout.from_text(layout), 16, 80 * GIB, job(**fields))
    assert not one.fits
    assert re.search(said, one.reason), one.reason


@pytest.mark.parametrize(("layout", "padded"), [("tp=8", 4104), ("tp=4,cp=2", 4112)])
def test_rows_are_planned_at_the_width_that_they_are_padded_to(layout: str, padded: int) -> None:
    given, widened = (
        assess(NANO, Layout.from_text(layout), 16, 80 * GIB, job(length=length), transformer_engine=True)
        for length in (4097, padded)
    )
    assert given.memory is not None and given == widened


def test_fewer_than_one_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 GPU; got 0"):
        rank(NANO, 0, GIB, job())


@pytest.mark.parametrize(("text", "gib"), [("80GB", 80), ("80GiB", 80), (" 141 gb", 141), ("79.6GiB", 79.6)])
def test_a_label_is_in_units_of_two_to_the_thirty(text: str, gib: float) -> None:
    assert memory_bytes(text) == math.floor(gib * GIB)


@pytest.mark.parametrize("text", ["", "80", "GB", "80MB", "80 GB each", "-80GB", "0GB", "1e3GB"])
def test_a_text_that_is_no_memory(text: str) -> None:
    with pytest.raises(ValueError, match="is written as in `80GB`"):
        memory_bytes(text)


def test_a_job_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer_state reduced needs precision bf16"):
        job(precision="float32", optimizer_state="reduced")
    with pytest.raises(ValueError, match="batch size 10 must be a multiple of 4 data-parallel ranks x 1 rows"):
        job(batch_size=10).micro_batches(4)
