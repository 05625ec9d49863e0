"""The end of a campaign: the smallest difference that its one comparison could see, printed wherever the gain is."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_evolve.artefacts import CampaignFolder, save_json
from megatron_evolve.budget import Account
from megatron_evolve.campaign import Campaign, ExternalCsv, find_campaign, load_campaign
from megatron_evolve.cli import app
from megatron_evolve.closing import close_campaign, compare, final_comparison, final_survey, finding
from megatron_evolve.comparisons import Weights
from megatron_evolve.contest.surface import ORIGIN, VIEW
from megatron_evolve.desk import Desk
from megatron_evolve.eval.judge import freeze_engine, freeze_judge
from megatron_evolve.eval.looks import Look, Looks
from megatron_evolve.eval.paired import Answers, RunItems
from megatron_evolve.eval.score import ItemRows, write_rows
from megatron_evolve.eval.seeds import RunReplicates
from megatron_evolve.eval.suite import csv_suite
from megatron_evolve.evidence import Evidence, Noise
from megatron_evolve.jobs import Ground, StageEnd
from megatron_evolve.ledger import LEDGER, Ledger, read_ledger
from megatron_evolve.meta import initial_policy
from megatron_evolve.origin import Origin
from megatron_evolve.report import write_report
from megatron_evolve.retries import Paused
from megatron_evolve.standing import SurveyView
from megatron_evolve.terminal import final_table
from tests.megatron_evolve.campaign_folder import build_campaign

N = 300
WEIGHTS = Weights({"a": 1.0}, {"a": 1.0})


def run(name: str, seed: int, correct: np.ndarray) -> RunItems:
    return RunItems(name, seed, np.arange(N), ["a"] * N, correct)


def rolled(share: float) -> list[RunItems]:
    """Eight runs of the origin with the same score on other items: seeds have no luck beyond the items'."""
    return [run("origin", seed, np.roll(np.arange(N) < share * N, 37 * seed)) for seed in range(8)]


def origin_of(runs: list[RunItems]) -> Origin:
    replicates = Answers.of(runs).replicates("origin", range(8))
    told = RunReplicates(replicates, replicates).to_dict()
    return Origin(candidate="origin", seeds=tuple(range(8)), means={}, replicates=told)


def test_the_smallest_visible_difference_has_80_per_cent_power_by_another_computation() -> None:
    """The oracle is statsmodels' paired t test over items; here seeds add nothing, so that it is the whole story."""
    power = pytest.importorskip("statsmodels.stats.power", reason="statsmodels is the oracle").TTestPower()
    rng = np.random.default_rng(5)
    theirs = rolled(0.5)
    mine = [run("standing", seed, rng.random(N) < 0.6) for seed in range(3)]
    found = compare(mine, theirs, origin_of(theirs), WEIGHTS, [])["gain"]
    apart = np.mean([one.correct for one in mine], axis=0) - np.mean([one.correct for one in theirs], axis=0)
    assert found["mean"] == pytest.approx(apart.mean()) and found["se"] == pytest.approx(apart.std(ddof=1) / N**0.5)
    size = found["minimum_detectable_effect"] / apart.std(ddof=1)
    assert power.power(size, N, 0.05, alternative="two-sided") == pytest.approx(0.8, abs=0.003)


def test_it_grows_with_the_luck_of_seeds_and_where_no_item_tells_apart_there_is_no_number() -> None:
    theirs = rolled(0.5)
    mine = [run("standing", seed, one.correct) for seed, one in enumerate(rolled(0.6)[:3])]
    steady = compare(mine, theirs, origin_of(theirs), WEIGHTS, [])["gain"]["minimum_detectable_effect"]
    lucky = [run("origin", seed, np.roll(np.arange(N) < (0.3 + 0.05 * seed) * N, 37 * seed)) for seed in range(8)]
    assert compare(mine, theirs, origin_of(lucky), WEIGHTS, [])["gain"]["minimum_detectable_effect"] > 1.5 * steady
    same = [run("standing", seed, np.ones(N, bool)) for seed in range(3)]
    all_right = [run("origin", seed, np.ones(N, bool)) for seed in range(8)]
    nothing = compare(same, all_right, origin_of(theirs), WEIGHTS, [])
    assert "gain" not in nothing and nothing["accuracy"] == {"standing": 1.0, "origin": 1.0}
    assert "none of 300 sealed items tell the two sides apart, expected 15" in final_table(nothing)
    few = [run("standing", seed, np.arange(N) >= 14) for seed in range(3)]
    assert "only about 14 of 300 sealed items" in final_table(compare(few, all_right, origin_of(theirs), WEIGHTS, []))


