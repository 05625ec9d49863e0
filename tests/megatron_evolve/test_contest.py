"""The contest: surfaces part where they say, every method keeps its budget, and an attempt is run once, under one code.

The product's side has no decision of its own to test: it is the product's functions. What is tested is that they get
what a campaign would give them.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_evolve.cli import app
from megatron_evolve.comparisons import SPLITS, Comparisons, seeds_of
from megatron_evolve.contest import protocol
from megatron_evolve.contest.laboratory import Laboratory, Spent
from megatron_evolve.contest.moves import Mutation
from megatron_evolve.contest.product import DrawnRound, ProductCampaign, Variant
from megatron_evolve.contest.protocol import METHODS, PRODUCT, open_attempt, run_attempt, surfaces_of
from megatron_evolve.contest.space import demo
from megatron_evolve.contest.surface import FAMILIES, KINDS, ORIGIN, draw_surface
from megatron_evolve.contest.table import figures, page, plot
from megatron_evolve.contest.unanchored import UnanchoredCampaign
from megatron_evolve.edits import check_edits
from megatron_evolve.eval.paired import effect
from megatron_evolve.eval.seeds import SeedPool
from megatron_evolve.meta import next_policy
from megatron_evolve.review import round_items
from megatron_evolve.sources import policy_sources
from megatron_evolve.substrate.settings import write, write_all

RIVALS = [name for name in METHODS if name not in (PRODUCT, "no anchor", "no dead ends", "no replicates")]
RESULTS = Path(__file__).parents[2] / "docs" / "results"
WITHOUT_OPTUNA = [name for name in RIVALS if not name.startswith("TPE")]


def laboratory(kind="no-shift", seed=1, budget=48):
    return Laboratory(draw_surface(kind, "test", seed), np.random.default_rng(seed), budget)


# --- surfaces ---


@pytest.mark.parametrize("kind", KINDS)
def test_dev_and_the_target_part_where_the_kind_says_and_nowhere_else(kind):
    """More rows of a parted domain: dev rises there by more than the target, elsewhere both move alike."""
    for seed in range(20):
        surface = draw_surface(kind, "test", seed)
        assert len(surface.parted) == {"no-shift": 0, "cue": 1, "cue-light": 1, "two-cues": 2}[kind]
        for place, name in enumerate(FAMILIES):
            more = surface.learnt(write(ORIGIN, f"mix.weight.{name}", 0.5))
            (dev, outside), before = surface.accuracies(more), surface.accuracies(surface.learnt(ORIGIN))
            gained = dev[place] - before[0][place], outside[place] - before[1][place]
            if name in surface.parted:
                assert gained[0] > gained[1]
                assert gained[0] > 0
            else:
                assert np.sign(gained[0]) == np.sign(gained[1]) or max(map(abs, gained)) < 0.01


def test_settings_interact_and_ceilings_hold():
    """The best rate depends on the length of a run, a trace on the rows, and nobody passes the ceiling."""
    surface = draw_surface("no-shift", "test", 3)

    def skill(**changes):
        return surface.learnt(write_all(ORIGIN, {f"recipe.{name}": value for name, value in changes.items()})).skill_F

    alone = skill(lr=6e-3) + skill(steps=200) - 2 * skill()
    assert np.abs(skill(lr=6e-3, steps=200) - skill() - alone).max() > 0.01
    everything = write_all(ORIGIN, {"recipe.steps": 1_000_000})
    assert (surface.accuracies(surface.learnt(everything))[1] <= surface.ceiling_F).all()
    assert surface.does_diverge(write(ORIGIN, "recipe.lr", 0.1)) and not surface.does_diverge(ORIGIN)
    assert draw_surface("cue", "test", 3).parted != draw_surface("cue", "test", 4).parted


def test_runs_of_one_candidate_differ_by_as_much_as_measured():
    """Luck over all domains 1.25 pt, flips as the noise says; each within four standard errors."""
    lab = laboratory()
    runs = lab.origin_runs(ORIGIN, 400)
    w = np.full(len(FAMILIES), 1 / len(FAMILIES))
    dev, outside = (np.array([run.accuracies_2F[split] @ w for run in runs]) for split in (0, 1))
    assert dev.std() == pytest.approx(lab.noise.seed_sd, rel=4 / np.sqrt(800))
    assert np.corrcoef(dev, outside)[0, 1] == pytest.approx(0.9, abs=0.05)
    sheet = lab.sheet("dev")
    first, second = (lab.answers(runs[0], sheet) for _ in range(2))
    accuracy = runs[0].accuracies_2F[0]
    expected = (2 * accuracy * (1 - accuracy) * (1 - (1 - lab.noise.redraw) ** 2)).mean()
    assert (first != second).mean() == pytest.approx(expected, abs=4 * np.sqrt(0.2 / 2400))


# --- methods ---


@pytest.mark.parametrize("name", [PRODUCT, "no anchor", "no dead ends", "no replicates", *WITHOUT_OPTUNA])
def test_every_method_spends_the_same_runs_and_no_more_looks(name):
    lab = laboratory("cue", 2)
    shipped = METHODS[name](lab)
    assert lab.left >= 0 and lab.runs > 40 and lab.looks <= 64
    assert lab.looks == 0 or name in (PRODUCT, "no anchor", "no dead ends", "no replicates")
    assert not lab.surface.does_diverge(shipped.settings)


@pytest.mark.parametrize("name", [name for name in RIVALS if name.startswith("TPE")])
def test_optuna_spends_the_same_runs(name):
    pytest.importorskip("optuna", reason="optuna is a rival, not a dependency")
    lab = laboratory("cue", 2, budget=15)
    METHODS[name](lab)
    assert lab.left == 0 and lab.looks == (15 if name == "TPE on external" else 0)


def test_the_budget_is_enforced():
    lab = laboratory(budget=2)
    lab.train(ORIGIN), lab.train(ORIGIN)
    with pytest.raises(Spent):
        lab.train(ORIGIN)


def test_a_round_gives_the_reviewer_what_a_campaign_would():
    """Pointers of every edit resolve in the evidence, and each effect is the paired one of the runs themselves."""
    campaign = ProductCampaign(laboratory("cue", 5), Variant(), 5)
    policy = campaign._first_policy()
    one = DrawnRound(campaign, policy)
    one.run_candidates()
    facts = one.facts()
    evidence = campaign._evidence(facts, {})
    following, edits = next_policy(campaign.rules, policy, evidence)
    check_edits(policy, following, edits, evidence)
    assert len(facts.runs[facts.anchor]) == 3 and len(facts.explorers) == 7
    assert {verdict["estimand"] for verdict in evidence.verdicts} == {"selected", "mean"}
    pool = SeedPool((*campaign.origin.pooled(),))
    compared = Comparisons(facts, campaign.weights, pool)
    for name in facts.explorers[:2]:
        for split, splits in SPLITS.items():
            sides = ([run.items(splits) for run in facts.runs[who]] for who in (name, facts.anchor))
            direct = effect(*sides, campaign.weights.of(split), seeds_of(pool, campaign.weights, split))
            mine = compared.estimate(name, split)
            assert (mine.mean, mine.se, mine.df) == (direct.mean, direct.se, direct.df)


def test_only_what_holm_lets_through_is_called_a_gain():
    """The oracle is statsmodels' Holm on the p-values of each explorer against the anchor."""
    statsmodels = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is the oracle")
    seen = set()
    for seed in range(3):
        campaign = ProductCampaign(laboratory("no-shift", seed), Variant(), seed)
        one = DrawnRound(campaign, campaign._first_policy())
        one.run_candidates()
        facts = one.facts()
        pool = SeedPool((*campaign.origin.pooled(), *round_items(facts, campaign.weights).replicates()))
        compared = Comparisons(facts, campaign.weights, pool)
        evidence = campaign._evidence(facts, {})
        p = [float(compared.estimate(name, "dev-b").p_above()) for name in facts.explorers]
        reject = statsmodels.multipletests(p, 0.05, method="holm")[0]
        claimed = {one.id for one in evidence.candidates if one.gain}
        assert claimed == {name for name, yes in zip(facts.explorers, reject, strict=True) if yes}
        seen |= {one.gain for one in evidence.candidates}
    assert seen == {True, False}


