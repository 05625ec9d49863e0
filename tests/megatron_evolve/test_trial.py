"""A trial's looks: dev is paid for before it is scored, and more seeds are another look."""

from types import SimpleNamespace

import pytest

from megatron_evolve.candidate import candidate
from megatron_evolve.contest.surface import ORIGIN
from megatron_evolve.eval.looks import BudgetSpent, Looks
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.trial import DEV_SPLITS, EXTERNAL_SPLITS, FIRST_TRIAL_ROUND, Trial, pay

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
