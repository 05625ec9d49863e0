"""The contest with real training: what is shared is trained once and paid by all, and a killed attempt goes on.

Jobs are replaced by a function that draws a run from a surface and leaves the files that a job leaves; the slow test at
the end trains.
"""

import json
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.campaign import load_campaign
from megatron_evolve.contest import real
from megatron_evolve.contest.moves import origin_point, point
from megatron_evolve.contest.protocol import METHODS, PRODUCT
from megatron_evolve.contest.real import THAT_MATTER, RealGround, drawn, run_real
from megatron_evolve.contest.real_table import figures, page
from megatron_evolve.contest.sealed_half import SealedHalf
from megatron_evolve.contest.shared_runs import SEARCHED, SHIPPED, SharedGround, SharedRuns, asked_by
from megatron_evolve.contest.space import Spent, demo
from megatron_evolve.contest.surface import FAMILIES, ORIGIN, draw_surface
from megatron_evolve.contest.workshop import Workshop
from megatron_evolve.eval.score import ItemRows, answer_row, write_rows
from megatron_evolve.eval.suite import Item
from megatron_evolve.jobs import ROWS_FILE, Ground, StageEnd
from megatron_evolve.launch.rundir import make_folder
from megatron_evolve.origin import ORIGIN_ROUND
from megatron_evolve.sources import policy_sources
from megatron_evolve.substrate.settings import write

WITHOUT_OPTUNA = [name for name in THAT_MATTER if not name.startswith("TPE")]
SECONDS = {"train": 20.0, "dev": 2.5, "external-a": 0.75, "external-b": 0.75, "final": 1.5}
SPLITS_OF = {"dev": ("dev-a", "dev-b")}
PER_FAMILY = 40


class Jobs:
    """In place of jobs: draws from a surface what they would leave. `asked` counts them; after `limit` it dies."""

    def __init__(self, limit=None, ends_as="finished"):
        self.surface = draw_surface("cue", "real", 1)
        self.asked, self.limit, self.ends_as = Counter(), limit, ends_as
        self.folders = {}

    def __call__(self, ground, run, stage):
        if self.limit is not None and self.asked.total() >= self.limit:
            raise KeyboardInterrupt
        folder = ground.stage_dir(run, stage)
        assert self.folders.setdefault(f"{run.key}/{stage}", folder) == folder, "a launcher's key names one folder"
        make_folder(folder)
        self.asked[str(folder)] += 1
        if stage != "train":
            write_rows(folder / ROWS_FILE, ItemRows.of(list(self.answers(run, stage))))
        return StageEnd(run, stage, self.ends_as if stage == "train" else "finished", "", SECONDS[stage], 1.0, 1)

    def answers(self, run, stage):
        """An item is known to all who are good enough for it; the seed moves how good a run is."""
        settings = run.candidate.settings
        luck = np.random.default_rng(run.seed).normal(0, 0.03)
        dev, outside = self.surface.accuracies(self.surface.learnt(settings))
        for split in SPLITS_OF.get(stage, (stage,)):
            hard = np.random.default_rng([run.round, len(split), ord(split[-1])]).random((len(FAMILIES), PER_FAMILY))
            accuracy_F = (dev if split.startswith("dev") else outside) + luck
            for name, accuracy, row in zip(FAMILIES, accuracy_F, hard, strict=True):
                for place, value in enumerate(row):
                    item = Item(id=f"{name}/{run.round}-{place}", family=name, subfamily=name, prompt="?", answer="1")
                    yield answer_row(
                        item, split, r"\boxed{1}" if value < accuracy else r"\boxed{2}", truncated=False, num_tokens=1
                    )


