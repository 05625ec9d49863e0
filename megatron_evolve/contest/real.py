"""The contest with real training: the methods that matter, each in a few small campaigns on one frozen substrate.

    DIR/attempt.json           phase, size, base campaign, and the digest of all that decides, trains and scores
    DIR/campaign-N/            the runs that the methods of this campaign share (shared_runs.py)
    DIR/rows.jsonl             one line a finished campaign of a method; what has a line is never run again

A campaign number is a seed, a judge's secret and a second judge's. All follow from the digests of the code and of the
base campaign in a held-out attempt, as the surfaces of a simulated one do, so that nobody can have tuned on them. Held
out are seeds and items alone: the world is the base campaign's, and the loop was developed on the demo's cue and
weights. Methods of one number meet the same items and share every run that they have in common; a killed attempt goes
on where it was.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.campaign import Campaign
from megatron_evolve.contest.protocol import (
    METHODS,
    PRODUCT,
    Phase,
    Product,
    append_row,
    budget_of,
    chosen_methods,
    material_of,
    open_folder,
    read_rows,
    require_optuna,
    unfinished,
)
from megatron_evolve.contest.rivals import HAND_ON
from megatron_evolve.contest.sealed_half import SealedHalf
from megatron_evolve.contest.shared_runs import Execute, SharedGround, SharedRuns, asked_by
from megatron_evolve.contest.space import Space
from megatron_evolve.contest.workshop import Workshop
from megatron_evolve.delta import canonical_change
from megatron_evolve.desk import STOPPED, Stopped
from megatron_evolve.eval.freeze import SUITES_FILE
from megatron_evolve.eval.judge import judge_sources
from megatron_evolve.evidence import Evidence
from megatron_evolve.jobs import Ground, Run, Stage, StageEnd, drive
from megatron_evolve.launch.job import Launcher
from megatron_evolve.launch.rundir import Lock, make_folder, read_json
from megatron_evolve.loop import Session, launcher_of
from megatron_evolve.placement import Placement
from megatron_evolve.prepare import Prepared, freeze, origin_ground, prepare
from megatron_evolve.site import Site
from megatron_evolve.sources import policy_sources
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.manifest import public_view, trainer_sources
from megatron_evolve.worlds.run import asked_to_stop

THAT_MATTER = (PRODUCT, "greedy on dev", "TPE on external", "random search")


def deciding_sources() -> str:
    """Digest of what decides in a campaign, of what draws the contest, and of what trains and scores."""
    return digest_of({"decides": policy_sources(), "trains": trainer_sources(), "scores": judge_sources()})


@dataclass(frozen=True)
class Tour:
    """One start of an attempt."""

    root: Path
    store: Path
    attempt: dict[str, Any]
    base: Campaign
    say: Callable[[str], None]
    stop: Callable[[], bool]


def run_real(
    root: Path, store: Path, base: Campaign, phase: Phase, campaigns: int, rounds: int, methods: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Runs what is missing of an attempt and returns all its rows. Raises ValueError in one sentence.

    Asked to stop, it ends the process with status 75; the same command goes on.
    """
    if campaigns < 2:
        raise ValueError(f"expected at least 2 campaigns a method, got {campaigns}: an interval needs two")
    for name in methods:
        if name in HAND_ON:
            raise ValueError(
                f"{name!r} hands weights on and real runs start from the frozen substrate: choose a method that does "
                "not, or run the contest on simulated surfaces"
            )
    chosen = chosen_methods(methods, THAT_MATTER)
    if base.judge.target_suite is None:
        raise ValueError(
            f"campaign {base.name!r} has no external items to ask, so no gain can be measured: name another"
        )
    wanted = {"schema": "contest-real/1", "phase": phase, "campaigns": campaigns, "rounds": rounds}
    attempt = open_folder(root, {**wanted, "base": digest_of(base), "code": deciding_sources()})
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    with Lock(root / "lock"), asked_to_stop() as stop:
        rows = read_rows(root)
        require_optuna(unfinished(chosen, rows, campaigns))
        tour = Tour(root.resolve(), store.resolve(), attempt, base, say, stop)
        try:
            for number in range(1, campaigns + 1):
                done = {row["method"] for row in rows if row["campaign"] == number}
                if missing := [name for name in chosen if name not in done]:
                    rows += run_campaigns(tour, number, missing)
        except Stopped as pause:
            say(str(pause))
            sys.exit(75)  # EX_TEMPFAIL: the same command goes on
    return rows


def run_campaigns(tour: Tour, number: int, methods: Sequence[str]) -> list[dict[str, Any]]:
    """One campaign of each of these methods under one number; each adds its line when it is finished."""
    with prepared_ground(tour, number) as ground:
        return [append_row(tour.root, ground.campaign_of(name)) for name in methods]


