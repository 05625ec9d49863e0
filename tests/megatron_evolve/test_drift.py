"""The cumulative estimand in a real campaign: the origin's frozen runs answer a round's items, paid for, verified."""

import json

import pytest

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.audit import open_record
from megatron_evolve.comparisons import Weights
from megatron_evolve.eval.looks import Looks
from megatron_evolve.review import round_items
from megatron_evolve.window import pair_of
from tests.megatron_evolve.tiny import command, events, facts_of

ESTIMANDS = ["selected", "mean", "cumulative"]


# In round 1 both explorers learn for twenty times as long as the origin, so that chance would have to keep both out.
PROPOSALS = 'answer({"recipe.steps": {"set": 160 + calls if calls < 2 else 8 + calls}})'


@pytest.mark.slow
def test_the_origin_is_asked_again_once_the_standing_settings_moved(ground, worker, variant, tmp_path):
    file = variant(
        constitution__gap={"estimands": ESTIMANDS},
        constitution__limits__max_steps=200,
        constitution__external_looks=24,
        worker=worker(PROPOSALS),
    )
    folder = tmp_path / "campaign"
    done = ground.run(folder, "--json", file=file)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(CampaignFolder(folder).evidence(number).read_text()) for number in (1, 2))
    cumulative = [one for one in first["verdicts"] if one["estimand"] == "cumulative"]
    assert len(first["verdicts"]) == 3 * (1 + len(first["candidates"][0]["domains"]))
    assert all("still the origin" in one["reason"] for one in cumulative)
    assert json.loads(command("verify", folder, "--json").stdout)["ok"]
    if second["anchor"] == first["anchor"]:
        pytest.skip("neither explorer of the first round answered better, so nothing moved")

    origin = first["anchor"]
    cumulative = next(one for one in second["verdicts"] if one["estimand"] == "cumulative")
    # Sixty external items may be too few to claim anything of two sides that learnt next to nothing.
    assert cumulative["d_dev"] is not None or "tell the two sides apart" in cumulative["reason"], cumulative["reason"]
    assert origin not in [one["id"] for one in second["candidates"]], "it is judged against, and is no candidate"
    runs = {event["key"].split("/")[2] for event in events(folder) if event["key"].startswith(f"2/{origin}/")}
    assert len(runs) == 8
    assert not any(
        event["key"].endswith("/train") for event in events(folder) if event["key"].startswith(f"2/{origin}/")
    )
    account = Looks(CampaignFolder(folder).looks, external_budget=24)
    paid = {look.split for look in account.entries if look.candidates == (origin,) and look.round == 2}
    assert paid == {"dev-a", "dev-b", "external-a", "external-b"}

    before = len(events(folder))
    again = ground.run(folder, "--json", file=file)
    assert again.returncode == 0 and len(events(folder)) == before, "nothing is asked twice"


@pytest.mark.slow
def test_an_explorer_that_proposes_the_origins_settings_again_answers_for_it(ground):
    """It moved away from the origin, and a worker proposed the way back: those runs are the origin's."""
    weights = Weights(**open_record(ground.finished).suites["weights"])
    facts = facts_of(ground.finished, 1)
    again = facts.explorers[0]
    items = round_items(facts, weights, origin=again)
    assert items.origin == again and items.explorers == round_items(facts, weights).explorers
    assert pair_of("cumulative", [items]).missing == ""
    assert round_items(facts, weights, origin=facts.anchor).origin == facts.anchor
    assert round_items(facts, weights, origin="0" * 12).origin is None
