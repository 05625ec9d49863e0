"""Calibration: pairings that share no run within, intervals that know how few runs there are, and the whole command."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_evolve.audit import open_record
from megatron_evolve.calibrate import MOST_TRIALS, Sides, false_accepts, measured_noise, words
from megatron_evolve.campaign import ExternalScores
from megatron_evolve.cli import app
from megatron_evolve.contest.space import demo
from megatron_evolve.eval.paired import RunItems

N = 200


def runs(seed, count):
    """Runs of one candidate on the same items."""
    rng = np.random.default_rng(seed)
    known = rng.random(N) < 0.6
    return [
        RunItems("origin", run, np.arange(N), ["a"] * N, np.where(rng.random(N) < 0.3, rng.random(N) < 0.6, known))
        for run in range(count)
    ]


def better(mine, anchors):
    return np.mean([run.correct for run in mine]) > np.mean([run.correct for run in anchors])


@pytest.mark.parametrize("runs", range(6, 17))
@pytest.mark.parametrize("sides", [Sides(1, 2), Sides(2, 3), Sides(3, 3)])
def test_in_the_pairings_every_run_stands_equally_often_on_each_side(sides, runs):
    """Whatever the number of runs: a fixed stride over all pairings left two of twelve runs no anchor ever."""
    trials = sides.trials(runs)
    assert trials == sides.trials(runs) and len(set(trials)) == len(trials)
    assert all(len({*mine, *theirs}) == sides.explorer + sides.anchor for mine, theirs in trials)
    everything = math.perm(runs, sides.explorer) * math.comb(runs - sides.explorer, sides.anchor)
    assert min(everything, MOST_TRIALS - runs + 1) <= len(trials) <= MOST_TRIALS
    selected_on, explorers, anchors = (
        np.bincount([run for trial in trials for run in part(trial)], minlength=runs)
        for part in (lambda trial: trial[0][:1], lambda trial: trial[0], lambda trial: trial[1])
    )
    assert {*selected_on} == {len(trials) // runs}
    assert {*explorers} == {len(trials) * sides.explorer // runs}
    assert {*anchors} == {len(trials) * sides.anchor // runs}


def test_few_runs_are_paired_in_every_way():
    assert len(Sides(1, 1).trials(3)) == 6 and Sides(1, 1).trials(1) == []
    assert len(Sides(2, 3).trials(6)) == 120


def test_gates_that_know_only_chance_pass_half_and_say_how_little_that_tells():
    found = false_accepts(runs(1, 8), Sides(1, 3), better)
    assert found["low"] < 0.5 < found["high"] and found["high"] - found["low"] > 0.2
    always, never = (false_accepts(runs(1, 8), Sides(1, 3), lambda mine, anchors, it=it: it) for it in (True, False))
    assert (always["rate"], never["rate"]) == (1.0, 0.0)
    # Eight runs hold two pairings without overlap: nothing seen is not much to go by.
    assert never["high"] == pytest.approx(0.658, abs=1e-3) and always["low"] == pytest.approx(1 - 0.658, abs=1e-3)


def test_the_interval_covers():
    """Of 60 calibrations of a gate that passes half, the 95 % interval misses in at most 9 (probability .01 at 8 %)."""
    missed = 0
    for seed in range(60):
        found = false_accepts(runs([2, seed], 6), Sides(1, 2), better)
        missed += not found["low"] <= 0.5 <= found["high"]
    assert missed <= 9


TELLS_SCORES = ExternalScores(kind="reported", items=1200, step=0.01)


@pytest.mark.parametrize(("target", "why"), [(TELLS_SCORES, "tells scores alone"), (None, "no external target")])
def test_why_nothing_is_simulated_is_said(target, why):
    """Before any run is looked at: such a target has no noise to measure."""
    campaign = demo().replace(claim="infrastructure", judge=demo().judge.replace(external=target))
    found = measured_noise(SimpleNamespace(campaign=campaign))
    assert why in found
    told = words({"runs": {}, "noise": None, "simulated": None, "not_simulated": found})
    assert told == f"not simulated: {found}"


@pytest.mark.slow
def test_calibrate_and_verify_eval_of_a_campaign(ground, monkeypatch):
    runner = CliRunner()
    done = runner.invoke(app, ["calibrate", str(ground.finished), "--campaigns", "20", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    for split, items in (("dev", 60), ("external", 60)):
        one = found["runs"][split]
        assert (one["runs"], one["items"], one["explorer_runs"], one["anchor_runs"]) == (8, items, 2, 2)
        assert one["copy_of_the_anchor"]["ok"] and one["seed_df"] >= 2
        assert one["gain_at_5_per_cent"]["low"] <= 0.05, "more gains than chance may bring"
    assert found["simulated"]["campaigns"] == 20 and 0 <= found["noise"]["redraw"] <= 1
    text = runner.invoke(app, ["calibrate", str(ground.finished), "--campaigns", "20"]).stdout
    assert "a copy of the anchor: P(better) 0.50" in text and "campaigns with an alarm" in text

    record = open_record(ground.finished)
    judge = record.campaign.judge.replace(external=TELLS_SCORES)
    with monkeypatch.context() as patched:
        told = replace(record, campaign=record.campaign.replace(claim="infrastructure", judge=judge))
        patched.setattr("megatron_evolve.calibrate.open_record", lambda root: told)
        text = runner.invoke(app, ["calibrate", str(ground.finished)]).stdout
    assert text.splitlines()[-1].startswith("not simulated: the target tells scores alone") and "external" not in text

    done = runner.invoke(app, ["verify-eval", str(ground.finished), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["ok"] and "nano is exempt" in found["leakage"]["exempt"]
    text = runner.invoke(app, ["verify-eval", str(ground.finished)]).stdout
    assert "ok    gold           1.000, must be 1.000" in text and "headroom dev-b" in text
    assert "leakage not checked: nano is exempt" in text


def test_what_cannot_be_calibrated_is_said(tmp_path):
    done = CliRunner().invoke(app, ["calibrate", str(tmp_path)])
    assert done.exit_code == 1 and "campaign" in done.stderr
    done = CliRunner().invoke(app, ["verify-eval", str(tmp_path)])
    assert done.exit_code == 1 and "expected a frozen judge or a campaign" in done.stderr