def ground_of(root, jobs, number=1, rounds=1):
    """A ground whose jobs are `jobs`; each has a launcher of its own."""
    jobs.folders = {}
    campaign = demo().replace(constitution=demo().constitution.replace(rounds=rounds), seed=number)
    space = replace(jobs.surface.space, campaign=campaign)
    ours = SharedGround(CampaignFolder(root / f"campaign-{number}"), root, root, 60.0)
    theirs = Ground(CampaignFolder(root / "origin"), root, root, 60.0)
    shared, frozen, fresh, again = (
        SharedRuns(one, space.substrate, number, jobs)
        for one in (ours, theirs, *(asked_by(one, root, root / "sealed" / str(number)) for one in (ours, theirs)))
    )
    seeds = tuple(range(8))
    half = SealedHalf(space, fresh, again, seeds, 3)
    tour = real.Tour(root, root, {"phase": "development"}, campaign, lambda line: None, lambda: False)
    return RealGround(tour, number, space, shared, frozen, seeds, half, "judge")


def workshop(ground, budget=12):
    return Workshop(ground.space, np.random.default_rng(0), budget, ground.shared, ground.frozen, ground.frozen_seeds)


@pytest.fixture
def attempt(monkeypatch):
    """Runs an attempt on drawn jobs."""

    def run(root, jobs, *, campaigns=2, methods=WITHOUT_OPTUNA, phase="development", rounds=1):
        @contextmanager
        def prepared(tour, number):
            yield ground_of(root, jobs, number, rounds)

        monkeypatch.setattr(real, "prepared_ground", prepared)
        return run_real(root, root / "store", demo(), phase, campaigns, rounds, methods)

    return run


# --- shared runs ---


def test_a_run_that_two_methods_try_is_trained_once_and_paid_by_both(tmp_path):
    jobs = Jobs()
    ground = ground_of(tmp_path, jobs)
    labs = [workshop(ground) for _ in range(2)]
    scores = []
    for lab in labs:
        runs = [lab.train(ORIGIN), lab.train(ORIGIN), lab.train(write(ORIGIN, "recipe.steps", 200))]
        scores.append([lab.score(one, lab.sheet(split)) for one in runs for split in ("dev", "external-a")])
    assert scores[0] == scores[1] and len(set(scores[0])) == 6
    assert set(jobs.asked.values()) == {1} and jobs.asked.total() == 3 * 3
    for lab in labs:
        assert (lab.runs, lab.looks, lab.seconds) == (3, 3, 3 * (20 + 2.5 + 0.75))


def test_rounds_ask_other_items_of_the_same_run(tmp_path):
    lab = workshop(ground_of(tmp_path, Jobs()))
    run = lab.train(ORIGIN)
    sheets = [lab.sheet("dev-a", number) for number in (1, 2)]
    answers = [lab.answers(run, sheet) for sheet in sheets]
    assert answers[0].dtype == bool and (answers[0] != answers[1]).any()
    assert not set(sheets[0].ids_n) & set(sheets[1].ids_n)
    halves = [lab.sheet(split) for split in ("dev-a", "dev-b")]
    whole = lab.sheet("dev")
    assert np.concatenate([lab.answers(run, one) for one in halves]).tolist() == lab.answers(run, whole).tolist()


def test_the_budget_is_enforced_and_weights_are_never_handed_on(tmp_path):
    lab = workshop(ground_of(tmp_path, Jobs()), budget=1)
    run = lab.train(ORIGIN)
    with pytest.raises(ValueError, match="never inherit"):
        lab.train(ORIGIN, run)
    with pytest.raises(Spent):
        lab.train(ORIGIN)


def test_a_run_without_weights_costs_and_a_broken_machine_is_no_ending(tmp_path):
    lab = workshop(ground_of(tmp_path / "diverged", jobs := Jobs(ends_as="diverged")))
    assert lab.train(ORIGIN) is None and (lab.failed, lab.seconds) == (1, 20.0)
    lab = workshop(ground_of(tmp_path / "lost", jobs := Jobs(ends_as="lost")))
    with pytest.raises(ValueError, match="lost in train"):
        lab.train(ORIGIN)
    jobs.ends_as = "finished"
    assert lab.train(ORIGIN) is not None


