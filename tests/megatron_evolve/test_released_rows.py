"""Rows of a CSV that come round again: selection and the next policy read them as released, verdicts exactly."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_evolve.artefacts import CampaignFolder, save_yaml
from megatron_evolve.constitution import Constitution
from megatron_evolve.contest.product import ProductCampaign
from megatron_evolve.contest.surface import ORIGIN
from megatron_evolve.eval.paired import effect as effect_of
from megatron_evolve.eval.paired import estimate
from megatron_evolve.eval.reported import WHOLE_WEIGHT
from megatron_evolve.facts import RoundFacts, round_facts
from megatron_evolve.ledger import Ledger
from megatron_evolve.meta import initial_policy
from megatron_evolve.released import told_contrast
from megatron_evolve.review import a_half_means, review
from tests.megatron_evolve.test_external import told_round
from tests.megatron_evolve.test_review import a_round, drawn

__all__ = ["drawn"]  # the fixture

HALVES = frozenset({"external-a", "external-b"})
DEV = ("dev-a", "dev-b")


def is_released(read, exact, items: int) -> bool:
    """Whether it is none within its standard error, and beyond it the nearest whole number of items."""
    wanted = 0.0 if abs(exact.mean) <= exact.se else round(exact.mean * items) / items
    return read.mean == pytest.approx(wanted, abs=1e-12) and read.se == exact.se


def test_the_next_policy_reads_them_as_released_and_verdicts_stay_exact(
    drawn: tuple[ProductCampaign, RoundFacts],
) -> None:
    campaign, facts = drawn
    exact, read = (
        review([one], campaign.rules, campaign.origin, campaign.weights, [], {})
        for one in (facts, replace(facts, reused=HALVES))
    )
    assert read.verdicts == exact.verdicts and read.selected == exact.selected
    some = next(run for runs in facts.runs.values() for run in runs)
    moved = 0
    for one, before in zip(read.candidates, exact.candidates, strict=True):
        assert one.gain == before.gain and one.effects.keys() == before.effects.keys()
        for split, effect in one.effects.items():
            splits = ("external-a", "external-b") if split == "external" else (split,)
            count = len(some.items(splits).item_ids)
            assert (
                effect == before.effects[split] if split in DEV else is_released(effect, before.effects[split], count)
            )
            moved += effect != before.effects[split]
        for name, domain in one.domains.items():
            assert domain.dev_effect == before.domains[name].dev_effect
            if domain.external_effect is not None:
                count = int((some.items(("external-a", "external-b")).families == name).sum())
                assert is_released(domain.external_effect, before.domains[name].external_effect, count)
    assert moved


def test_selection_after_the_external_score_ranks_them_as_released(drawn: tuple[ProductCampaign, RoundFacts]) -> None:
    campaign, facts = drawn
    after = replace(facts, policy=facts.policy.replace(objective="external"))
    fresh, read = (a_half_means(one, campaign.weights) for one in (after, replace(after, reused=HALVES)))
    assert a_half_means(replace(facts, reused=HALVES), campaign.weights) == a_half_means(facts, campaign.weights)
    count = len(next(iter(facts.runs.values()))[0].items(("external-a",)).item_ids)
    assert read.keys() == fresh.keys() and read != fresh
    assert all(mean * count == pytest.approx(round(mean * count)) for mean in read.values())
    best = max(read.values())
    assert max(fresh, key=fresh.get) in [name for name, mean in read.items() if mean == best]


def test_further_seeds_confirm_on_what_is_released() -> None:
    """A further run that is above the anchor by less than the standard error confirms on fresh rows alone."""
    campaign, facts = a_round(seed=5, confirm_candidates=5)
    exact, read = (
        {one.id: one for one in review([given], campaign.rules, campaign.origin, campaign.weights, [], {}).candidates}
        for given in (facts, replace(facts, reused=HALVES))
    )
    anchors = [run.items(("external-b",)) for run in facts.scored(facts.anchor, "external-b")]
    seen = set()
    for name in facts.explorers:
        further = [run.items(("external-b",)) for run in facts.further(name)]
        if further:
            found = effect_of(further, anchors, campaign.weights.external)
            assert exact[name].confirmed_off_objective == (found.mean > 0)
            assert read[name].confirmed_off_objective == (found.mean > found.se)
            seen.add((exact[name].confirmed_off_objective, read[name].confirmed_off_objective))
    assert (True, False) in seen, "one that is above by less is among them"


def test_further_seeds_confirm_on_what_a_target_that_shows_no_item_released() -> None:
    campaign, facts, _ = told_round("dev")
    found = review([facts], campaign.rules, campaign.origin, campaign.weights, [], {})
    told = {one.id: one.confirmed_off_objective for one in found.candidates}
    exact = {name: told_contrast(facts, name, facts.further(name)) for name in facts.explorers if facts.further(name)}
    gains = {name: estimate([(1.0, one, WHOLE_WEIGHT)]) for name, one in exact.items()}
    assert all(told[name] == (gain.mean > gain.se) for name, gain in gains.items())
    assert sum(told[name] != (gain.mean > 0) for name, gain in gains.items()) == 1, "one is above by less"


def test_the_opening_tells_from_which_round_on(tmp_path: Path) -> None:
    """So that a round that is reviewed again reads what the first review read."""
    folder, ledger = CampaignFolder(tmp_path), Ledger(tmp_path)
    opened = {"substrate": "s", "judge": "j", "rounds_anew": {"external-a": 2, "external-b": 1}}
    ledger.append("campaign-opened", "", opened)
    found = []
    for number in (1, 2, 3):
        policy = initial_policy(ORIGIN, {}, Constitution()).replace(round=number)
        ledger.append("policy", str(number), {"digest": save_yaml(folder.policy(number), policy)})
        found.append(round_facts(folder, ledger, 0, number))
    assert [one.reused for one in found] == [frozenset(), frozenset({"external-b"}), HALVES]
    assert [one.asked_before("external") for one in found] == [False, True, True]
    assert not any(one.asked_before("dev-a") for one in found)
