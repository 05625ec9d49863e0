"""What would spoil a campaign from its first round on is refused, or warned of, before anything is made."""

from pathlib import Path

import pytest

from megatron_evolve.campaign import SHIPPED, Campaign, load_campaign
from megatron_evolve.estimate import seed_luck, use_words
from megatron_evolve.loop import Session, run_campaign
from megatron_evolve.preflight import check_opening

DEMO = load_campaign(SHIPPED / "demo.yaml")


def changed(looks: int, asks: str = "all", **rules: int) -> Campaign:
    constitution = DEMO.constitution.replace(external_looks=looks, **rules)
    return DEMO.replace(constitution=constitution, search=DEMO.search.replace(ask_external=asks))


def test_looks_that_do_not_last_for_a_round_are_refused(tmp_path: Path) -> None:
    """Ten looks went to 8 candidates on one half and 2 on the other: the leader was judged by none."""
    session = Session(tmp_path / "run", tmp_path / "store", lambda what, facts: None, lambda: False)
    says = (
        "has 10 external look.* asks `all` takes 16: the first would leave candidates without a score of the target, "
        "the leader perhaps; raise constitution.external_looks, set search.ask_external to best"
    )
    with pytest.raises(ValueError, match=says) as told:
        run_campaign(session, changed(10))
    assert "\n" not in str(told.value) and list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="asks `best` takes 4"):
        check_opening(changed(3, "best"))
    for looks, asks in ((16, "all"), (0, "all"), (10, "best"), (10, "none")):
        check_opening(changed(looks, asks))


@pytest.mark.parametrize(("workers", "confirm", "warned"), [(32, 0, True), (32, 2, False), (8, 0, False)])
def test_leaders_that_nobody_confirms_are_warned_of_where_many_run(workers: int, confirm: int, warned: bool) -> None:
    campaign = changed(999, workers=workers)
    replicates = campaign.search.replicates.replace(confirm_candidates=confirm)
    campaign = campaign.replace(search=campaign.search.replace(replicates=replicates))
    said = seed_luck(campaign)
    assert ["the best of 31 explorers carries its seed's luck" in one for one in said] == [True] * warned
    unasked = campaign.replace(search=campaign.search.replace(ask_external="none"))
    unpaid = campaign.replace(constitution=campaign.constitution.replace(external_looks=0))
    outside = campaign.replace(judge=campaign.judge.replace(external=None))
    assert [seed_luck(one) for one in (unasked, unpaid, outside)] == [[]] * 3, "where nothing can alarm"
    candidates_alone = campaign.search.replicates.replace(confirm_candidates=2, confirm_seeds=0)
    said_again = seed_luck(campaign.replace(search=campaign.search.replace(replicates=candidates_alone)))
    assert all("confirm_candidates to 2 and confirm_seeds to 1" in one for one in said_again)
    assert bool(said_again) == (workers == 32)
    total = {"training_runs": 1, "scoring_jobs": 1, "training_gpu_hours_assumed": None}
    total |= {"gpu_hours_limit": None, "cpu_hours_limit": None}
    assert use_words({"total": total, "rounds": 4, "rounds_anew": {}, "warnings": said}, {})[1:] == said