def test_the_sealed_half_asks_fresh_runs_against_the_origins(tmp_path):
    """By hand: mean over fresh runs less mean over the origin's eight; the settings of the origin ship as any other."""
    ground = ground_of(tmp_path, jobs := Jobs())
    for settings in (write(ORIGIN, "recipe.steps", 200), ORIGIN):
        found = ground.sealed.measure(settings)
        outside = found["external"]
        assert found["fresh_runs"] == 3 and len(outside["origin"]) == 8
        by_hand = np.mean(outside["shipped"]) - np.mean(outside["origin"])
        assert outside["gain"] == pytest.approx(by_hand) and outside["item_se"] > 0
    seeds = {
        purpose: {ground.shared.run_of(ORIGIN, purpose, place).seed for place in range(50)}
        for purpose in (SEARCHED, SHIPPED)
    }
    assert not seeds[SEARCHED] & seeds[SHIPPED]
    assert not any("/external" in path or "/dev-" in path for path in jobs.asked), "no item of the search's judge"


def test_the_policy_gets_what_a_campaign_would(tmp_path):
    """Frozen origin runs under the judge's own round, three anchors, looks within the budget, verdicts kept."""
    ground = ground_of(tmp_path, jobs := Jobs(), rounds=2)
    row = ground.campaign_of(PRODUCT)
    assert row["runs"] <= 24 and 0 < row["looks"] <= 64
    assert {one["round"] for one in row["verdicts"]} == {1, 2}
    origin = [path for path in jobs.asked if path.startswith(str(tmp_path / "origin"))]
    assert len(origin) == 8 * 3 and not any(path.endswith("train") for path in origin)
    assert all(f"rounds/{ORIGIN_ROUND}/" in path for path in origin)


# --- the protocol ---


@pytest.mark.slow
def test_a_killed_attempt_goes_on_and_trains_nothing_twice(tmp_path, attempt):
    names, whole_jobs = [PRODUCT, "random search"], Jobs()
    whole = attempt(tmp_path / "whole", whole_jobs, methods=names)
    part_jobs = Jobs(limit=whole_jobs.asked.total() // 3)
    with pytest.raises(KeyboardInterrupt):
        attempt(tmp_path / "part", part_jobs, methods=names)
    part_jobs.limit = None
    assert attempt(tmp_path / "part", part_jobs, methods=names) == whole
    assert set(part_jobs.asked.values()) == {1} and part_jobs.asked.total() == whole_jobs.asked.total()
    assert [(row["campaign"], row["method"]) for row in whole] == [(n, name) for n in (1, 2) for name in names]
    assert attempt(tmp_path / "part", Jobs(limit=0), methods=names) == whole, "a finished attempt asks nothing"


def test_a_row_counts_shared_runs_as_if_its_method_had_trained_them(tmp_path, attempt):
    names = ["greedy on dev", "random search"]
    both, alone = (
        attempt(tmp_path / "both", Jobs(), methods=names),
        attempt(tmp_path / "alone", Jobs(), methods=names[1:]),
    )
    assert both[1::2] == alone
    assert all(row["runs"] == 12 and row["cpu_seconds"] >= 12 * 22.5 for row in both)


def test_optuna_on_real_runs(tmp_path, attempt):
    pytest.importorskip("optuna", reason="optuna is a rival, not a dependency")
    rows = attempt(tmp_path, Jobs(), methods=["TPE on external"])
    assert all((row["runs"], row["looks"]) == (12, 12) for row in rows)


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path, attempt, monkeypatch):
    for methods, sentence in ((["fork from winner"], "hands weights on"), (["luck"], "expected a method")):
        with pytest.raises(ValueError, match=sentence):
            attempt(tmp_path, Jobs(), methods=methods)
    with pytest.raises(ValueError, match="at least 2 campaigns"):
        attempt(tmp_path, Jobs(), campaigns=1)
    attempt(tmp_path, Jobs(), methods=["random search"])
    with pytest.raises(ValueError, match="holds an attempt with rounds 1, now it is 2"):
        attempt(tmp_path, Jobs(), rounds=2)
    monkeypatch.setattr(real, "deciding_sources", lambda: "another")
    with pytest.raises(ValueError, match="a frozen policy is run once"):
        attempt(tmp_path, Jobs())


