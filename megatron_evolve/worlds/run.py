"""Runs a grid of worlds: each campaign to its end, then its truth, then the table. Everything resumes.

    DIR/grid.json                       what the grid is and which code opened it: seeds follow from it
    DIR/WORLD/N/campaign/               a campaign like any other
    DIR/WORLD/N/truth/, sealed/         what its runs truly score, and the maximiser of dev
    DIR/WORLD/N/result.json             written last: a campaign that has it is read, never run again
    DIR/worlds.json, DIR/worlds.md      the result so far

Campaigns run one after another, since each fills the cores. Substrates, judges and the origin's runs lie in the store.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_evolve.artefacts import CampaignFolder, save_json
from megatron_evolve.audit import Record, open_record
from megatron_evolve.campaign import Campaign
from megatron_evolve.desk import Stopped, Unavailable
from megatron_evolve.jobs import FINAL_STAGE, SCORES_FILE, Ground, Run, drive
from megatron_evolve.launch.job import Launcher
from megatron_evolve.launch.local import LocalLauncher
from megatron_evolve.launch.rundir import Lock, make_folder, read_json, resolved, write_whole
from megatron_evolve.loop import Session, launcher_of, run_campaign
from megatron_evolve.prepare import default_store, freeze
from megatron_evolve.sources import decision_sources
from megatron_evolve.stance import ALARMS
from megatron_evolve.status import status
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.manifest import Substrate, verify
from megatron_evolve.worlds.grid import (
    Grid,
    World,
    board_judge_of,
    campaign_of,
    load_grid,
    pool_of,
    truth_judge_of,
)
from megatron_evolve.worlds.ground import substrate_of
from megatron_evolve.worlds.pace import Pace
from megatron_evolve.worlds.sealed import compare, maximiser_of, sides
from megatron_evolve.worlds.table import Alarm, CampaignResult, document_of
from megatron_evolve.worlds.truth import (
    TRUTH_SPLITS,
    all_facts,
    truth_ground,
    truth_of,
    truth_runs,
    weights_of,
)

STOPPED = "stopped as asked: everything finished is kept; run the same command to go on"


@dataclass(frozen=True)
class Tour:
    """One start of a grid: what it is, where it lies, how it reports."""

    grid: Grid
    base: Campaign
    code: str
    root: Path
    store: Path
    pace: Pace
    stop: Callable[[], bool]

    def place(self, world: World, index: int) -> Path:
        """Folder of one campaign and of what is known about it."""
        return self.root / world.name / str(index + 1)


def run_worlds(spec: Path, root: Path, store: Path | None) -> dict[str, Any]:
    """Runs or resumes the grid; returns its result, with the page as `table`.

    Raises ValueError in one sentence for a spec that does not fit, before anything runs. Asked to stop, it ends the
    process with status 75; the same command goes on.
    """
    grid, base = load_grid(spec)
    make_folder(root)
    console = Console(stderr=True, highlight=False)
    with Lock(root / "controller.lock"), asked_to_stop() as stop:
        code = opened_by(root, grid, base)
        tour = Tour(grid, base, code, resolved(root), resolved(store or default_store()), Pace(console), stop)
        places = [tour.place(world, index) for world in grid.worlds for index in range(grid.seeds)]
        tour.pace.expect(grid, base, places)
        try:
            for index in range(grid.seeds):  # one campaign of every world, then the next: half a grid covers all worlds
                for world in grid.worlds:
                    run_one(tour, world, index)
        except (Stopped, Unavailable) as pause:
            console.print(f"[yellow]{pause}[/]")
            sys.exit(75)  # EX_TEMPFAIL: the same command goes on
        return write_result(tour)


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGINT came; a second one ends the process at once."""
    asked: list[int] = []
    signums = (signal.SIGTERM, signal.SIGINT)
    before = [
        signal.signal(signum, lambda number, frame: asked.append(number) if not asked else os._exit(130))
        for signum in signums
    ]
    try:
        yield lambda: bool(asked)
    finally:
        for signum, handler in zip(signums, before, strict=True):
            signal.signal(signum, handler)


def opened_by(root: Path, grid: Grid, base: Campaign) -> str:
    """Digest of the code that opened the grid in this folder. Raises ValueError if the folder holds another grid."""
    path, what = root / "grid.json", digest_of({"grid": grid, "base": base})
    if not path.exists():
        document = {"grid": grid.model_dump(mode="json", by_alias=True), "digest": what, "code": decision_sources()}
        save_json(path, document)
    found = read_json(path)
    if found["digest"] != what:
        raise ValueError(
            f"{root} holds a grid of worlds with other settings ({found['digest'][:12]}) than the ones given now "
            f"({what[:12]}): resume it with its own file, or choose another --dir"
        )
    return found["code"]


# --- one campaign -----------------------------------------------------------------------------------------------------


def run_one(tour: Tour, world: World, index: int) -> None:
    """Takes one campaign of a world to its result, unless it has one."""
    place = tour.place(world, index)
    if (place / "result.json").exists():
        return
    make_folder(place)
    tour.pace.opening(f"{world.name}, campaign {index + 1} of {tour.grid.seeds}")
    finish_campaign(tour, world, index, place)
    save_json(place / "result.json", result_of(tour, world, index, place))
    write_result(tour)


