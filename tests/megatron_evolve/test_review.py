"""The review reads what was paid for: a confirming run is judged on dev-B, and never selected on."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_evolve.artefacts import CampaignFolder, save_yaml
from megatron_evolve.contest.laboratory import Laboratory
from megatron_evolve.contest.product import DrawnRound, ProductCampaign, Variant
from megatron_evolve.contest.surface import draw_surface
from megatron_evolve.eval.score import overall_score
from megatron_evolve.facts import RoundFacts, round_facts
from megatron_evolve.ledger import Ledger
from megatron_evolve.reading import readings
from megatron_evolve.review import a_half_means, review, round_items
from megatron_evolve.stance import looks_of_a_round


@pytest.fixture(scope="module")
def drawn() -> tuple[ProductCampaign, RoundFacts]:
    return a_round(seed=4)


def a_round(seed: int, **replicates: int) -> tuple[ProductCampaign, RoundFacts]:
    """A round drawn from a surface: the product's own, but for its jobs."""
    lab = Laboratory(draw_surface("cue", "review", 4), np.random.default_rng(seed), 48)
    campaign = ProductCampaign(lab, Variant(), 4)
    policy = campaign._first_policy()
    one = DrawnRound(campaign, policy.replace(replicates=policy.replicates.replace(**replicates)))
    one.run_candidates()
    return campaign, one.facts()


def test_the_dev_a_of_confirming_runs_is_read_nowhere(drawn) -> None:
    campaign, facts = drawn
    evidence = review([facts], campaign.rules, campaign.origin, campaign.weights, [], {})
    explorers = {one.id: one for one in evidence.candidates if one.role == "explorer"}
    first = campaign.campaign.search.replicates.explorer
    confirmed = [one for one in explorers.values() if len(one.runs) > first]
    assert confirmed, "the leaders of dev-A ran again"
    for one in explorers.values():
        for place, run in enumerate(one.runs):
            assert ("dev-a" in run.scores) == (place < first) and "dev-b" in run.scores
    means = a_half_means(facts, campaign.weights)
    anchor = round_items(facts, campaign.weights).dev_a[facts.anchor]
    for name, mean in means.items():
        assert explorers[name].effects["dev-a"].mean == pytest.approx(mean - anchor, abs=1e-12)
    ranked = sorted(readings(evidence, "dev", campaign.rules), key=lambda one: one.rank)
    assert ranked[0].candidate.id == evidence.selected, "the ranking that promotes is the one that selected"
    asked = looks_of_a_round(facts.policy, campaign.rules, evidence, "dev")
    assert asked == campaign.lab.looks == 2 * campaign.rules.workers


def test_what_a_repair_proposed_again_makes_no_confirming_run_select(drawn) -> None:
    """Two workers that open with a candidate add runs of it; a repair that comes to one that runs adds none."""
    _, facts = drawn
    name = next(one for one in facts.explorers if len(facts.runs[one]) > 1)
    mine = next(one for one in facts.proposals if one.candidate == name)
    other = next(one for one in facts.proposals if one.candidate != name)
    assert len(facts.first(name, "dev-a")) == 1
    repair = replace(facts, proposals=(*facts.proposals, replace(mine, worker=other.worker)))
    assert len(repair.first(name, "dev-a")) == 1
    twice = replace(facts, proposals=(*facts.proposals, replace(mine, worker=99)))
    assert len(twice.first(name, "dev-a")) == 2
    assert [len(one.further(name)) for one in (facts, repair, twice)] == [1, 1, 0]
    moved = tuple(replace(one, worker=other.worker) if one is mine else one for one in facts.proposals)
    alone = replace(facts, proposals=(other, *(one for one in moved if one is not other)))
    assert len(alone.first(name, "dev-a")) == 1, "it came by a repair alone"
    assert facts.first("nobody", "dev-a") == []


def test_a_run_that_selected_confirms_nothing(drawn) -> None:
    """Of two workers that open with one candidate the second run was planned before anything was ranked."""
    campaign, facts = drawn
    ground = (campaign.rules, campaign.origin, campaign.weights, [], {})
    name = next(one.id for one in review([facts], *ground).candidates if one.confirmed or one.confirmed_off_objective)
    mine = next(one for one in facts.proposals if one.candidate == name)
    twice = replace(facts, proposals=(*facts.proposals, replace(mine, worker=99)))
    found = next(one for one in review([twice], *ground).candidates if one.id == name)
    assert len(found.runs) == 2 and not (found.confirmed or found.confirmed_off_objective)


def test_further_seeds_confirm_on_each_score_by_itself() -> None:
    """Each is what the confirming runs alone did against the anchor on the B half of that score."""
    campaign, facts = a_round(seed=5, confirm_candidates=5)
    evidence = review([facts], campaign.rules, campaign.origin, campaign.weights, [], {})
    turned = replace(facts, policy=facts.policy.replace(objective="external"))
    mirrored = review([turned], campaign.rules, campaign.origin, campaign.weights, [], {})

    def above(name: str, split: str) -> bool:
        later, anchors = (
            [overall_score(run.rows(split), campaign.weights.of(split)).mean for run in runs]
            for runs in (facts.runs[name][facts.policy.replicates.explorer :], facts.runs[facts.anchor])
        )
        return bool(later) and np.mean(later) > np.mean(anchors)

    seen = set()
    for one, other in zip(evidence.candidates[1:], mirrored.candidates[1:], strict=True):
        told = (above(one.id, "dev-b"), above(one.id, "external-b"))
        assert (one.confirmed, one.confirmed_off_objective) == told
        assert (other.confirmed_off_objective, other.confirmed) == told
        seen.add(told)
    assert {(True, False), (False, True)} <= seen, "further seeds that disagree are among them"


def test_a_worker_without_a_move_is_told_from_one_that_was_refused(tmp_path) -> None:
    campaign = ProductCampaign(Laboratory(draw_surface("cue", "review", 4), np.random.default_rng(4), 48), Variant(), 4)
    folder, policy = CampaignFolder(tmp_path), campaign._first_policy()
    ledger = Ledger(tmp_path)
    ledger.append("campaign-opened", "", {"substrate": "s", "judge": "j"})
    ledger.append("policy", "1", {"digest": save_yaml(folder.policy(1), policy)})
    endings = ("ok", None), ("malformed", None), ("refused", {"hypothesis": "A try."})
    for worker, (ending, delta) in enumerate(endings, start=1):
        told = {"round": 1, "worker": worker, "axis": f"axis-{worker}", "candidate": "", "refused": "Why not."}
        ledger.append("proposed", f"1/{worker}/0", {**told, "delta": delta, "call": {"ending": ending}})
    told = {"round": 1, "worker": 3, "axis": "axis-3", "candidate": "", "refused": "I could not mend it."}
    ledger.append("proposed", "1/3/1", {**told, "delta": None, "call": {"ending": "ok"}})
    facts = round_facts(folder, ledger, 4, 1)
    evidence = review([facts], campaign.rules, campaign.origin, campaign.weights, [], {})
    assert [one.nothing for one in evidence.candidates if one.refused] == [True, False, False]