def test_report_and_status_print_it_beside_the_gain(tmp_path) -> None:
    folder = build_campaign(tmp_path / "campaign")
    page = re.sub(r"<[^>]+>|\s+", " ", write_report(folder, None).read_text())
    assert re.search(r"Smallest difference it would have seen:\s+3\.6\s+points", page)
    done = CliRunner().invoke(app, ["status", str(folder)])
    shown = " ".join(done.output.split())
    assert done.exit_code == 0 and "smallest visible difference 3.6 pt" in shown and "+4.1 pt [+1.6, +6.7]" in shown


def test_a_campaign_that_was_closed_before_it_was_kept_says_that_it_is_unknown(tmp_path) -> None:
    folder = build_campaign(tmp_path / "campaign")
    final = next(event.data for event in read_ledger(folder / LEDGER) if event.kind == "final")
    gain = {name: value for name, value in final["gain"].items() if name != "minimum_detectable_effect"}
    assert "smallest visible difference unknown" in final_table(json.loads(json.dumps({**final, "gain": gain}))).title
    assert "nothing to compare" in final_table({"standing": "a", "origin": "a", "same": True})
    assert "no run of the origin" in final_table({"failed": "no run of the origin finished and was scored"})


# --- what the campaign found, in one sentence ---


def judged(number: int, **outcomes: str) -> Evidence:
    """A round in which the scopes, by name, were judged so, and nothing else was looked at."""
    names = {"substrate": "s", "judge": "j", "policy": "p", "objective": "dev", "anchor": "a", "selected": None}
    verdicts = tuple({"domain": scope, "outcome": outcome} for scope, outcome in outcomes.items())
    return Evidence(round=number, **names, candidates=(), noise=Noise(), verdicts=verdicts)


BLUE = {1: "UNRESOLVED", 2: "TRACKING"}


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        (
            [judged(1, overall="UNRESOLVED", red="TRACKING"), judged(2, overall="TRACKING"), judged(3, red="TRACKING")],
            "no decoupling found: dev tracked the external target in round 2.",
        ),
        (
            [judged(number, overall="UNRESOLVED", red="TRACKING", blue=blue) for number, blue in BLUE.items()],
            "unresolved: no round could tell whether dev tracks the external target overall, though it does in blue "
            "(round 2), red (rounds 1, 2).",
        ),
        ([judged(1, overall="UNRESOLVED")], "unresolved: no round could tell whether dev tracks the external target."),
        (
            [judged(1, overall="TRACKING"), judged(2, overall="TRACKING", red="DECOUPLED")],
            "dev stopped tracking the external target in red: first said in round 2 (DECOUPLED).",
        ),
    ],
)
def test_a_domain_that_tracks_does_not_speak_for_the_whole(rounds: list[Evidence], said: str) -> None:
    assert finding(load_campaign(find_campaign("demo")), rounds, None) == said


# --- the survey of a CSV whose open rows need a look ---

ROWS = {"final": 6, "open": 4}
CLOSING_ROUND = 2


class Answering(Desk):
    """A desk whose jobs end at once: every item is answered, right or wrong in turn. The rest is the product's."""

    def drive(self, stages, after=lambda end: (), ground=None):
        for run, stage in stages:
            place = self.ground.stage_dir(run, stage)
            place.mkdir(parents=True)
            if stage == "train":
                save_json(place / "result.json", {})
            else:
                save_json(place / "scores.json", {})
                write_rows(place / "scores.parquet", answers(stage))
            end = StageEnd(run, stage, "finished", "", cpu_seconds=1.0, seconds=1.0, attempts=1)
            self.record(end, self.ground)
            yield end


def answers(stage: str) -> ItemRows:
    count = ROWS[stage]
    flags = [place % 2 == 0 for place in range(count)]
    return ItemRows(
        [str(place) for place in range(count)],
        *([one] * count for one in ("a", "a1", stage)),
        *[flags] * 4,
        [3] * count,
        [""] * count,
    )


def freeze_target(campaign: Campaign, target: ExternalCsv, folder: Path) -> None:
    """Writes a CSV of one family where the target says, and freezes a judge on it."""
    Path(target.path).write_text("id,prompt,answer\n" + "".join(f"r{n},question {n},{n}\n" for n in range(40)))
    suite, spec = csv_suite(Path(target.path), dict(target.items), sealed=target.sealed), campaign.judge
    engine = freeze_engine(spec.engine, "0.1.0")
    freeze_judge(folder, dev=spec.dev, external=suite, engine=engine, secret=spec.secret)