def test_held_out_seeds_follow_from_the_code_and_the_base_campaign():
    def seeds(phase, code, base="demo"):
        attempt = {"phase": phase, "code": code, "base": base}
        return [drawn(attempt, 1, purpose) for purpose in ("seed", "judge", "sealed", PRODUCT)]

    assert seeds("development", "one") == seeds("development", "two", "another")
    all_three = seeds("held-out", "one") + seeds("held-out", "two") + seeds("held-out", "one", "another")
    assert len(set(all_three)) == 12
    assert not {"contest/table.py", "contest/real_table.py"} & set(policy_sources())
    assert "contest/real.py" in policy_sources()


def test_the_origin_is_a_point_of_the_space():
    optuna = pytest.importorskip("optuna", reason="optuna is a rival, not a dependency")
    space = draw_surface("cue", "real", 2).space
    trial = optuna.trial.FixedTrial(origin_point(space))
    assert point(trial, space) == space.origin


# --- figures ---


def a_row(method, campaign, gain, verdicts=()):
    side = {"item_se": 0.01}
    costs = {"runs": 24, "failed": 0, "looks": 10 if method == PRODUCT else 0, "cpu_seconds": 500.0}
    row = {"method": method, "campaign": campaign, "gain": gain, "dev_gain": gain + 0.02, "verdicts": list(verdicts)}
    return row | costs | {"sealed": {"external": side, "dev": side}}


def test_intervals_are_students_over_campaigns_and_paired_by_number():
    """The oracle is scipy's one-sample t interval."""
    gains = {PRODUCT: (0.10, 0.14, 0.15), "greedy on dev": (0.07, 0.12, 0.11)}
    verdict = {"round": 2, "estimand": "selected", "domain": "equation", "outcome": "DECOUPLED"}
    rows = [
        a_row(name, n, gain, [verdict] if name == PRODUCT else [])
        for name, own in gains.items()
        for n, gain in enumerate(own)
    ]
    best, other = figures(rows)
    for found, values in (
        (best["gain"], gains[PRODUCT]),
        (other["against"], np.subtract(gains["greedy on dev"], gains[PRODUCT])),
    ):
        low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (found["mean"], found["low"], found["high"]) == pytest.approx((np.mean(values), low, high))
    assert best["against"] is None and other["gain_per_look"] is None
    assert best["gain_per_look"]["mean"] == pytest.approx(np.mean(gains[PRODUCT]) / 10)
    told = page([best, other])
    assert f"] | {50 * (other['against']['high'] - other['against']['low']):.1f} |" in told
    assert "*Smallest visible* is half the width" in told
    assert "round 2: DECOUPLED (selected, equation)" in told and "| +10.0 ± 2.0 (dev +12.0) |" in told
    assert json.loads(json.dumps(best)) == best
    assert set(METHODS) > {row["method"] for row in rows}


# --- really ---


@pytest.mark.slow
def test_real_training_end_to_end(ground, tmp_path):
    """Random search and the sealed half on the tiny ground; the second start finds everything."""
    campaign = load_campaign(ground.file)
    rules = campaign.constitution.replace(workers=2, anchor_seeds=1)
    few = campaign.search.replicates.replace(confirm_candidates=0, confirm_seeds=0)
    base = campaign.replace(constitution=rules, search=campaign.search.replace(replicates=few))
    rows = run_real(tmp_path, ground.store, base, "development", 2, 1, ["random search"])
    assert [row["runs"] for row in rows] == [2, 2]
    assert all(row["cpu_seconds"] > 0.1 and -1 < row["gain"] < 1 and row["failed"] == 0 for row in rows)
    endings = sorted(tmp_path.rglob("ending.json"))
    assert run_real(tmp_path, ground.store, base, "development", 2, 1, ["random search"]) == rows
    assert sorted(tmp_path.rglob("ending.json")) == endings
