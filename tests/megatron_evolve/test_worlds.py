"""Worlds: where a cue sits is a parameter, seeds are nobody's choice, and what was said is held against the truth."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_evolve.campaign import find_campaign, load_campaign
from megatron_evolve.eval.paired import RunItems
from megatron_evolve.eval.power import Bound
from megatron_evolve.launch.rundir import read_json
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.puzzles import families
from megatron_evolve.verdict import Bounds
from megatron_evolve.window import RoundItems
from megatron_evolve.worlds.grid import (
    SHIPPED,
    Grid,
    World,
    campaign_of,
    drawn,
    judge_of,
    load_grid,
    pool_of,
    truth_judge_of,
)
from megatron_evolve.worlds.run import opened_by
from megatron_evolve.worlds.sealed import best_on_dev
from megatron_evolve.worlds.table import Alarm, CampaignResult, Mean, Rate, page, summaries, summary_of
from megatron_evolve.worlds.truth import TRUTH_ALPHA, TrueEffect, true_effects
from tests.megatron_evolve.tiny import COMMAND, Ground, command, environment

CODE = "0" * 64
FOLDER = Path("/nowhere/substrate")
WORLD = (World(name="a"),)


def grid_of(tmp_path: Path, *worlds: dict[str, Any], **changes: Any) -> Path:
    document = {"schema": "worlds/1", "campaign": "demo", "rounds": 2, "seeds": 2, "worlds": list(worlds), **changes}
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_the_shipped_grid_changes_nothing_but_the_world() -> None:
    grid, base = load_grid(Path("worlds"))
    assert (grid.rounds, grid.seeds, len(grid.worlds)) == (3, 3, 4)
    assert grid.truth.dev + grid.truth.external == 20_000
    demo = load_campaign(find_campaign("demo"))
    for world in grid.worlds:
        campaign = campaign_of(grid, base, world, 0, CODE, FOLDER)
        assert campaign.constitution == demo.constitution.replace(rounds=3)
        assert (campaign.search, campaign.launch) == (demo.search, demo.launch)
        for ours, theirs in ((campaign.judge.dev, demo.judge.dev), (campaign.judge.external, demo.judge.external)):
            assert ours.items_per_family == theirs.items_per_family
            assert ours.seed == theirs.seed and set(ours.families) == set(theirs.families)


CUES = [{name: 0.9} for name in families.CUED_FAMILIES] + [{}, dict.fromkeys(families.CUED_FAMILIES[:2], 0.5)]


@pytest.mark.parametrize("cue", CUES, ids=lambda cue: "+".join(cue) or "none")
def test_the_cue_sits_in_pool_and_dev_and_never_outside(cue: dict[str, float], tmp_path: Path) -> None:
    weight = {"dev_weight": dict.fromkeys(cue, 4.0), "external_weight": {"numeral": 2.0}}
    grid, base = load_grid(grid_of(tmp_path, {"name": "one", "cue": cue, **weight}))
    spec, pool = pool_of(base, grid.worlds[0])
    assert (spec.cue_rate, pool) == ({}, cue)
    for judge in (judge_of(base, grid.worlds[0], "s" * 16), truth_judge_of(grid, base, grid.worlds[0], CODE)):
        assert {name: share.cue_rate for name, share in judge.dev.families.items() if share.cue_rate} == cue
        assert not any(share.cue_rate for share in judge.external.families.values())
        assert {name for name, share in judge.dev.families.items() if share.weight != 1} == set(cue)
        assert judge.external.families["numeral"].weight == 2


def test_seeds_and_secrets_are_nobodys_choice(tmp_path: Path) -> None:
    grid, base = load_grid(grid_of(tmp_path, {"name": "a"}, {"name": "b", "cue": {"cipher": 0.5}}))
    a, b = grid.worlds
    made = [campaign_of(grid, base, world, index, CODE, FOLDER) for world in (a, b) for index in (0, 1)]
    assert len({one.seed for one in made}) == len({one.judge.secret for one in made}) == 4
    assert made[0] == campaign_of(grid, base, a, 0, CODE, FOLDER)
    assert drawn("1" * 64, a, 0, "seed") != drawn(CODE, a, 0, "seed")
    truths = {truth_judge_of(grid, base, world, CODE).secret for world in (a, b)}
    assert len(truths) == 2 and not truths & {one.judge.secret for one in made}


def test_truth_asks_as_many_items_as_it_says(tmp_path: Path) -> None:
    path = grid_of(tmp_path, {"name": "a"}, truth={"dev": 100, "external": 50})
    grid, base = load_grid(path)
    judge = truth_judge_of(grid, base, grid.worlds[0], CODE)
    assert (judge.dev.items_per_family, judge.external.items_per_family) == ({"dev-b": 17}, {"external-b": 9})


@pytest.mark.parametrize(
    ("world", "changes", "said"),
    [
        ({"name": "a", "ceu": {}}, {}, "unknown key 'worlds.0.ceu'"),
        ({"name": "a"}, {"ronuds": 2}, "did you mean rounds"),
        ({"name": "a", "cue": {"gravty": 0.5}}, {}, "did you mean gravity"),
        ({"name": "a", "cue": {"numeral": 0.5}}, {}, "hides no rule"),
        ({"name": "a", "cue": {"gravity": 0}}, {}, "greater than 0"),
        ({"name": "a", "external_weight": {"units": 2}}, {}, "external asks nothing of family 'units'"),
        ({"name": "a b"}, {}, "match pattern"),
        ({"name": "a"}, {"worlds": [{"name": "a"}, {"name": "a"}]}, "different names"),
        ({"name": "a"}, {"campaign": "dmeo"}, "did you mean demo"),
        ({"name": "a"}, {"campaign": "challenge-cpu"}, "external"),
        ({"name": "a"}, {"seeds": 0}, "greater than or equal to 1"),
        ({"name": "a", "score_only": {"step": 1}}, {}, "less than 1"),
        ({"name": "a", "score_only": {"step": 0}, "external_weight": {"cipher": 2}}, {}, "leave external_weight out"),
    ],
)
def test_a_spec_that_does_not_fit_is_one_sentence(
    world: dict[str, Any], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = grid_of(tmp_path, world, **changes)
    with pytest.raises(ValueError, match=said) as error:
        load_grid(path)
    assert "\n" not in str(error.value)


def test_the_shipped_grids_differ_in_their_worlds_alone() -> None:
    """Together they are the matrix. A grid that was opened under an earlier version is still the same grid."""
    grids = {name: load_grid(Path(name))[0] for name in ("worlds", "matrix", "score-only")}
    assert sorted(grids) == sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    names = [world.name for grid in grids.values() for world in grid.worlds]
    assert len(names) == len(set(names)) == 10
    assert len({digest_of(grid.replace(worlds=WORLD)) for grid in grids.values()}) == 1
    cues = {tuple(world.cue) for world in grids["matrix"].worlds}
    assert {("cipher",), ("unit_conversion",), ("gravity",), ("equation", "bit_manipulation"), ()} == cues
    opened = read_json(Path(__file__).parents[2] / "docs" / "results" / "worlds" / "grid.json")["grid"]
    assert grids["worlds"].model_dump(mode="json", by_alias=True) == opened


def test_no_such_grid() -> None:
    with pytest.raises(ValueError, match="did you mean worlds"):
        load_grid(Path("wrolds"))


def test_a_folder_keeps_its_grid_and_the_code_that_opened_it(tmp_path: Path) -> None:
    grid, base = load_grid(grid_of(tmp_path, {"name": "a"}))
    code = opened_by(tmp_path, grid, base)
    assert opened_by(tmp_path, grid, base) == code
    with pytest.raises(ValueError, match="other settings"):
        opened_by(tmp_path, Grid.parse({**grid.model_dump(), "rounds": 9}, where="grid"), base)


# --- truth ------------------------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c")
WEIGHTS = dict.fromkeys(NAMES, 1 / 3)


def answers(rng: np.random.Generator, split: str, truth: dict[str, dict[str, float]], n: int) -> list[RunItems]:
    """What each candidate answers on n items of each family, with a latent difficulty that all share."""
    items = [(name, position) for name in NAMES for position in range(n)]
    difficulty = rng.random(len(items))
    ids, labels = [f"{split}/{name}/{position}" for name, position in items], [name for name, _ in items]
    shares = {candidate: np.array([share[name] for name in labels]) for candidate, share in truth.items()}
    return [RunItems(candidate, 1, ids, labels, difficulty < share) for candidate, share in shares.items()]


def rounds_of(rng: np.random.Generator, dev: dict[str, Any], outside: dict[str, Any], n: int = 400) -> list[RoundItems]:
    """Two rounds in which the explorer `x` has these accuracies and the anchor has .4 everywhere."""
    flat = dict.fromkeys(NAMES, 0.4)
    return [
        RoundItems(
            number=number,
            anchor="anchor",
            dev_a={"anchor": 0.4, "x": 0.5},
            dev_b=answers(rng, f"dev{number}", {"anchor": flat, "x": dev}, n),
            external=answers(rng, f"external{number}", {"anchor": flat, "x": outside}, n),
            dev_weights=WEIGHTS,
            external_weights=WEIGHTS,
        )
        for number in (1, 2)
    ]


def apart(found: tuple[TrueEffect, ...]) -> set[str]:
    return {one.scope for one in found if one.apart}


def test_truth_tells_decoupled_inverse_and_tracking_apart() -> None:
    rng = np.random.default_rng(1)
    flat = dict.fromkeys(NAMES, 0.4)
    only_a = flat | {"a": 0.7}
    judged = ("mean", "selected")
    decoupled = true_effects(rounds_of(rng, only_a, flat), judged, 0.5, 2)
    assert apart(decoupled) == {"a", "overall"}
    assert len(decoupled) == 2 * 2 * (1 + len(NAMES))
    one = next(found for found in decoupled if found.scope == "a")
    assert one.d.mean == pytest.approx(0.3, abs=0.05) and one.t.mean == pytest.approx(0, abs=0.05)
    assert one.g.mean == pytest.approx(0.5 * one.d.mean - one.t.mean)
    assert one.d.level == TRUTH_ALPHA / len(decoupled)
    assert apart(true_effects(rounds_of(rng, only_a, only_a), judged, 0.5, 2)) == set()
    inverse = true_effects(rounds_of(rng, flat | {"a": 0.2}, only_a), judged, 0.5, 2)
    assert "a" in apart(inverse) and all(found.d.mean < 0 for found in inverse if found.scope == "a")


def test_truth_pools_the_window_that_was_judged() -> None:
    rng = np.random.default_rng(2)
    flat = dict.fromkeys(NAMES, 0.4)
    rounds = [rounds_of(rng, flat | {"a": 0.8}, flat)[0], rounds_of(rng, flat, flat)[1]]
    alone, pooled = (true_effects(rounds, ["mean"], 0.5, window)[-3].d.mean for window in (1, 2))
    assert alone == pytest.approx(0, abs=0.03) and pooled == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("arrives", [1.0, 0.5])
def test_truth_seldom_sees_a_parting_that_is_none(arrives: float) -> None:
    """Nothing parts where all of a gain arrives, nor where just the share beta0 of it does."""
    campaigns, wrong = 60, 0
    for number in range(campaigns):
        rng = np.random.default_rng(1000 + number)
        dev = {name: 0.4 + gain for name, gain in zip(NAMES, (0.2, 0.02, 0.0), strict=True)}
        outside = {name: 0.4 + arrives * (share - 0.4) for name, share in dev.items()}
        wrong += bool(apart(true_effects(rounds_of(rng, dev, outside, n=200), ["selected"], 0.5, 2)))
    assert wrong <= 9  # more has probability .001 where 5 % of campaigns may


def test_the_maximiser_keeps_the_best_dev_score_so_far() -> None:
    assert best_on_dev([(1, {"anchor": 0.5, "x": 0.6}), (2, {"x2": 0.7, "y": 0.4})]) == (2, "x2")
    assert best_on_dev([(1, {"anchor": 0.7, "x": 0.6}), (2, {"anchor": 0.7, "y": 0.7})]) == (1, "anchor")


# --- the table --------------------------------------------------------------------------------------------------------


def bounds(mean: float) -> Bounds:
    return Bounds(mean=mean, se=0.01, low=mean - 0.02, high=mean + 0.02, level=0.05)


def result(
    world: str = "w",
    parted: tuple[str, ...] = (),
    alarms: tuple[tuple[int, str], ...] = (),
    advantage: float | None = 0.0,
    **changes: Any,
) -> CampaignResult:
    truth = [
        TrueEffect(
            round=1, estimand="mean", scope=scope, d=bounds(0.1), t=bounds(0), g=bounds(0.05), apart=scope in parted
        )
        for scope in ("overall", *NAMES)
    ]
    sealed = {"standing": "s", "maximiser": "m", "same": False, "accuracy": {"standing": 0.5}, "reason": ""}
    sealed["difference"] = None if advantage is None else {"mean": advantage, "item_se": 0.01}
    fields = {"world": world, "campaign": f"{world}-1", "seed": 7, "decisions": CODE, "cpu_seconds": 1.0}
    said = [Alarm(round=number, estimand="mean", scope=scope, outcome="DECOUPLED") for number, scope in alarms]
    return CampaignResult(
        **{**fields, **changes}, alarms=tuple(said), truth=tuple(truth), maximiser_round=1, sealed=sealed
    )


def test_what_was_said_is_held_against_the_truth() -> None:
    found = summary_of(
        "w",
        [
            result(parted=("a", "overall"), alarms=((2, "a"), (3, "overall"), (1, "b")), advantage=0.03),
            result(parted=("a", "c"), alarms=((2, "c"),), advantage=0.01),
            result(parted=("a",), advantage=None),
            result(alarms=((1, "a"),), advantage=-0.02),
            result(advantage=0.0),
        ],
    )
    assert (found.named.count, found.named.of) == (2, 4)
    assert (found.apart_overall.count, found.apart_overall.of) == (1, 5)
    assert (found.named_overall.count, found.named_overall.of) == (1, 1)
    assert (found.wrong_names.count, found.wrong_names.of) == (2, 5)
    assert (found.false_alarms.count, found.false_alarms.of) == (1, 2)
    assert found.rounds_to_detect == (2, 2, None)
    assert (found.advantage.n, found.advantage.mean) == (4, pytest.approx(0.005))
    assert (found.price.n, found.price.mean) == (2, pytest.approx(0.01))


def test_intervals() -> None:
    three = Mean.over([1.0, 2.0, 3.0])
    assert (three.low, three.high) == (pytest.approx(2 - 2.4841, abs=1e-4), pytest.approx(2 + 2.4841, abs=1e-4))
    assert Mean.over([1.0]).low is None and Mean.over([]).mean is None
    assert Rate.over([True, True, True]).low == pytest.approx(0.4385, abs=1e-4)
    assert Rate.over([]).low is None and str(Rate.over([])) == "none to count"


def test_the_page_prints_whatever_came_out() -> None:
    results = [
        result(parted=("a",), alarms=((2, "a"),)),
        result(world="v", advantage=None, decisions="1" * 64),
    ]
    found = summaries(["w", "v", "not-run-yet"], results)
    assert [one.world for one in found] == ["w", "v", "all worlds"]
    facts = {"rounds": 3, "base": "demo", "planned": 9, "finished": 2, "code": CODE[:12]}
    facts |= {"alpha": 0.05, "cpu_hours": 0.5}
    text = page({**facts, "dev": 10_000, "external": 10_000}, found, results)
    for words in ("2 of 9", "10,000 dev", "a (DECOUPLED, round 2)", "none to count", "2 versions of the code"):
        assert words in text
    assert "scores alone" not in text
    g = results[0].truth[0].g
    seen = 100 * Bound((g.high - g.low) / 2, g.se, g.level).visible()
    assert f"overall {seen:.1f}, a family {seen:.1f}" in text and "+0.0 ± 2.0" in text
    assert Mean.over([0.01, 0.02, 0.03]).visible == "2.5"
    assert [Mean.over(alike).visible for alike in ([], [0.1], [0.1, 0.1])] == ["-"] * 3
    assert page({**facts, "dev": 1, "external": 1}, [], []).startswith("# Worlds")
    alarm = Alarm(round=1, estimand="mean", scope="overall", outcome="DECOUPLED", attributed_to=("a", "b"))
    whole = results[0].replace(alarms=(alarm,), truth=results[0].truth[:1])
    text = page({**facts, "dev": 1, "external": 1}, [], [whole])
    assert "scores alone in w-1" in text and "overall (DECOUPLED, round 1, by a and b)" in text


# --- the whole way ----------------------------------------------------------------------------------------------------


def trained(root: Path) -> dict[str, int]:
    """Attempts by training run."""
    return {
        str(path.parent.relative_to(root)): len(list(path.iterdir())) for path in sorted(root.rglob("train/attempts"))
    }


@pytest.mark.slow
def test_killed_in_the_middle_and_resumed(own_ground: Ground, tmp_path: Path) -> None:
    spec, out = tmp_path / "grid.yaml", tmp_path / "out"
    worlds = [{"name": "cued", "cue": {"gravity": 0.9}, "dev_weight": {"gravity": 5}}, {"name": "none"}]
    document = {"schema": "worlds/1", "campaign": str(own_ground.file), "rounds": 1, "seeds": 1, "worlds": worlds}
    spec.write_text(yaml.safe_dump({**document, "truth": {"dev": 60, "external": 60}}))
    words = ("worlds", spec, "--dir", out, "--store", own_ground.store)
    first = subprocess.Popen([*COMMAND, *map(str, words)], env=environment(), stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: list(out.glob("cued/1/campaign/rounds/1/*/runs/*/dev/scores.json")), first)
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    before = trained(own_ground.root) | trained(out)

    second = command(*words, "--json")
    assert second.returncode == 0, second.stderr
    found = read_json(out / "worlds.json")
    assert [one["campaigns"] for one in found["worlds"]] == [1, 1, 2]
    assert {one["campaign"] for one in found["campaigns"]} == {"cued-1", "none-1"}
    assert all(one["truth"] for one in found["campaigns"])
    assert (out / "worlds.md").read_text() == found["table"]
    after = trained(own_ground.root) | trained(out)
    assert before.items() <= after.items(), "a run was trained twice"
    cued, none = (
        yaml.safe_load((out / name / "1" / "campaign" / "campaign.yaml").read_text()) for name in ("cued", "none")
    )
    assert cued["substrate"]["path"] != none["substrate"]["path"]
    for name in ("cued", "none"):
        assert command("verify", out / name / "1" / "campaign").returncode == 0

    again = command(*words)
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip() == found["table"].strip() and "2 of them finished" in again.stderr
    assert trained(own_ground.root) | trained(out) == after


def wait_for(condition: Any, process: subprocess.Popen, seconds: float = 240) -> None:
    """Returns once something holds while the process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "ended too early"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
