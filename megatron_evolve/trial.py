"""A trial: a researcher's own delta against the anchor, outside any round, with an honest paired verdict.

Both sides train under the same number of fresh seeds and answer the same fresh dev items, which no round has seen. What
was run stays in DIR/try, so the same command answers at once. Its looks at dev stand in the campaign's account, more
seeds being a further look. A look at the external target is spent only when asked for.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer

from megatron_evolve.artefacts import CampaignFolder, save_json
from megatron_evolve.audit import Record, open_record
from megatron_evolve.candidate import Candidate, candidate, run_seed
from megatron_evolve.cli import emit
from megatron_evolve.comparisons import INTERVAL_ALPHA, Weights, seeds_of
from megatron_evolve.delta import Delta, canonical_change, resolve
from megatron_evolve.document import load_yaml
from megatron_evolve.eval.discordant import too_few
from megatron_evolve.eval.looks import Look, Looks
from megatron_evolve.eval.paired import Answers, Estimate, RunItems, effect, mcnemar_midp, probability_better
from megatron_evolve.eval.power import POWER, minimum_detectable_effect, times_needed, with_seeds
from megatron_evolve.eval.seeds import RunReplicates, SeedPool
from megatron_evolve.eval.suite import Split
from megatron_evolve.facts import RunFacts
from megatron_evolve.jobs import Ground, Run, Stage, drive, write_candidate
from megatron_evolve.launch.rundir import Lock
from megatron_evolve.loop import Session, launcher_of
from megatron_evolve.prepare import default_store, ground_of
from megatron_evolve.review import POOLED_ROUNDS
from megatron_evolve.site import kept_site
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.manifest import public_view
from megatron_evolve.substrate.settings import Settings
from megatron_evolve.target import check_target
from megatron_evolve.workers.validate import check_styles

# Rounds of trials lie far above any campaign's, so their items are drawn by nobody else.
FIRST_TRIAL_ROUND = 1_000_000
MDE_ALPHA = 0.05
DEV_SPLITS = ("dev-a", "dev-b")  # one job scores both halves
EXTERNAL_SPLITS = ("external-a", "external-b")


@dataclass(frozen=True)
class Trial:
    """One delta, resolved, and where its runs lie."""

    record: Record
    delta: Delta
    base: Settings
    anchor: Candidate
    candidate: Candidate
    ground: Ground
    round: int
    seeds: int

    def runs(self, found: Candidate) -> list[Run]:
        """The runs of one side."""
        material = [run_seed(self.record.campaign.seed, self.round, found.id, index) for index in range(self.seeds)]
        return [Run(self.round, found, seed) for seed in material]

    def facts(self, found: Candidate, stages: tuple[str, ...]) -> list[RunFacts]:
        """The finished runs of one side."""
        ends = {stage: {"outcome": "finished"} for stage in stages}
        places = [(run.seed, self.ground.folder.run(run.round, found.id, run.seed)) for run in self.runs(found)]
        return [
            RunFacts(found.id, seed, folder, ends)
            for seed, folder in places
            if all((folder / stage / "scores.json").exists() for stage in stages)
        ]


def run_trial(delta_path: Path, root: Path, *, ask_external: bool, seeds: int, as_json: bool) -> None:
    """Runs the trial and prints its verdict."""
    trial = open_trial(delta_path, root, seeds)
    with Lock(CampaignFolder(root.resolve()).lock):
        failures = run_both(trial, root, ask_external)
    found = verdict(trial, ask_external, failures)
    place = trial.ground.folder.root / trial.candidate.id / "evidence.json"
    save_json(place, found)
    emit({**found, "evidence": str(place)}) if as_json else typer.echo(f"{words(found)}\n  evidence: {place}")


def open_trial(delta_path: Path, root: Path, seeds: int) -> Trial:
    """The trial of a delta file on a campaign's ground. Raises ValueError in one sentence for anything that misfits."""
    record = open_record(root)
    delta = Delta.parse(load_yaml(delta_path), where=str(delta_path))
    base = base_of(record, delta, str(delta_path))
    resolved = resolve(base, delta, record.campaign.constitution.mutation_space)
    check_styles(resolved, public_view(record.substrate))
    judge = Path(record.opened["judge_folder"])
    site, folder = kept_site(record.folder.site), CampaignFolder(root.resolve() / "try")
    ground = ground_of(record.campaign, site, folder, Path(record.opened["substrate_folder"]), judge)
    found = candidate(record.substrate.digest, resolved)
    number = FIRST_TRIAL_ROUND + int(found.id[:6], 16)
    return Trial(record, delta, base, candidate(record.substrate.digest, base), found, ground, number, seeds)


