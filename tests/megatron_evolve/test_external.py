"""Scores from outside: paid first, asked once, never changed; verdicts read them exactly, selection as released.

The campaign that waits for an operator is a real one; what a program may do wrong is tried on a real ledger without any
training, and what is released on a round drawn from a surface.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.audit import verify_campaign
from megatron_evolve.campaign import Campaign, ExternalScores, find_campaign, load_campaign
from megatron_evolve.candidate import candidate
from megatron_evolve.closing import await_opening
from megatron_evolve.comparisons import Weights
from megatron_evolve.contest.laboratory import Laboratory
from megatron_evolve.contest.product import DrawnRound, ProductCampaign, Variant
from megatron_evolve.contest.surface import ORIGIN, draw_surface
from megatron_evolve.desk import Awaiting
from megatron_evolve.eval.paired import Estimate
from megatron_evolve.eval.reported import WHOLE_WEIGHT, ReportedScores
from megatron_evolve.external import ask_scores, checked, submit
from megatron_evolve.facts import RoundFacts, RunFacts
from megatron_evolve.jobs import Ground, Run
from megatron_evolve.ledger import Ledger
from megatron_evolve.meta import next_policy
from megatron_evolve.released import released, step_of
from megatron_evolve.review import a_half_means, review, round_items
from megatron_evolve.stance import looks_of_a_round
from megatron_evolve.status import state_of
from megatron_evolve.substrate.digest import digest_file, digest_of
from megatron_evolve.worlds.sealed import dev_a_means
from tests.megatron_evolve.tiny import command, events

TARGET = {"kind": "reported", "items": 400, "step": 0.0025}
AWAITING = 66


# --- what a campaign may declare ---


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"judge": {"external": {"kind": "command", "items": 400}}}, "argv in `command`"),
        ({"judge": {"external": {**TARGET, "command": ["client"]}}}, "argv in `command`"),
        ({"judge": {"external": {**TARGET, "items": 1}}}, "items"),
        ({"judge": {"external": TARGET}}, "sealed items"),
        (
            {
                "judge": {"external": TARGET},
                "claim": "infrastructure",
                "comparator": None,
                "constitution": {"gap": {"estimands": ["cumulative"]}},
            },
            "cumulative",
        ),
    ],
)
def test_a_target_that_cannot_be_is_refused_before_anything_runs(changes, named):
    with pytest.raises(ValueError, match=named):
        told_campaign(**changes)


def told_campaign(**changes: Any) -> Campaign:
    document = load_campaign(find_campaign("demo")).model_dump(mode="json", by_alias=True)
    for name, value in changes.items():
        document[name] = {**document[name], **value} if isinstance(value, dict) else value
    return Campaign.parse(document, where="campaign")


@pytest.mark.parametrize(
    ("score", "items", "se", "named"),
    [
        (float("nan"), None, None, "between 0 and 1, got nan"),
        (85.0, None, None, "between 0 and 1, got 85.0"),
        (0.501, None, None, "in steps of 0.0025"),
        (0.5, 600, None, "over 400 items"),
        (0.5, None, 0.05, "at most 0.0250"),
        (0.5, None, float("nan"), "at most 0.0250"),
    ],
)
def test_a_score_that_cannot_be_the_targets_is_refused(score, items, se, named):
    with pytest.raises(ValueError, match=named) as caught:
        checked(ExternalScores(**TARGET), score, items, se)
    assert "\n" not in str(caught.value)
    assert checked(ExternalScores(**TARGET), 0.5025, 400, 0.025) == 0.5025


# --- a program that is asked ---


@dataclass
class Table:
    """The part of a desk that scores need: a real ledger and a real folder."""

    ledger: Ledger
    ground: Ground
    stopped: bool = False
    campaign: Campaign | None = None

    def stop(self) -> bool:
        return self.stopped

    def on_progress(self, what: str, facts: dict[str, Any]) -> None:
        pass


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(Ledger(tmp_path), Ground(CampaignFolder(tmp_path), tmp_path, tmp_path, 10.0))


RUN = Run(1, candidate(digest_of("external"), ORIGIN), 7)


def program(body: str, timeout_s: float = 20) -> ExternalScores:
    """A program that notes every call, then does as told."""
    note = "import json, sys, time\nopen(sys.argv[1] + '-calls', 'a').write('x')\n"
    return ExternalScores(**TARGET | {"kind": "command", "command": (sys.executable, "-c", note + body)}).replace(
        timeout_s=timeout_s
    )


def calls(table: Table) -> int:
    path = Path(f"{table.ground.stage_dir(RUN, 'train').resolve()}-calls")
    return len(path.read_text()) if path.exists() else 0


def ask(table: Table, target: ExternalScores) -> dict[str, Any] | None:
    table.ground.stage_dir(RUN, "train").parent.mkdir(parents=True, exist_ok=True)
    ask_scores(table, target, [(RUN, "external-b")])
    event = table.ledger.find("ended", f"{RUN.key}/external-b")
    path = table.ground.stage_dir(RUN, "external-b") / "reported.json"
    return json.loads(path.read_text()) if event else None


def test_a_program_is_asked_once_and_its_score_kept(table):
    target = program("print(json.dumps({'score': 0.6125, 'items': 400}))")
    found = ask(table, target)
    assert (found["score"], found["items"], found["step"], found["by"]) == (0.6125, 400, 0.0025, "command")
    assert ask(table, target) == found and calls(table) == 1
    assert [event.kind for event in table.ledger] == ["external-asked", "ended"]


@pytest.mark.parametrize(
    ("body", "timeout_s", "named"),
    [
        ("sys.exit('quota')", 20, "quota"),
        ('print(\'{"score": 0.6125, "items": 500}\')', 20, "over 400 items"),
        ("print('{\"score\": 0.6126}')", 20, "steps of"),
        ("time.sleep(60)", 1, "longer than 1 s"),
    ],
)
def test_a_lost_reply_is_a_spent_look_and_never_asked_again(table, body, timeout_s, named):
    target = program(body, timeout_s)
    assert ask(table, target) is None and ask(table, target) is None
    assert calls(table) == 1, "a campaign that goes on does not ask again"
    (lost,) = table.ledger.of_kind("external-lost")
    assert named in lost.data["reason"]


def test_a_controller_that_died_while_asking_does_not_ask_again(table):
    """The question is in the ledger before it is put, so its reply counts as lost."""
    table.ledger.append("external-asked", f"{RUN.key}/1", {"run": RUN.key, "argv": []})
    assert ask(table, program("print('{\"score\": 0.5}')")) is None and calls(table) == 0
    assert "ended before the reply" in next(table.ledger.of_kind("external-lost")).data["reason"]


def test_only_a_recorded_command_has_it_asked_again(table):
    target = program("print('{\"score\": 0.5}') if open(sys.argv[1] + '-calls').read() == 'xx' else sys.exit('down')")
    assert ask(table, target) is None
    table.ledger.append("external-again", f"{RUN.key}/1", {"run": RUN.key, "reason": "the site was down"})
    assert ask(table, target)["score"] == 0.5 and calls(table) == 2
    assert ask(table, target)["score"] == 0.5 and calls(table) == 2


def test_a_hand_may_bring_what_a_program_lost(table):
    target = program("sys.exit('down')")
    assert ask(table, target) is None
    bring(table, 0.55)
    assert ask(table, target)["by"] == "operator" and calls(table) == 1


def bring(table: Table, score: float) -> Path:
    """A score as an operator leaves it."""
    path = table.ground.folder.submitted(RUN.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"score": score, "by": "operator"}))
    return path


def test_a_score_that_was_changed_after_it_was_submitted_is_refused(table):
    """Before the controller records it, and after: by the reviewer too, which reads it again every round."""
    path = bring(table, 0.55)
    table.ledger.append("external-submitted", RUN.key, {"digest": digest_file(path)})
    for changed in (lambda: bring(table, 0.75), path.unlink):
        changed()
        with pytest.raises(ValueError, match=f"{path.name} is not what .* restore"):
            ask(table, ExternalScores(**TARGET))
    bring(table, 0.55)
    assert ask(table, ExternalScores(**TARGET))["score"] == 0.55
    event = table.ledger.find("ended", f"{RUN.key}/external-b").data
    recorded = table.ground.stage_dir(RUN, "external-b") / "reported.json"

    def read() -> dict[str, Any] | None:
        ends, files = {"external-b": event["end"]}, {"external-b": event["files"]}
        return RunFacts(RUN.candidate.id, RUN.seed, recorded.parent.parent, ends, files).reported

    assert read()["score"] == 0.55
    recorded.write_text(recorded.read_text().replace("0.55", "0.75"))
    with pytest.raises(ValueError, match=r"reported.json is not what .* restore"):
        read()


def test_a_score_that_is_awaited_pauses_and_says_so_once(table):
    target = ExternalScores(**TARGET)
    for _ in range(2):
        with pytest.raises(Awaiting, match="1 external score"):
            ask(table, target)
    (event,) = table.ledger.of_kind("external-awaited")
    assert event.data["runs"] == [f"{RUN.key}/external-b"]


# --- the sealed half ---


def test_the_sealed_half_waits_for_an_operators_word(table):
    document = load_campaign(find_campaign("demo")).model_dump(mode="json", by_alias=True)
    del document["open_final"]
    table.campaign = Campaign.parse(document, where="a campaign that does not say when")
    for _ in range(2):
        with pytest.raises(Awaiting, match="open-final"):
            await_opening(table)
    assert state_of(table.ledger) == "awaiting the sealed half"
    order = table.ground.folder.open_final
    order.parent.mkdir(parents=True)
    order.write_text(json.dumps({"by": "somebody"}))
    for _ in range(2):
        await_opening(table)
    (event,) = table.ledger.of_kind("final-opened")
    assert event.data == {"by": "somebody"} and state_of(table.ledger) == "running"
    order.unlink()
    await_opening(table)  # the ledger has it: it opened once


def test_a_campaign_that_must_end_by_itself_opens_it_after_the_last_round(table):
    table.campaign = load_campaign(find_campaign("demo"))
    await_opening(table)
    assert len(table.ledger) == 0


# --- exact for verdicts, released for selection ---


def told_round(objective: str, items: int = 400) -> tuple[ProductCampaign, RoundFacts, dict[tuple[str, int], float]]:
    """A drawn round whose target told one number a run."""
    lab = Laboratory(draw_surface("cue", "told", 4), np.random.default_rng(4), 48)
    campaign = ProductCampaign(lab, Variant(), 4)
    campaign.weights = Weights(campaign.weights.dev, WHOLE_WEIGHT)
    campaign.origin = campaign.origin.replace(replicates={**campaign.origin.replicates, "external": None})
    one = DrawnRound(campaign, campaign._first_policy().replace(objective="dev"))
    one.run_candidates()
    scores = {}
    for name, runs in one.trained.items():
        for trained, drawn in runs:
            if trained is None:
                continue
            score = round(float(trained.accuracies_2F[1].mean()) * items) / items
            scores[name, drawn.seed] = score
            drawn.__dict__["reported"] = {"score": score, "items": items, "step": 0.0}
            drawn.answered.pop("external-a"), drawn.answered.pop("external-b")
    facts = one.facts()
    if objective == "external":
        facts = RoundFacts(**{**vars(facts), "policy": facts.policy.replace(objective="external")})
    return campaign, facts, scores


def mean_of(scores: dict[tuple[str, int], float], name: str) -> float:
    return float(np.mean([score for (one, _), score in scores.items() if one == name]))


def test_verdicts_read_exact_scores_and_the_next_policy_released_ones():
    campaign, facts, scores = told_round("dev")
    evidence = review([facts], campaign.rules, campaign.origin, campaign.weights, [], {})
    selected = next(one for one in evidence.verdicts if one["estimand"] == "selected")
    exact = mean_of(scores, evidence.selected) - mean_of(scores, facts.anchor)
    assert selected["d_external"]["mean"] == pytest.approx(exact, abs=1e-12)
    assert {one["domain"] for one in evidence.verdicts} == {"overall"}
    released_any = unreleased_any = False
    for one in evidence.candidates:
        if one.role != "explorer" or "dev-b" not in one.effects:
            continue
        assert set(one.effects) == {"dev-a", "dev-b", "external"}
        effect, gain = one.effects["external"], mean_of(scores, one.id) - mean_of(scores, facts.anchor)
        if abs(gain) <= effect.se:
            assert effect.mean == 0.0, "within its standard error nothing is released"
            unreleased_any |= gain != 0
        else:
            assert effect.mean == pytest.approx(round(gain * 400) / 400)
            released_any = True
        assert all("external" not in split for run in one.runs for split in run.scores)
        assert all(found.external is None for found in one.domains.values())
    assert released_any and unreleased_any
    following, _ = next_policy(campaign.rules, facts.policy, evidence)
    assert following.round == 2
    assert looks_of_a_round(facts.policy, campaign.rules, evidence, "dev") == campaign.rules.workers


def test_selection_after_the_external_score_ranks_released_scores():
    _, facts, scores = told_round("external")
    campaign, *_ = told_round("external")
    means = a_half_means(facts, campaign.weights)
    base = round(mean_of(scores, facts.anchor) * 400) / 400
    assert set(means) == set(facts.explorers)
    assert sum(mean == pytest.approx(base) for mean in means.values()) >= 1, "what is not apart is told as the anchor's"
    best = max(means, key=lambda name: means[name])
    assert mean_of(scores, best) == max(mean_of(scores, name) for name in means)


def test_a_maximiser_of_dev_reads_dev_whatever_is_searched_for():
    """The A half of a round that searched for the external score is the external one, which it must not read."""
    (campaign, facts, _), (_, later, _) = told_round("dev"), told_round("external")
    before, after = (dev_a_means(one, campaign.weights) for one in (facts, later))
    assert before == after == round_items(facts, campaign.weights).dev_a
    assert after != round_items(later, campaign.weights).dev_a


def test_the_ladders_rule():
    one_item = step_of(ReportedScores({("a", 0): 0.5}, items=400))
    near, far, down = (Estimate(mean, 1e-4, 399.0) for mean in (0.0099, 0.0123, -0.0324))
    assert released(near, one_item).mean == 0 and released(far, one_item).mean == pytest.approx(0.0125)
    assert released(down, one_item).mean == pytest.approx(-0.0325)
    assert released(far, step_of(ReportedScores({("a", 0): 0.5}, items=400, step=0.01))).mean == pytest.approx(0.01)


# --- a campaign that waits ---


@pytest.mark.slow
def test_a_campaign_waits_for_an_operator_and_goes_on(own_ground, variant, tmp_path):
    """Paused with a status of its own, told what is awaited, refused what is wrong, then closed and verified."""
    settings = own_ground.settings()
    settings |= {"claim": "infrastructure", "comparator": None}
    settings["judge"]["external"] = dict(TARGET)
    settings["constitution"] |= {"rounds": 1, "workers": 2, "anchor_seeds": 2, "external_looks": 4}
    file, folder = variant(settings, "told"), tmp_path / "told"
    paused = own_ground.run(folder, file=file)
    assert paused.returncode == AWAITING, paused.stderr
    assert "external list" in paused.stdout + paused.stderr
    status = json.loads(command("status", folder, "--json").stdout)
    assert status["state"] == "paused" and "external score(s) are awaited" in status["paused"]
    listed = json.loads(command("external", "list", folder, "--json").stdout)
    assert {one["state"] for one in listed} == {"awaited"} and len(listed) >= 3
    assert all(Path(one["weights"]).is_dir() for one in listed)
    first = listed[0]["run"]
    for words, named in (
        ((listed[0]["candidate"], "0.5"), "name one of"),
        ((first, "nan"), "between 0 and 1"),
        ((first, "61"), "between 0 and 1"),
        (("nobody", "0.5"), "look was paid"),
    ):
        refused = command("external", "submit", *words, "--dir", folder)
        assert refused.returncode == 1 and named in refused.stderr and len(refused.stderr.strip().splitlines()) == 1
    assert own_ground.run(folder, file=file).returncode == AWAITING
    for place, one in enumerate(listed):
        done = command("external", "submit", one["run"], 0.5 + 0.01 * place, "--dir", folder, "--n", 400, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["awaited"] == len(listed) - 1 - place
    brought = CampaignFolder(folder).submitted(first)
    kept = brought.read_text()
    brought.write_text(kept.replace("0.5", "0.7"))
    with pytest.raises(ValueError, match=f"{brought.name} is not what"):
        submit(folder, first, 0.5)
    assert brought.name in verify_campaign(folder)["first_broken"]["where"]
    brought.write_text(kept)
    again = command("external", "submit", first, "0.5", "--dir", folder)
    assert again.returncode == 0, "the same score once more is no change"
    changed = command("external", "submit", first, "0.6", "--dir", folder)
    assert changed.returncode == 1 and "never changed" in changed.stderr
    closed = own_ground.run(folder, "--json", file=file)
    assert closed.returncode == 0, closed.stderr
    found = json.loads(closed.stdout)
    assert found["state"] == "closed" and found["looks"]["external"] == 2
    assert found["rounds"][0]["candidates"][0]["external"]["n"] == 400
    verified = verify_campaign(folder)
    assert verified["ok"], verified
    late = command("external", "submit", first, "0.6", "--dir", folder)
    assert late.returncode == 1 and "never changed" in late.stderr
    path = next(folder.glob("rounds/1/*/runs/*/external-b/reported.json"))
    path.write_text(path.read_text().replace("0.5", "0.7"))
    assert "reported.json" in verify_campaign(folder)["first_broken"]["where"]
    assert sum(event["kind"] == "external-awaited" for event in events(folder)) == 1
