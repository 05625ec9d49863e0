"""The cumulative estimand in a real campaign: the origin's frozen runs answer a round's items, paid for, verified."""

import json

import pytest

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.eval.looks import Looks
from tests.megatron_evolve.tiny import command, events

ESTIMANDS = ["selected", "mean", "cumulative"]


@pytest.mark.slow
def test_the_origin_is_asked_again_once_the_standing_settings_moved(ground, variant, tmp_path):
    """Three explorers, all confirmed, at a bar of .51: under seed 2 chance moves one into the standing settings."""
    file = variant(
        constitution__gap={"estimands": ESTIMANDS},
        seed=2,
        constitution__workers=4,
        constitution__external_looks=24,
        search__replicates={"explorer": 1, "confirm_candidates": 3, "confirm_seeds": 1},
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
        pytest.skip("nothing moved in the first round, so the standing settings are still the origin's")

    origin = first["anchor"]
    cumulative = next(one for one in second["verdicts"] if one["estimand"] == "cumulative")
    assert cumulative["d_dev"] is not None, cumulative["reason"]
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
