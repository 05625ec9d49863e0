"""A trial: dev is paid for before it is scored, more seeds are another look, and no number comes from no difference."""

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_evolve.candidate import candidate
from megatron_evolve.comparisons import Weights
from megatron_evolve.contest.surface import ORIGIN
from megatron_evolve.eval.looks import BudgetSpent, Looks
from megatron_evolve.eval.paired import RunItems
from megatron_evolve.eval.seeds import SeedPool
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.trial import DEV_SPLITS, EXTERNAL_SPLITS, FIRST_TRIAL_ROUND, Trial, compare, pay, words

RECORD = SimpleNamespace(
    campaign=SimpleNamespace(seed=1),
    opened={"judge": "j"},
    suites={"items": {"dev-a": 60, "dev-b": 60, "external-a": 30, "external-b": 30}},
)
MOVED = ORIGIN.replace(recipe=ORIGIN.recipe.replace(lr=2 * ORIGIN.recipe.lr))
SIDES = [candidate(digest_of("trial"), one) for one in (ORIGIN, MOVED)]


def trial(seeds: int) -> Trial:
    return Trial(RECORD, None, ORIGIN, *SIDES, None, FIRST_TRIAL_ROUND, seeds)


def test_dev_is_paid_once_a_side_and_half_and_again_for_more_seeds(tmp_path) -> None:
    account = Looks(tmp_path / "looks.jsonl", external_budget=4)
    for seeds, looks in ((3, 4), (3, 4), (5, 8), (3, 8), (5, 8)):
        pay(trial(seeds), account, DEV_SPLITS)
        assert account.summary() == {"dev": looks, "external": 0, "external_budget": 4}
    assert [len(one.runs) for one in account.entries] == [3] * 4 + [5] * 4
    assert {one.candidates[0] for one in account.entries} == {one.id for one in SIDES}
    assert len({one.item_set for one in account.entries}) == 2, "the same items of each half"


def test_an_external_look_is_charged_as_any(tmp_path) -> None:
    account = Looks(tmp_path / "looks.jsonl", external_budget=4)
    pay(trial(3), account, (*DEV_SPLITS, *EXTERNAL_SPLITS))
    assert account.spent == 4
    with pytest.raises(BudgetSpent):
        pay(trial(5), account, EXTERNAL_SPLITS)


@pytest.mark.parametrize("apart", [False, True])
def test_where_no_item_tells_the_sides_apart_there_is_no_number(apart: bool) -> None:
    """It read `P(better) 0.50` and an interval of no width."""

    def answered(name: str, seed: int) -> SimpleNamespace:
        right = np.arange(80) < 10 + 16 * apart * (name == SIDES[1].id)
        families = ["a"] * 40 + ["b"] * 40
        return SimpleNamespace(items=lambda splits: RunItems(name, seed, np.arange(80), families, right))

    shown = trial(3)
    object.__setattr__(shown, "facts", lambda found, stages: [answered(found.id, seed) for seed in (1, 2, 3)])
    dev = compare(shown, ("dev-b",), "dev", Weights({"a": 0.5, "b": 0.5}, {}), SeedPool(()))
    told = {"candidate": "c", "anchor": "a", "substrate": "s", "external": dev, "failures": []}
    said = words({**told, "dev": dev, "predicted": {"domains": {"b": "flat"}}})
    numbers = ("mean", "se", "low", "high", "p_better")
    assert [dev["domains"]["b"][name] for name in numbers] == [None] * 5
    assert ("b not apart, predicted flat: unresolved" in said) == apart
    assert ([dev[name] for name in (*numbers, "minimum_detectable_effect")] == [None] * 6) != apart
    assert ("NO VERDICT  c: none of 80 dev-B items tell the two sides apart, expected 15" in said) != apart
    assert ("external none of 80 dev-B items" in said) != apart
    assert "to settle: seeds alone cannot" not in said or apart, "of an effect that nobody claims"


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_run_a_side_says_whether_the_two_checkpoints_differ(seeds: int) -> None:
    """Beside the verdict, which knows what a seed is worth; of several runs a side there is no such pair."""
    right = {SIDES[0].id: range(20, 60), SIDES[1].id: range(40)}  # 20 items in the one alone, 20 in the other

    def answered(name: str, seed: int) -> SimpleNamespace:
        items = np.roll(np.arange(80), 10 if name == SIDES[0].id else 0)
        families = np.where(items < 40, "a", "b")
        return SimpleNamespace(items=lambda splits: RunItems(name, seed, items, families, np.isin(items, right[name])))

    shown = trial(seeds)
    object.__setattr__(shown, "facts", lambda found, stages: [answered(found.id, seed) for seed in range(seeds)])
    dev = compare(shown, ("dev-b",), "dev", Weights({"a": 0.9, "b": 0.1}, {}), SeedPool(()))
    expected = {"only_candidate": 20, "only_anchor": 20, "midp": 1.0}
    assert dev["checkpoints"] == (expected if seeds == 1 else None)
    told = {"candidate": "c", "anchor": "a", "substrate": "s", "external": None, "failures": []}
    said = words({**told, "dev": dev, "predicted": {"domains": {}}})
    assert ("20 items right in the candidate's alone, 20 in the anchor's, mid-p 1.000" in said) == (seeds == 1)
