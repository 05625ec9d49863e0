"""Mix, recipe and settings: frozen values whose digests name them, and errors that help."""

import math

import pytest

from megatron_evolve.substrate.digest import canonical, digest_of
from megatron_evolve.substrate.mix import Mix
from megatron_evolve.substrate.recipe import Adapter, Recipe
from megatron_evolve.substrate.settings import Settings, paths, read, write, write_all


def settings(**weight: float) -> Settings:
    weight = weight or {"a": 1, "b": 3}
    return Settings(mix=Mix(weight=weight, style=dict.fromkeys(weight, "answer")), recipe=Recipe())


def test_weights_are_normalised_so_equal_mixes_have_equal_digests() -> None:
    assert settings(a=1, b=3).mix.weight == {"a": 0.25, "b": 0.75}
    assert digest_of(settings(a=1, b=3)) == digest_of(settings(a=2, b=6))
    assert digest_of(settings(a=1, b=3)) != digest_of(settings(a=1, b=2))


def test_an_empty_mix_is_refused() -> None:
    with pytest.raises(ValueError, match="sum to zero, so there is nothing to train on"):
        Settings.parse({"mix": {"weight": {"a": 0}, "style": {"a": "answer"}}, "recipe": {}}, where="x")


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_weights_are_finite_and_not_negative(bad: float) -> None:
    with pytest.raises(ValueError):
        Mix(weight={"a": bad, "b": 1}, style={"a": "answer", "b": "answer"})


def test_curriculum_ends_where_it_says() -> None:
    mix = Mix(weight={"a": 1, "b": 3}, style={"a": "answer", "b": "answer"}, curriculum="uniform-first")
    assert mix.shares_at(0.0) == {"a": 0.5, "b": 0.5}
    assert mix.shares_at(1.0) == {"a": 0.25, "b": 0.75}
    reverse = mix.replace(curriculum="uniform-last")
    assert reverse.shares_at(1.0) == {"a": 0.5, "b": 0.5}
    assert all(math.isclose(sum(mix.shares_at(u / 7).values()), 1) for u in range(8))


def test_learning_rate_rises_to_its_peak_and_falls_to_its_floor() -> None:
    recipe = Recipe(lr=1e-3, warmup_steps=10, steps=110, min_lr_ratio=0.1)
    rates = [recipe.lr_at(step) for step in range(recipe.steps)]
    assert max(rates) == pytest.approx(1e-3)
    assert rates[9] == pytest.approx(1e-3)
    assert rates[0] == pytest.approx(1e-4)
    assert rates[-1] == pytest.approx(1e-4, rel=0.01)
    assert all(Recipe(schedule="constant").lr_at(step) == Recipe().lr for step in (10, 70, 139))


def test_unknown_path_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown setting 'recipe.lrr'; did you mean recipe.lr"):
        read(settings(), "recipe.lrr")
    with pytest.raises(ValueError, match=r"unknown setting 'recipe.adapter.rank'"):
        read(settings(), "recipe.adapter.rank")


def test_every_offered_path_can_be_read() -> None:
    full = write(settings(), "recipe.adapter", {"rank": 4, "alpha": 8.0})
    assert "recipe.adapter.rank" in paths(full)
    for path in paths(full):
        read(full, path)


def test_writing_checks_ranges_and_renormalises_once() -> None:
    with pytest.raises(ValueError, match="lr: input should be less than or equal to 1, got 5"):
        write(settings(), "recipe.lr", 5)
    both = write_all(settings(a=1, b=1, c=2), {"mix.weight.a": 1.0, "mix.weight.b": 1.0})
    assert both.mix.weight == pytest.approx({"a": 0.4, "b": 0.4, "c": 0.2}, abs=1e-8)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        settings().recipe.lr = 1.0  # type: ignore[misc]


def test_adapter_targets_stand_once() -> None:
    with pytest.raises(ValueError, match="each adapter target may stand once"):
        Adapter(rank=4, alpha=4, targets=("experts", "experts"))


def test_canonical_form() -> None:
    assert canonical({"b": 2.0, "a": [1, 0.5]}) == b'{"a":[1,0.5],"b":2}'
    assert canonical({2: (None, True), "10": {"x": ({0.5: -3.0},)}}) == b'{"10":{"x":[{"0.5":-3}]},"2":[null,true]}'
    assert canonical([settings(), 1e300]) == canonical([settings().model_dump(mode="json"), 1e300])
    with pytest.raises(ValueError, match="finite"):
        canonical(math.nan)