def test_without_an_anchor_both_sides_items_count():
    campaign = UnanchoredCampaign(laboratory("no-shift", 6), Variant(anchor=False), 6)
    campaign.run()
    assert all(len(one.proposals) >= 8 for one in campaign.closed), "the runs of three anchors go to explorers"
    assert all(found.candidates[0].role == "anchor" for found in campaign.evidence)
    widths = [
        one.effects["dev-b"].se for found in campaign.evidence for one in found.candidates if "dev-b" in one.effects
    ]
    assert min(widths) > 0.0125, "unpaired: sqrt(2 x .24 / 1200) and a run's luck"


def test_moves_stay_within_what_a_delta_may_reach():
    lab = laboratory("cue", 7)
    mutate, settings = Mutation(lab.space, lab.rng), ORIGIN
    for _ in range(40):
        settings = mutate(settings)
        assert settings.recipe.steps <= 200
    assert settings != ORIGIN


# What the surfaces gave before real training came: gain, CPU-seconds and looks on development surface 1, first twin.
# The product's since it promotes by the dev-A of the runs that selected; before, by that of confirming runs too.
DRAWN = {
    PRODUCT: (0.2780447025796131, 1409.5892861514383, 58),
    "greedy on dev": (0.2660981279001997, 1283.9692502816622, 0),
    "random search": (0.06275816906733722, 852.2173855714944, 0),
    "hand-off specialists": (0.17659974483415586, 1113.3322128654877, 0),
}