def base_of(record: Record, delta: Delta, where: str) -> Settings:
    """The settings that the delta changes."""
    if not record.substrate.digest.startswith(delta.base.substrate.rstrip("…")):
        raise ValueError(
            f"{where}: base.substrate is {delta.base.substrate}, this campaign's is {record.substrate.digest[:12]}; "
            "leave it out or write the delta for this substrate"
        )
    if delta.base.recipe == "default":
        return record.substrate.default
    name, _, number = delta.base.recipe.partition("/")
    if name != "policy" or not number.isdigit() or record.data("policy", number) is None:
        raise ValueError(
            f"{where}: base.recipe takes `default`, or `policy/r` of a round with a policy, got {delta.base.recipe!r}"
        )
    return record.policy(int(number)).standing


def run_both(trial: Trial, root: Path, ask_external: bool) -> list[str]:
    """Trains and scores both sides; returns what failed, in words."""
    if ask_external and trial.record.campaign.judge.target_suite is None:
        raise ValueError("expected a target that this campaign asks itself, got none: leave --external out")
    failures: list[str] = []
    sides = (trial.anchor, trial.candidate)
    for side in sides:
        write_candidate(trial.ground.folder, trial.round, side)
    rules = trial.record.campaign.constitution
    account = Looks(CampaignFolder(root).looks, external_budget=rules.external_looks)
    if ask_external:
        check_target(trial.record.campaign, trial.ground)
    pay(trial, account, (*DEV_SPLITS, *(EXTERNAL_SPLITS if ask_external else ())))
    stages: tuple[Stage, ...] = ("train", "dev", *(EXTERNAL_SPLITS if ask_external else ()))
    following = dict(itertools.pairwise(stages))
    session = Session(root, default_store(), lambda what, facts: None, lambda: False, trial.ground.placement.site)
    with launcher_of(trial.record.campaign, session) as launcher:
        first = [(run, stages[0]) for side in sides for run in trial.runs(side)]
        after = lambda end: [(end.run, following[end.stage])] if end.finished and end.stage in following else []  # noqa: E731
        for end in drive(trial.ground, launcher, first, after):
            typer.echo(f"  {end.run.candidate.id} seed {end.run.seed} {end.stage}: {end.outcome}", err=True)
            if not end.finished:
                failures.append(f"{end.run.candidate.id}/{end.run.seed} {end.stage}: {end.outcome} ({end.reason})")
    return failures


def pay(trial: Trial, account: Looks, splits: Sequence[Split]) -> None:
    """Enters both sides' looks in the campaign's account before anything is asked."""
    for side in (trial.anchor, trial.candidate):
        for split in splits:
            runs = tuple(run.key for run in trial.runs(side))
            account.pay(
                Look(
                    candidates=(side.id,),
                    runs=runs,
                    purpose="trial",
                    split=split,
                    round=_number(account, side.id, split, trial.round, runs),
                    item_set=digest_of({"judge": trial.record.opened["judge"], "split": split, "round": trial.round}),
                    items=trial.record.suites["items"][split],
                )
            )


def _number(account: Looks, name: str, split: Split, first: int, runs: Sequence[str]) -> int:
    """The round a look is entered under: the trial's own, or where it was asked by other runs the next free one."""
    number, before = first, account.paid(candidate=name, round_number=first, split=split)
    while before is not None and set(before.runs) != set(runs):
        number += 1
        before = account.paid(candidate=name, round_number=number, split=split)
    return number


# --- the verdict -----------------------------------------------------------------------------------------------------