def desk_with(root: Path, budget: int, spent: int) -> Answering:
    campaign = load_campaign(find_campaign("demo"))
    target = ExternalCsv(path=str(root / "t.csv"), items={"external-a": 2, "external-b": 2})
    if not (root / "judge").exists():
        freeze_target(campaign, target, root / "judge")
    folder = CampaignFolder(root)
    looks = Looks(folder.looks, external_budget=budget)
    for number in range(spent):
        asked = {"candidates": (f"c{number}",), "runs": (f"1/c{number}/7",), "purpose": "judge", "item_set": "i"}
        looks.pay(Look(**asked, split="external-b", round=1, items=2))
    looks.pay(
        Look(candidates=("s", "o"), runs=("2/s/7",), purpose="end", item_set="i", split="final", round=2, items=6)
    )
    theirs = rolled(0.5)
    return Answering(
        campaign=campaign.replace(judge=campaign.judge.replace(external=target)),
        ground=Ground(folder, root, root / "judge", 10.0),
        ledger=Ledger(root),
        looks=looks,
        launcher=None,
        substrate_view=VIEW,
        substrate_digest=VIEW["digest"],
        judge_digest="j",
        origin=origin_of(theirs),
        origin_settings=ORIGIN,
        suites={"items": ROWS, "weights": {"dev": {"a": 1.0}, "external": {"a": 1.0}}},
        on_progress=lambda what, facts: None,
        stop=lambda: False,
    )


@pytest.mark.parametrize(("budget", "spent", "asked"), [(5, 4, True), (4, 4, False), (0, 0, False)])
def test_a_budget_that_the_rounds_have_spent_closes_without_the_open_rows(tmp_path, budget, spent, asked) -> None:
    """4 rounds x 8 candidates x 2 halves is the default budget exactly: no look need be left for the survey."""
    desk = desk_with(tmp_path, budget, spent)
    moved = ORIGIN.replace(recipe=ORIGIN.recipe.replace(lr=2 * ORIGIN.recipe.lr))
    policy = initial_policy(moved, {}, desk.campaign.constitution).replace(round=CLOSING_ROUND)
    found = final_survey(desk, policy)
    assert found["items"] == ROWS["final"] + asked * ROWS["open"]
    assert found.get("unasked") == (None if asked else ["open"])
    assert found["runs"] == desk.campaign.constitution.anchor_seeds
    assert desk.looks.spent == spent + asked
    again = Looks(desk.looks.path, external_budget=budget)
    assert final_survey(Answering(**{**vars(desk), "looks": again}), policy) == found, "as a campaign that goes on does"
    SurveyView.parse(found, where="the survey of `status --json`")


def test_a_target_that_went_while_the_closing_trained_pauses_before_the_sealed_half_is_paid(tmp_path: Path) -> None:
    desk = desk_with(tmp_path, 5, 0)
    desk = Answering(**{**vars(desk), "looks": Looks(tmp_path / "unpaid.jsonl", external_budget=5)})
    moved = ORIGIN.replace(recipe=ORIGIN.recipe.replace(lr=2 * ORIGIN.recipe.lr))
    policy = initial_policy(moved, {}, desk.campaign.constitution).replace(round=CLOSING_ROUND)
    (tmp_path / "t.csv").rename(tmp_path / "away.csv")
    with pytest.raises(Paused, match=r"before a look was paid, expected .*t\.csv, found no file: restore it"):
        final_comparison(desk, policy)
    assert not desk.looks.path.exists() and any(event.key.endswith("/train") for event in desk.ledger)


@pytest.mark.parametrize("due", [True, False])
def test_a_budget_that_the_closing_spends_pays_for_no_look(tmp_path: Path, due: bool) -> None:
    """The sealed look was paid though nothing could be started; and a controller that started then made no final."""
    desk = desk_with(tmp_path, 5, 4)
    looks = Looks(tmp_path / "unpaid.jsonl", external_budget=5)
    desk = Answering(**{**vars(desk), "looks": looks, "account": Account(spent="8 of 8 GPU-hours are used")})
    if due:  # said when the rounds had ended; the closing's own training spent the rest
        desk.ledger.append("final-due", "", {"due": True})
    moved = ORIGIN.replace(recipe=ORIGIN.recipe.replace(lr=2 * ORIGIN.recipe.lr))
    closed = close_campaign(desk, initial_policy(moved, {}, desk.campaign.constitution).replace(round=CLOSING_ROUND))
    failed = "no run of the standing settings finished and was scored"
    assert (closed["final"] or {}).get("failed") == (failed if due else None)
    assert not looks.path.exists()