@pytest.mark.parametrize("name", DRAWN)
def test_one_seam_for_both_laboratories_moves_no_simulated_result(name):
    attempt = {"phase": "development", "surfaces": 2}
    number, surface = list(surfaces_of(attempt))[1]
    row = protocol.one_campaign(attempt, number, surface, 0, name)
    assert (row["gain"], row["cpu_seconds"], row["looks"]) == pytest.approx(DRAWN[name], rel=1e-9)


# --- the protocol ---


def test_an_attempt_resumes_to_the_same_rows_and_refuses_other_code(tmp_path, monkeypatch):
    names = ["greedy on dev", "random search"]
    whole = run_attempt(tmp_path / "whole", "held-out", 2, names)
    rows = (tmp_path / "whole" / "rows.jsonl").read_bytes().splitlines(keepends=True)
    part = tmp_path / "part"
    open_attempt(part, "held-out", 2)
    (part / "rows.jsonl").write_bytes(b"".join(rows[:3]) + rows[3][:20])
    again = run_attempt(part, "held-out", 2, names)
    timeless = [[{**row, "own_cpu_seconds": 0} for row in found] for found in (whole, again)]
    assert timeless[0] == timeless[1] and len(whole) == 8
    with pytest.raises(ValueError, match="holds an attempt with surfaces 2"):
        run_attempt(part, "held-out", 3, names)
    monkeypatch.setattr(protocol, "contest_sources", lambda: "another")
    with pytest.raises(ValueError, match="a frozen policy is run once"):
        run_attempt(part, "held-out", 2, names)


def an_attempt(phase, code, base):
    return {"phase": phase, "code": code, "base": base, "surfaces": 4}


def test_optuna_is_asked_for_only_where_a_row_of_its_method_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)  # as where it is not installed
    open_attempt(tmp_path, "development", 2)
    lines = [json.dumps({"method": "TPE on dev", "surface": n, "twin": twin}) for n in (0, 1) for twin in (0, 1)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:3]) + "\n")
    with pytest.raises(ValueError, match="expected optuna"):
        run_attempt(tmp_path, "development", 2, ["TPE on dev"])
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    assert len(run_attempt(tmp_path, "development", 2, ["TPE on dev"])) == 4


def test_held_out_surfaces_follow_from_the_code_and_the_settings():
    drawn = {
        digests: [one.start_F.tolist() for _, one in surfaces_of(an_attempt("held-out", *digests))]
        for digests in (("one", "one"), ("one", "two"), ("two", "one"))
    }
    assert len({str(surfaces) for surfaces in drawn.values()}) == 3
    attempts = [an_attempt("development", *digests) for digests in (("one", "one"), ("two", "two"))]
    first, second = ([one.start_F.tolist() for _, one in surfaces_of(attempt)] for attempt in attempts)
    assert first == second
    assert {one.kind for _, one in surfaces_of({**attempts[0], "phase": "held-out"})} == set(KINDS)


def test_a_setting_of_the_demo_makes_it_another_attempt(tmp_path, monkeypatch):
    """The bar of promotion is no line of the code: it stands in the campaign whose settings the policy takes."""
    opened = open_attempt(tmp_path, "held-out", 2)
    bar = demo().constitution.replace(promote_probability=0.9)
    other = demo().replace(constitution=bar)
    monkeypatch.setattr(protocol, "demo", lambda: other)
    with pytest.raises(ValueError, match="a frozen policy is run once"):
        open_attempt(tmp_path, "held-out", 2)
    again = open_attempt(tmp_path / "other", "held-out", 2)
    first, second = ([one.start_F.tolist() for _, one in surfaces_of(attempt)] for attempt in (opened, again))
    assert first != second


# Modules that the policy's campaign loads and whose sources its digest leaves out; a name covers what lies below it.
UNBOUND = {
    "artefacts document yaml_blocks launch ledger desk": "files, processes and a ledger: a contest writes rows alone",
    "jobs budget placement retries site substrate.layout substrate.model substrate.plan": "where runs go, their cost",
    "eval.judge eval.suite eval.metric eval.engines substrate.puzzles": "items and answers: drawn on a surface, and "
    "bound by `judge_sources` where runs are real",
    "explain": "the argument in words, which nothing reads",
    "eval.hook": "the wait for a worker's program, which a contest does not start",
    "sources": "names what is bound",
}