def verdict(trial: Trial, ask_external: bool, failures: list[str]) -> dict[str, Any]:
    """What the trial shows, as data. A side without a finished run has no effect, never a number."""
    record = trial.record
    weights = Weights(**record.suites["weights"])
    rounds = record.rounds[-POOLED_ROUNDS:]
    earlier = [one for number in rounds for one in record.evidence(number).replicates]
    pool = SeedPool((*record.origin.pooled(), *(RunReplicates.from_dict(one) for one in earlier)))
    dev = compare(trial, ("dev-b",), "dev", weights, pool)
    external = compare(trial, EXTERNAL_SPLITS, "external", weights, pool) if ask_external else None
    return {
        "schema": "trial/1",
        "candidate": trial.candidate.id,
        "anchor": trial.anchor.id,
        "change": canonical_change(trial.base, trial.candidate.settings),
        "hypothesis": trial.delta.hypothesis,
        "seeds": trial.seeds,
        "substrate": record.substrate.digest,
        "dev": dev,
        "external": external,
        "predicted": trial.delta.predict.model_dump(mode="json"),
        "failures": failures,
    }


def compare(
    trial: Trial, splits: tuple[str, ...], side: str, weights: Weights, pool: SeedPool
) -> dict[str, Any] | None:
    """The paired difference on some splits, overall and by domain; none while a side has no finished run.

    Its numbers are None where too few items tell the two sides apart, of which nothing is claimed.
    """
    stages = ("dev",) if side == "dev" else splits
    mine, anchors = trial.facts(trial.candidate, stages), trial.facts(trial.anchor, stages)
    if not mine or not anchors:
        return None
    answers = [[run.items(splits) for run in runs] for runs in (mine, anchors)]
    domains = sorted(weights.of(side))
    overall = effect(*answers, weights.of(side), seeds_of(pool, weights, side))
    by_domain = {
        name: effect(*answers, {one: float(one == name) for one in domains}, seeds_of(pool, weights, side, name))
        for name in domains
    }
    num_items = len(answers[0][0].item_ids)
    return {
        "runs": [len(mine), len(anchors)],
        "items": num_items,
        "too_few": None
        if overall.enough
        else too_few(overall.discordant, num_items, "dev-B" if side == "dev" else side),
        **_shown(overall),
        "minimum_detectable_effect": minimum_detectable_effect(overall, MDE_ALPHA) if overall.enough else None,
        "more_seeds": _more_seeds(overall, len(mine)) if overall.enough else None,
        "checkpoints": _checkpoints(answers[0][0], answers[1][0]) if len(mine) == len(anchors) == 1 else None,
        "domains": {name: _shown(found) for name, found in by_domain.items()},
    }


def _shown(found: Estimate) -> dict[str, float | None]:
    if not found.enough:
        return dict.fromkeys(("mean", "se", "low", "high", "p_better"))
    return {
        "mean": found.mean,
        "se": found.se,
        "low": found.lower(INTERVAL_ALPHA),
        "high": found.upper(INTERVAL_ALPHA),
        "p_better": probability_better(found),
    }


def _checkpoints(mine: RunItems, anchor: RunItems) -> dict[str, float] | None:
    """Whether two checkpoints differ; of the delta it says nothing. None where several answers to an item are averaged.

    Unweighted, as McNemar's test is: every item counts alike whatever its family weighs.
    """
    ours, theirs = Answers.of([mine, anchor]).correct_Rn
    if not np.isin([ours, theirs], (0, 1)).all():
        return None
    better, worse = int((ours > theirs).sum()), int((ours < theirs).sum())
    return {"only_candidate": better, "only_anchor": worse, "midp": mcnemar_midp(better, worse)}


def _more_seeds(found: Estimate, runs: int) -> int | None:
    """Further seeds a side that bring the interval off zero with 80 % power at this effect; none if seeds cannot."""
    if found.lower(INTERVAL_ALPHA) > 0 or found.upper(INTERVAL_ALPHA) < 0:
        return 0
    if found.seeds is None:
        return None
    # A trial's own runs are not in the pool that tells what a seed is worth, so further ones add no degree of freedom.
    times = times_needed(lambda one, times: with_seeds(one, times, 0, one.seeds.flips), [found], INTERVAL_ALPHA)
    return times and max(1, math.ceil(runs * times) - runs)