def finish_campaign(tour: Tour, world: World, index: int, place: Path) -> None:
    """Takes a campaign to its end, unless it is closed."""
    if is_closed(place / "campaign"):
        return
    with LocalLauncher(1, place) as launcher:
        spec, cue = pool_of(tour.base, world)
        substrate = substrate_of(spec, cue, tour.store, launcher, tour.pace)
    board = board_of(tour, world, index, verify(substrate))
    campaign = campaign_of(tour.grid, tour.base, world, index, tour.code, substrate, board)
    run_campaign(Session(place / "campaign", tour.store, tour.pace, tour.stop), campaign)


def board_of(tour: Tour, world: World, index: int, substrate: Substrate) -> Path | None:
    """The judge of a campaign's leaderboard, outside the campaign's folder; none where items are asked as usual."""
    if world.score_only is None:
        return None
    return freeze(board_judge_of(tour.base, world, index, tour.code), substrate, tour.store)


def is_closed(folder: Path) -> bool:
    """Whether the folder holds a campaign that came to its end."""
    if not CampaignFolder(folder).ledger.exists():
        return False
    return status(folder)["state"] == "closed"


def result_of(tour: Tour, world: World, index: int, place: Path) -> CampaignResult:
    """What a closed campaign said, and what is true."""
    record = open_record(place / "campaign")
    facts = all_facts(record)
    judge = freeze(truth_judge_of(tour.grid, tour.base, world, tour.code), record.substrate, tour.store)
    ground, weights = truth_ground(record, judge, place), weights_of(judge)
    number, kept = maximiser_of(facts, weights)
    standing, maximiser = sides(record, kept, place, board_of(tour, world, index, record.substrate))
    with launcher_of(record.campaign, Session(place, tour.store, tour.pace, tour.stop)) as launcher:
        for split in TRUTH_SPLITS:
            score(tour, ground, launcher, [run for one in facts for run in truth_runs(one)], split)
        if standing.candidate.id != maximiser.candidate.id:
            for side in (standing, maximiser):
                train_and_score(tour, side.ground, launcher, side.runs)
    return CampaignResult(
        world=world.name,
        campaign=record.campaign.name,
        seed=record.campaign.seed,
        decisions=record.opened["decisions"],
        cpu_seconds=sum(event.data["end"]["cpu_seconds"] for event in record.events if event.kind == "ended"),
        alarms=alarms_of(record),
        truth=truth_of(record, ground, weights),
        maximiser_round=number,
        sealed=compare(standing, maximiser, weights),
    )


def alarms_of(record: Record) -> tuple[Alarm, ...]:
    """Every alarming verdict, in order of round."""
    return tuple(
        Alarm(
            round=number,
            estimand=verdict["estimand"],
            scope=verdict["domain"],
            outcome=verdict["outcome"],
            attributed_to=verdict.get("attributed_to", ()),
        )
        for number in record.rounds
        for verdict in record.evidence(number).verdicts
        if verdict["outcome"] in ALARMS
    )


def score(tour: Tour, ground: Ground, launcher: Launcher, runs: Sequence[Run], split: Any) -> None:
    """Asks the truth judge one split of every run; what was scored before is found. Raises ValueError if one fails."""
    todo = [(run, split) for run in runs if not (ground.stage_dir(run, split) / SCORES_FILE).exists()]
    for end in drive(ground, launcher, todo, lambda end: (), tour.stop):
        if not end.finished:
            raise ValueError(f"the truth of run {end.run.key} {end.outcome} on {split}: {end.reason}; start again")
        tour.pace("truth", {"run": end.run.key, "seconds": end.cpu_seconds, "split": split})
    if tour.stop():
        raise Stopped(STOPPED)


def train_and_score(tour: Tour, ground: Ground, launcher: Launcher, runs: Sequence[Run]) -> None:
    """Trains what is not trained and asks the sealed items. A failed run has no score; a failed score raises."""
    after = lambda end: [(end.run, FINAL_STAGE)] if end.finished and end.stage == "train" else []  # noqa: E731
    todo = [(run, "train") for run in runs if not (ground.stage_dir(run, FINAL_STAGE) / SCORES_FILE).exists()]
    for end in drive(ground, launcher, todo, after, tour.stop):
        if not end.finished and end.stage != "train":
            raise ValueError(f"the sealed score of run {end.run.key} {end.outcome}: {end.reason}; start again")
    if tour.stop():
        raise Stopped(STOPPED)


# --- the result -------------------------------------------------------------------------------------------------------


def write_result(tour: Tour) -> dict[str, Any]:
    """Writes what is known so far, whatever it says, and returns it."""
    places = [tour.place(world, index) for world in tour.grid.worlds for index in range(tour.grid.seeds)]
    paths = [place / "result.json" for place in places]
    results = [CampaignResult.parse(read_json(path), where=str(path)) for path in paths if path.exists()]
    facts = {
        "rounds": tour.grid.rounds,
        "base": tour.base.name,
        "planned": len(places),
        "finished": len(results),
        "code": tour.code[:12],
        "dev": tour.grid.truth.dev,
        "external": tour.grid.truth.external,
    }
    document = document_of(facts, [world.name for world in tour.grid.worlds], results)
    save_json(tour.root / "worlds.json", document)
    write_whole(tour.root / "worlds.md", document["table"])
    return document