@dataclass(frozen=True, eq=False)
class RealGround:
    """Where the campaigns of one number run."""

    tour: Tour
    number: int
    space: Space
    shared: SharedRuns
    frozen: SharedRuns
    frozen_seeds: tuple[int, ...]
    sealed: SealedHalf
    judge: str

    def campaign_of(self, name: str) -> dict[str, Any]:
        """One campaign of a method, as its row."""
        rng = np.random.default_rng(int(drawn(self.tour.attempt, self.number, name)[:16], 16))
        say = lambda line: self.tour.say(f"campaign {self.number}, {name}, {line}")  # noqa: E731
        budget = budget_of(self.space.campaign)
        lab = Workshop(self.space, rng, budget, self.shared, self.frozen, self.frozen_seeds, say)
        method, evidence = METHODS[name], []
        if isinstance(method, Product):
            opened = method.open(lab)
            shipped, evidence = opened.run(), opened.evidence
        else:
            shipped = method(lab)
        found = self.sealed.measure(shipped)
        say(f"{100 * found['external']['gain']:+.1f} pt on the sealed half")
        return {
            "method": name,
            "campaign": self.number,
            "gain": found["external"]["gain"],
            "dev_gain": found["dev"]["gain"],
            "runs": lab.runs,
            "failed": lab.failed,
            "looks": lab.looks,
            "cpu_seconds": round(lab.seconds, 3),
            "shipped": canonical_change(self.space.origin, shipped),
            "sealed": found,
            "verdicts": said(evidence),
            "substrate": self.space.substrate,
            "judge": self.judge,
        }


def said(evidence: Sequence[Evidence]) -> list[dict[str, Any]]:
    """Every verdict of a campaign, in order of round."""
    return [
        {"round": one.round, **{name: verdict[name] for name in ("estimand", "domain", "outcome")}}
        for one in evidence
        for verdict in one.verdicts
    ]


def drawn(attempt: dict[str, Any], number: int, purpose: str) -> str:
    """What nobody picks: 64 hexadecimal digits from the attempt, the campaign's number and what they are for."""
    return digest_of({"attempt": material_of(attempt), "campaign": number, "purpose": purpose})


def numbered(tour: Tour, number: int) -> Campaign:
    """The base campaign under the seed and the secret of a number."""
    base = tour.base
    return base.replace(
        name=f"contest-{number}",
        seed=int(drawn(tour.attempt, number, "seed")[:8], 16),
        judge=base.judge.replace(secret=drawn(tour.attempt, number, "judge")),
        constitution=base.constitution.replace(rounds=tour.attempt["rounds"]),
    )


@contextmanager
def prepared_ground(tour: Tour, number: int) -> Iterator[RealGround]:
    """Substrate, judge, origin and second judge of a number, built where they are missing, with a launcher's jobs."""
    campaign, place = numbered(tour, number), tour.root / f"campaign-{number}"
    make_folder(place)
    session = Session(tour.root, tour.store, lambda what, facts: None, tour.stop)
    tour.say(f"campaign {number}: substrate, judge and the origin's runs")
    with launcher_of(campaign, session) as launcher:
        prepared = prepare(campaign, Site(), tour.store, launcher, session.on_progress, tour.stop)
        sealed = campaign.judge.replace(secret=drawn(tour.attempt, number, "sealed"))
        yield _ground(tour, number, campaign, prepared, freeze(sealed, prepared.substrate, tour.store), launcher)


def _ground(
    tour: Tour, number: int, campaign: Campaign, prepared: Prepared, second: Path, launcher: Launcher
) -> RealGround:
    substrate, limit = prepared.substrate, campaign.constitution.limits.run_seconds
    weights = read_json(prepared.judge_folder / SUITES_FILE)["weights"]
    space = Space(campaign, public_view(substrate), substrate.default, weights["dev"], weights["external"])
    place, placement = tour.root / f"campaign-{number}", Placement.of(campaign, Site())
    theirs = origin_ground(prepared.substrate_folder, prepared.judge_folder, limit, placement=placement)
    ours = SharedGround(
        folder=CampaignFolder(place),
        substrate=prepared.substrate_folder,
        judge=prepared.judge_folder,
        time_limit_s=limit,
        exclude=theirs.exclude,
        placement=placement,
    )
    execute = executed_by(launcher, tour.stop)
    shared, frozen, fresh, again = (
        SharedRuns(one, substrate.digest, campaign.seed, execute)
        for one in (ours, theirs, *(asked_by(one, second, place / "sealed") for one in (ours, theirs)))
    )
    seeds = prepared.judge.origin.seeds
    half = SealedHalf(space, fresh, again, seeds, campaign.constitution.anchor_seeds)
    return RealGround(tour, number, space, shared, frozen, seeds, half, prepared.judge.digest)


def executed_by(launcher: Launcher, stop: Callable[[], bool]) -> Execute:
    """Runs one stage at a time as a job of the launcher. Raises Stopped when asked to stop before it began."""

    def execute(ground: Ground, run: Run, stage: Stage) -> StageEnd:
        for end in drive(ground, launcher, [(run, stage)], lambda end: (), stop):
            return end
        raise Stopped(STOPPED)

    return execute
