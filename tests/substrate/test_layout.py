"""Layout: sizes that fit a model, pieces of a pattern, refusals that say what to change. No torch."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_evolve.substrate.layout import SIZES, Layout
from megatron_evolve.substrate.model.architecture import NANO_CPU, PRESETS, Architecture

sizes = st.sampled_from([1, 2, 3, 4, 8])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    return Layout(**{name: draw(sizes) for name in SIZES})


@given(layouts(), st.integers(1, 4))
def test_every_rank_has_one_place(layout: Layout, copies: int) -> None:
    ranks = layout.ranks * copies
    assert layout.data_parallel(ranks) * layout.tp * layout.cp * layout.pp == ranks
    assert layout.expert_data_parallel(ranks) * layout.ep * layout.etp * layout.pp == ranks
    assert layout.ranks == layout.pp * math.lcm(layout.tp * layout.cp, layout.ep * layout.etp)


@given(layouts(), st.integers(1, 300))
def test_a_padded_width_is_the_least_that_all_ranks_can_cut(layout: Layout, width: int) -> None:
    pieces = layout.tp * (2 * layout.cp if layout.cp > 1 else 1)
    assert layout.padded(width) % pieces == 0 and 0 <= layout.padded(width) - width < pieces
    assert layout.cp > 1 or 4 % layout.tp or layout.padded(4 * width) == 4 * width


@given(layouts(), st.text(alphabet="ME*", min_size=64, max_size=120))
def test_stages_are_the_pattern_in_order_and_of_one_length_but_for_one(layout: Layout, pattern: str) -> None:
    stages = layout.stages(pattern)
    assert "".join(stages) == pattern and len(stages) == layout.pp * layout.vp
    assert max(map(len, stages)) - min(map(len, stages)) <= 1
    assert len(stages[-1]) == min(map(len, stages))


@given(layouts())
def test_text_and_back(layout: Layout) -> None:
    text = str(layout)
    assert Layout.from_text("" if text == "one rank" else text) == layout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tp", "written as in"),
        ("tp=2,tp=2", "at most once"),
        ("tp=-1", "written as in"),
        ("tp=0", "greater than or equal to 1"),
        ("dp=2", "unknown key 'dp'"),
    ],
)
def test_a_text_that_is_no_layout(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        Layout.from_text(text)
    assert "\n" not in str(error.value)


def changed(**fields: object) -> Architecture:
    return Architecture.model_validate(NANO_CPU.model_dump() | fields)


def refuse(text: str, ranks: int, architecture: Architecture = NANO_CPU, **given: object) -> str:
    with pytest.raises(ValueError) as error:
        Layout.from_text(text).check(architecture, **{"ranks": ranks, "batch_size": 64, "adapter": False, **given})
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "ranks"),
    [("", 1), ("", 8), ("tp=2", 2), ("pp=3", 3), ("pp=3,vp=2", 3), ("ep=4", 4), ("tp=2,ep=2,etp=2", 4)],
)
def test_what_fits_passes(text: str, ranks: int) -> None:
    Layout.from_text(text).check(NANO_CPU, ranks=ranks, batch_size=64, adapter=False)


def test_what_does_not_fit_is_named_with_its_remedy() -> None:
    assert "multiple of 4 ranks; give it that many" in refuse("tp=2,pp=2", 6)
    assert "mamba_num_groups 2 must be a multiple of tp=4" in refuse("tp=4", 4)
    assert "num_experts 4 must be a multiple of ep=8" in refuse("ep=8", 8)
    assert "expert_ffn_size 128 must be a multiple of etp=3" in refuse("etp=3", 3)
    assert "batch_size 64 must be a multiple of the 3 data-parallel ranks" in refuse("", 3)
    assert "adapters on experts need etp=1" in refuse("tp=2,etp=2", 2, adapter=True)
    assert "needs a GPU and Transformer Engine" in refuse("cp=2", 2)
    assert "8 pipeline pieces need as many layers" in refuse("pp=4,vp=2", 4)
    assert "vp=2 needs at least 3 pipeline stages to interleave" in refuse("pp=2,vp=2", 2)
    assert "micro-batches in multiples of pp=3; got 4" in refuse("pp=3,vp=2", 3, micro_batches=4)
    assert "has no experts to spread" in refuse("ep=2", 2, changed(pattern="M*M*"))
    assert "vocab_size 16 must be a multiple of tp=3" in refuse(
        "tp=3",
        3,
        changed(
            vocab_size=16,
            mamba_num_heads=6,
            mamba_num_groups=3,
            num_attention_heads=6,
            num_query_groups=3,
            shared_ffn_size=126,
            num_experts=6,
        ),
    )


def test_context_parallelism_is_there_with_a_gpu_and_transformer_engine() -> None:
    Layout(cp=2).check(NANO_CPU, ranks=2, batch_size=64, adapter=False, context_parallel=True)
    said = refuse("cp=16", 16, context_parallel=True)
    assert "mamba_num_heads 8 must be a multiple of tp x cp = 16" in said
    said = refuse("cp=4", 4, changed(mamba_num_heads=12, mamba_num_groups=6), context_parallel=True)
    assert "the 6 mamba groups of a tensor-parallel rank must divide cp=4 or be a multiple of it" in said


def test_context_parallel_ranks_may_share_a_mamba_group() -> None:
    """Megatron repeats B and C for them; NVIDIA trains Ultra, with 8 groups, at tp=2 and cp=8."""
    Layout(tp=2, cp=2).check(NANO_CPU, ranks=4, batch_size=64, adapter=False, context_parallel=True)
    Layout(tp=2, pp=6, ep=32, cp=8).check(
        PRESETS["nemotron3-ultra"], ranks=192, batch_size=64, adapter=False, context_parallel=True
    )


def test_all_problems_are_listed() -> None:
    found = Layout(tp=4, ep=8).problems(NANO_CPU, ranks=8, batch_size=64, adapter=False)
    assert len(found) == 2
    assert Layout().problems(NANO_CPU, ranks=1, batch_size=64, adapter=True) == []