def test_every_module_that_the_policy_loads_is_bound_or_left_out_for_a_reason():
    program = "import sys; import megatron_evolve.contest.protocol; "
    program += "print(*(name for name, one in sys.modules.items() if getattr(one, '__file__', None)))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    mine = {name.removeprefix("megatron_evolve.") for name in loaded if name.startswith("megatron_evolve.")}
    assert "contest.product" in mine
    bound = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in policy_sources()}
    left_out = {name for names in UNBOUND for name in names.split()}
    missing = sorted(name for name in mine - bound if not is_below(name, left_out))
    assert not missing, f"{missing} may decide: add them to sources.py, or to UNBOUND with the reason"
    assert not [name for name in bound if is_below(name, left_out)], "bound and left out"
    assert all(any(is_below(one, {name}) for one in mine) for name in left_out), "left out and never loaded"


def is_below(name, rooms):
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def test_intervals_are_over_surfaces():
    """Twins that agree add nothing; the interval of a difference is taken surface by surface."""
    rows = [
        {
            "method": name,
            "surface": surface,
            "kind": "cue",
            "twin": twin,
            "gain": gain + 0.01 * surface,
            "again": 0.0,
            "dev_gain": 0.0,
            "runs": 48,
            "looks": looks,
            "cpu_seconds": 1000.0 + 100 * surface,
        }
        for name, gain, looks in ((PRODUCT, 0.05, 64), ("greedy on dev", 0.03, 0))
        for surface in range(4)
        for twin in range(2)
    ]
    best, other = figures(rows)
    assert best["method"] == PRODUCT and best["against"] is None and best["spread"] == 0
    assert best["gain"]["mean"] == pytest.approx(0.065)
    assert best["gain"]["high"] - best["gain"]["mean"] == pytest.approx(1.96 * np.std(range(4), ddof=1) / 100 / 2)
    assert other["against"] == pytest.approx({"mean": -0.02, "low": -0.02, "high": -0.02})
    assert other["gain_per_look"] is None
    assert best["gain_per_look"]["mean"] == pytest.approx(0.065 / 64)
    # Of the two rates what each surface adds cancels, but for .02 of gain that costs vary against.
    assert other["rate_against"]["mean"] == pytest.approx(-0.02 / 1150) and best["rate_against"] is None
    parts = [(0.02 / 1150) * (1000 + 100 * surface) / 1150 for surface in range(4)]
    half = 1.96 * np.std(parts, ddof=1) / 2
    assert other["rate_against"]["high"] - other["rate_against"]["mean"] == pytest.approx(half)
    assert half < (other["gain_per_cpu_second"]["high"] - other["gain_per_cpu_second"]["mean"]) / 3
    told = page([best, other])
    assert "greedy on dev" in told and plot([best, other]).startswith("<svg")
    assert "| -2.0 [-2.0, -2.0] | 0.0 |" in told and "| - | - |" in told, "a method, and this policy itself"
    assert "half the width of the interval against this policy" in told


@pytest.mark.parametrize("number", [1, 2])
def test_what_is_published_of_an_attempt_is_what_its_rows_give(number):
    """Figures to nine digits, both tables and the plot, by the present code: 11 methods, 200 campaigns of each."""
    found = figures([json.loads(line) for line in (RESULTS / f"contest-{number}-rows.jsonl").open()])
    assert [one["campaigns"] for one in found] == [200] * len(METHODS)
    nine = {"parse_float": lambda text: f"{float(text):.9g}"}
    told = [json.loads(line, **nine) for line in (RESULTS / f"contest-{number}.jsonl").open()]
    assert json.loads(json.dumps(found), **nine) == told
    assert set(page(found).splitlines()) <= {*(RESULTS / "judge.md").read_text().splitlines()}
    assert plot(found) == (RESULTS / f"contest-{number}.svg").read_text()


def test_compare_command(tmp_path):
    from typer.testing import CliRunner

    runner = CliRunner()
    words = ["compare", "--dir", str(tmp_path), "--surfaces", "2", "--method", "random search", "--json"]
    done = runner.invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["campaigns"] == 4
    assert "random search" in (tmp_path / "contest.md").read_text()
    assert "expected a method" in runner.invoke(app, [*words[:-3], "--method", "luck"]).stderr


@pytest.mark.parametrize(
    "idle", ["--campaigns 3", "--rounds 2", "--campaign demo", "--store here", "--surfaces 4 --real"]
)
def test_compare_refuses_what_its_mode_does_not_read(tmp_path, idle):
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, ["compare", "--dir", str(tmp_path / "new"), *idle.split()])
    expected = "no --surfaces with --real" if "--real" in idle else f"--real with {idle.split()[0]}"
    assert done.exit_code == 1 and f"expected {expected}" in done.stderr and not (tmp_path / "new").exists()