def words(found: dict[str, Any]) -> str:
    """The verdict as a researcher reads it."""
    dev = found["dev"]
    lines = []
    if dev is None:
        lines.append(f"NO VERDICT  {found['candidate']}: no finished run on one of the two sides")
    elif dev["mean"] is None:
        lines.append(f"NO VERDICT  {found['candidate']}: {dev['too_few']}; ask more items")
    else:
        said = "GAIN" if dev["low"] > 0 else "LOSS" if dev["high"] < 0 else "NOT SHOWN"
        lines.append(
            f"{said}  {found['candidate']} vs anchor {found['anchor']}, {dev['runs'][0]}+{dev['runs'][1]} seeds, "
            f"{dev['items']:,} dev-B items, substrate {found['substrate'][:4]}"
        )
        lines.append(
            f"  dev {_interval(dev)}   smallest visible effect {100 * dev['minimum_detectable_effect']:.1f}   "
            f"P(better) {dev['p_better']:.2f}"
        )
        lines.append(f"  domains  {_domains(dev, found['predicted'])}")
    if dev and dev["checkpoints"]:
        lines.append(f"  {_pair_words(dev['checkpoints'])}")
    lines.append(
        f"  external {_interval(found['external'])}"
        if found["external"]
        else "  external not asked; add --external to spend one look a side and split"
    )
    if dev and dev["more_seeds"]:
        lines.append(
            f"  to settle: about +{dev['more_seeds']} seeds a side at this effect, with {100 * POWER:.0f} % power"
        )
    elif dev and dev["mean"] is not None and dev["more_seeds"] is None:
        lines.append("  to settle: seeds alone cannot at this effect")
    lines += [f"  failed: {failure}" for failure in found["failures"]]
    return "\n".join(lines)


def _pair_words(pair: dict[str, float]) -> str:
    return (
        f"these two checkpoints: {pair['only_candidate']:,} items right in the candidate's alone, "
        f"{pair['only_anchor']:,} in the anchor's, mid-p {pair['midp']:.3f}; another seed may turn it round"
    )


def _interval(value: dict[str, float | None]) -> str:
    if value["mean"] is None:
        return value["too_few"]
    return f"{100 * value['mean']:+.1f} pt [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"


def _domains(dev: dict[str, Any], predicted: dict[str, Any]) -> str:
    parts = []
    for name, value in dev["domains"].items():
        text, seen = f"{name} not apart", "unresolved"
        if value["mean"] is not None:
            text = f"{name} {100 * value['mean']:+.1f} [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"
            seen = "up" if value["low"] > 0 else "down" if value["high"] < 0 else "unresolved"
        if direction := predicted["domains"].get(name):
            text += f", predicted {direction}: {'yes' if seen == direction else seen}"
        parts.append(text)
    return " | ".join(parts)


# --- the mix ---------------------------------------------------------------------------------------------------------


def show_mix(delta_path: Path, root: Path, as_json: bool) -> None:
    """Prints what a delta's mix contains: share, rows in one run and form of each family, before and after."""
    trial = open_trial(delta_path, root, 1)
    before, after = trial.base, trial.candidate.settings
    rows = after.recipe.steps * after.recipe.batch_size
    table = {
        family: {
            "share_before": before.mix.weight[family],
            "share": share,
            "rows": round(share * rows),
            "style": after.mix.style[family],
        }
        for family, share in after.mix.weight.items()
    }
    if as_json:
        emit({"rows": rows, "curriculum": after.mix.curriculum, "families": table})
        return
    typer.echo(
        f"{rows:,} rows a run, curriculum {after.mix.curriculum}, a prompt at most {after.mix.repetition_cap} times"
    )
    for family, one in table.items():
        typer.echo(
            f"  {family:20} {one['share_before']:.3f} -> {one['share']:.3f}  {one['rows']:>7,} rows  {one['style']}"
        )
