"""The argument of a round, told from the campaign's folder alone: whole sentences, and nothing of weight left out."""

from pathlib import Path

import pytest

from megatron_evolve.audit import explain_round, verify_campaign
from megatron_evolve.evidence import Evidence
from megatron_evolve.explain import explain
from megatron_evolve.ledger import LEDGER, Ledger, read_ledger
from megatron_evolve.meta import next_policy
from megatron_evolve.policy import SearchPolicy
from megatron_evolve.written import open_written
from tests.megatron_evolve.campaign_folder import build_campaign
from tests.megatron_evolve.test_meta import DOWN, RULES, UP, explorer, round_of, start, verdict


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign whose store is not there: the ledger names folders that nobody has."""
    return build_campaign(tmp_path_factory.mktemp("told") / "campaign")


def test_a_round_is_explained_without_the_store_and_only_once_it_is_closed(told: Path) -> None:
    assert explain_round(told, 1).startswith("Round 1 searched in mode stabilise for the dev score")
    with pytest.raises(ValueError, match="round 9 is not closed yet"):
        explain_round(told, 9)


def test_verify_says_what_it_cannot_make_again_without_the_store(told: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found, events = verify_campaign(told), len(read_ledger(told / LEDGER))
    assert (found["ok"], found["events"], found["replayed_decisions"]) == (False, events, 0)
    broken = found["first_broken"]
    assert (broken["where"], broken["expected"].split(",")[0]) == ("substrate", "the frozen substrate")
    assert f"the chain of {events} events holds" in broken["got"] and "evidence, policy or ending" in broken["got"]


def argument(policy: SearchPolicy, evidence: Evidence, **more) -> list[str]:
    """The argument's lines, each one whole: it ends in one full stop, and no value's stands inside it."""
    following, edits = next_policy(RULES, policy, evidence)
    return whole(explain(policy, evidence, following, edits, **more))


def whole(text: str) -> list[str]:
    lines = text.splitlines()
    for line in lines:
        assert line.endswith(".") and ".." not in line and ". to " not in line and "._" not in line, line
    return lines


def test_every_line_of_a_whole_campaign_is_whole(told: Path) -> None:
    for number in (1, 2, 3, 4):
        assert len(whole(explain_round(told, number))) > 10


def test_a_value_that_is_a_sentence_is_quoted() -> None:
    policy = start()
    struck = argument(policy, round_of(policy, verdicts=[verdict("DECOUPLED", "red")]))
    held = "A dev gain in red carries over to the external score"
    reads = f'premises.1, which read "{held}", now reads "Falsified: {held}".'
    assert any(line.endswith(f"So: {reads}") for line in struck)
    waiting = {"axis": "lr", "candidate": "id-lr", "change": {"recipe.lr": {"from": 0.001, "to": 0.002}}}
    gains = explorer(policy, "lr", UP), explorer(policy, "steps", 0.04)
    stacked, _ = next_policy(RULES, policy, round_of(policy, *gains))
    assert stacked.pending == (waiting,)
    again = argument(stacked, round_of(stacked, explorer(stacked, "stack", DOWN)))
    assert any(line.endswith('axes.stack.retired now reads "No change waits to be combined".') for line in again)
    assert again[0].endswith("with 1 change waiting.")
    assert not any("way_back" in line for line in again), "of an ordinary dead end"
    assert any("dead_ends.1 is new (axis stack, change (recipe.lr from 0.001 to 0.002), " in line for line in again)


def test_an_unresolved_whole_is_told_beside_a_domain_that_is_resolved() -> None:
    policy = start()
    eight = {"reason": "About 8 such rounds pooled would settle it.", "minimum_detectable_effect": 0.09}
    verdicts = [
        verdict("UNRESOLVED") | eight,
        verdict("TRACKING", "red") | {"minimum_detectable_effect": 0.3},
        *(verdict("UNRESOLVED", "green") | {"minimum_detectable_effect": size} for size in (0.05, 0.12, None)),
    ]
    lines = argument(policy, round_of(policy, verdicts=verdicts))
    nothing = "of which nothing arrives"
    for said in (
        "Verdict for the selected estimand, overall: UNRESOLVED. About 8 such rounds pooled would settle it. "
        f"It would see a dev gain of 9.0 pt {nothing}.",
        "Verdict for the selected estimand, red: TRACKING. Told by numbers. "
        f"It would see a dev gain of 30.0 pt {nothing}.",
        "Verdicts for single domains that stayed UNRESOLVED: 3; "
        f"at best one would see a dev gain of 5.0 pt {nothing}, at worst 12.0 pt.",
    ):
        assert said in lines
    assert "No verdict was asked for." in argument(policy, round_of(policy))


CLAIM = "a gain on {} by Holm over the round's explorers at 5 %"


def test_a_claim_stands_behind_its_score_with_what_vetoes_it() -> None:
    policy = start()
    effect = "+3.0 pt [+1.0 pt, +5.0 pt], P(better) 0.99"
    fall = "-3.0 pt [-5.0 pt, -1.0 pt]"
    vetoed = explorer(policy, "lr", UP, external=DOWN, gain=True, confirmed=False)
    unclaimed = explorer(policy, "steps", UP, external=DOWN, confirmed=False)
    lines = argument(policy, round_of(policy, vetoed, unclaimed))
    outside = f"and external-b by {fall}, P(better) 0.01."
    vetoes = f"which the whole external score ({fall}) vetoes"
    assert f"lr moved dev-b by {effect}, {CLAIM.format('dev')}, {vetoes}, {outside}" in lines
    assert f"steps moved dev-b by {effect}, while the whole external score fell ({fall}), {outside}" in lines
    policy = start("external")
    gained = explorer(policy, "lr", UP, gain=True)
    gained = gained.replace(effects={**gained.effects, "dev-b": gained.effects["external-b"]})
    lines = argument(policy, round_of(policy, gained))
    claims = f"confirmed by further seeds, {CLAIM.format('external')}"
    assert f"lr moved dev-b by {effect} and external-b by {effect}, {claims}." in lines


def test_a_candidate_of_two_axes_is_told_under_both(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append("campaign-opened", "", {})
    for worker, (axis, name) in enumerate((("stack", "id-stack"), ("lr", ""), ("style", "id-stack"), ("lr", "id-lr"))):
        ledger.append("proposed", f"1/{worker}/0", {"axis": axis, "candidate": name})
    ledger.append("proposed", "2/1/0", {"axis": "steps", "candidate": "id-stack"})
    ledger.close()
    axes = open_written(tmp_path).axes_of(1)
    assert axes == {"id-stack": ("stack", "style"), "id-lr": ("lr",)}
    policy = start()
    lines = argument(policy, round_of(policy, explorer(policy, "stack", UP), explorer(policy, "lr", DOWN)), axes=axes)
    assert [line.split(" moved ")[0] for line in lines[1:3]] == ["lr", "stack and style (one candidate)"]
