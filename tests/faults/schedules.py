"""Schedules of faults: drawn from a seed, run to the end, and held against the campaign that nothing disturbed.

    python -m tests.faults.schedules SEED [SEED ...]      replays schedules and prints what struck
    python -m tests.faults.schedules --spending SEED ...  those whose budget of hours may end them early

A schedule starts the controller again and again, with a fault in each start, and at last without one. What must hold
then is in `check`.
"""

import contextlib
import datetime
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_evolve import ledger as ledger_module
from megatron_evolve.artefacts import check_file
from megatron_evolve.budget import Spend, of_end
from megatron_evolve.campaign import Campaign
from megatron_evolve.desk import Stopped
from megatron_evolve.evidence import kept_evidence
from megatron_evolve.launch import starts
from megatron_evolve.launch.rundir import Lock, RunDirError, make_folder
from megatron_evolve.ledger import Event, read_ledger
from megatron_evolve.policy import kept_policy
from megatron_evolve.retries import Paused
from megatron_evolve.stopping import StopOrder
from megatron_evolve.workers import seam
from tests.faults.cluster import ROOM, Cluster, FakeLauncher, Troubles
from tests.faults.files import DEADLY, FAULTS, Fault, FaultyFiles, Killed, Plan
from tests.faults.invented import Invented, answer, campaign, origin
from tests.faults.lives import SIGN_EVERY_S

STORIES = 8  # different campaigns that schedules are laid over
TURNS = 70  # after so many schedules of each story, every kind of step of any story was struck
SCHEDULES = STORIES * TURNS
DRAINS = 40  # further ones, whose controllers are told to stop and die before they have
DRAIN_STEPS = 60  # the rest of a round's submissions takes some thirty, calling off a job that waits six
MOST_STARTS = 12  # with troubles of the cluster a start may end early; without an end to them it would be a bug
OUTAGE = Troubles(lost=1.0)  # every attempt is lost until the operator has mended the cluster
TROUBLES = Troubles(lost=0.06, disk_full=0.02, submit_fails=0.01, reply_lost=0.02, sent_twice=0.1, poll_stale=0.05)


@dataclass
class Played:
    """A campaign in a folder and what happened on the way to its end."""

    told: Invented
    cluster: Cluster
    starts: list[str] = field(default_factory=list)
    struck: list[tuple[Fault, str]] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)  # of the last start
    ledgers: list[bytes] = field(default_factory=list)  # as each start left it


@contextlib.contextmanager
def world(files: FaultyFiles, cluster: Cluster) -> Iterator[None]:
    """Replaces what is outside the controller: files, clocks, and the process behind the worker's seam."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            start = datetime.datetime(2026, 11, 1, tzinfo=tz)
            return start + datetime.timedelta(seconds=cluster.now + files.jumped_s)

    def worker(program: Any, scratch: Any, question: bytes, *rest: Any) -> tuple[str, str, bytes]:
        cluster.pass_time(0.5)
        return "ok", "", answer(question)

    files.waits = cluster.pass_time
    with (
        mock.patch.object(time, "sleep", cluster.pass_time),
        mock.patch.object(time, "monotonic", lambda: cluster.now),
        mock.patch.object(ledger_module, "datetime", Clock),
        mock.patch.object(seam, "_run", worker),
        mock.patch.object(starts, "ALIVE_EVERY_S", SIGN_EVERY_S),
        files,
    ):
        yield


def start(told: Invented, files: FaultyFiles, cluster: Cluster, plan: Plan) -> str:
    """One controller from its start to its end; how it ended, as the command line would say it."""
    files.start(plan)
    for remembered in (kept_policy, kept_evidence):
        remembered.cache_clear()  # a new process remembers nothing
    try:
        make_folder(told.folder.root)
        stop = StopOrder(told.folder.stop_file, lambda: files.stopping, lambda: files.stopping)
        cluster.ordered = told.folder.stop_file.exists()
        with Lock(told.folder.lock), told.opened() as (ledger, account), stop.carried_out():
            told.control(ledger, account, FakeLauncher(cluster), stop)
    except Killed:
        return "killed"
    except Stopped:
        return "stopped"
    except Paused as pause:
        return str(pause)
    except (RunDirError, OSError) as error:
        return f"failed: {error}"
    except ValueError as error:
        if not any(fault == "io_error" for fault, _ in files.struck):
            raise
        return f"failed: {error}"
    return "closed"


@cache
def undisturbed(story: int) -> Played:
    """The campaign of a story, run once with nothing in its way. Its folder lives as long as this process."""
    keep = tempfile.TemporaryDirectory(prefix="story-")
    undisturbed.folders = [*getattr(undisturbed, "folders", []), keep]
    return play(Path(keep.name), story, [], Troubles(), random.Random(story))


def play(
    root: Path,
    story: int,
    plans: list[Plan],
    troubles: Troubles,
    rng: random.Random,
    budgets: dict[str, float] | None = None,
    room: int = ROOM,
) -> Played:
    """Runs a story: one start for each plan, then starts without a plan until the campaign is closed.

    With `budgets`, in hours, attempts that are made again cost too.
    """
    told = Invented(root, drawn_campaign(story, budgets), _origin())
    files = FaultyFiles(told.folder.root)
    cluster = Cluster(rng, files, troubles, account=told.folder.looks, room=room)
    if troubles is OUTAGE:
        cluster.most_losses = sys.maxsize
    if budgets is not None:
        limits = (3600 * budgets[name] for name in ("cpu_hours", "gpu_hours"))
        cluster.charges, cluster.budget = True, Spend(math.inf, *limits)
    played = Played(told, cluster)
    with world(files, cluster):
        for number in range(MOST_STARTS):
            if number >= len(plans) + 2:  # the operator mended the cluster
                cluster.troubles = Troubles()
            ended = start(told, files, cluster, plans[number] if number < len(plans) else {})
            played.starts.append(ended)
            if ended == "stopped":
                assert not cluster.queue, "it said that it had stopped, and a job of it runs"
            played.struck += files.struck
            files.struck = []
            with files.outside():
                path = told.folder.ledger
                played.ledgers.append(path.read_bytes() if path.exists() else b"")
            if ended == "closed":
                played.steps = files.steps
                return played
    raise AssertionError(f"not closed after {MOST_STARTS} starts: {played.starts}")


def drawn_campaign(story: int, budgets: dict[str, float] | None = None) -> Campaign:
    """Two rounds or one, one explorer or two, and a budget of looks that lasts or does not."""
    looks = 14 if story % 3 else 5
    return campaign(story, rounds=1 + (story % 4 == 0), workers=2 + story % 2, external_looks=looks, budgets=budgets)


@cache
def _origin() -> Any:
    return origin()


# --- a schedule -------------------------------------------------------------------------------------------------------


@cache
def first_kinds() -> tuple[str, ...]:
    """The kind of step at which each schedule's first fault strikes: of its story's kinds one that was not yet killed
    at, the rarest first, so that schedules one after another go through every transition that any story takes."""
    kinds = [sorted(set(undisturbed(story).steps)) for story in range(STORIES)]
    stories_with = Counter(kind for mine in kinds for kind in mine)
    left, found = set(stories_with), []
    for seed in range(SCHEDULES):
        mine = kinds[seed % STORIES]
        fresh = [kind for kind in mine if kind in left]
        rarest = min(fresh, key=lambda kind: (stories_with[kind], kind), default=None)
        found.append(rarest or mine[seed // STORIES % len(mine)])
        if not may_be_harmless(seed):
            left.discard(found[-1])
    return tuple(found)


def may_be_harmless(seed: int) -> bool:
    """Whether the first fault of this schedule is any of all; it kills in the others."""
    return seed % 4 == 0


def plans_of(seed: int, steps: list[str], rng: random.Random) -> list[Plan]:
    """One to three starts with a fault each. The first strikes at the kind of step that is the seed's, the others
    anywhere."""
    if seed >= SCHEDULES:
        return drains_of(steps, rng)
    first = rng.choice([number for number, step in enumerate(steps) if step == first_kinds()[seed]])
    fault = rng.choice(FAULTS if may_be_harmless(seed) else DEADLY)
    plans: list[Plan] = [{first: fault}]
    for _ in range(rng.randrange(3)):
        plans.append({rng.randrange(len(steps)): rng.choice(FAULTS)})
    return plans


def drains_of(steps: list[str], rng: random.Random) -> list[Plan]:
    """A controller is told to stop while jobs wait for room, and dies while it calls them off; so may the next."""
    told = rng.choice([number for number, step in enumerate(steps) if step.endswith("train/attempts/N/job.json")])
    order: Fault = rng.choice(("terminate", "stop_file"))
    if rng.random() < 0.7:
        plans: list[Plan] = [{told: order, "cancel": "kill_after"}]
    else:
        plans = [{told: order, told + rng.randrange(1, DRAIN_STEPS): rng.choice(DEADLY)}]
    if rng.random() < 0.5:
        plans.append({rng.randrange(DRAIN_STEPS): rng.choice(FAULTS)})
    return plans


def run_schedule(seed: int, root: Path) -> Played:
    """Runs the schedule of a seed and checks what must hold. Raises AssertionError with the command to replay it."""
    rng = random.Random(f"schedule {seed}")
    story = seed % STORIES
    expected = undisturbed(story)
    plans = plans_of(seed, expected.steps, rng)
    lot = rng.random()
    troubles = TROUBLES if lot < 0.5 else OUTAGE if lot < 0.6 else Troubles()
    if seed >= SCHEDULES:
        troubles = Troubles()
    with replayable(str(seed), f"story {story}, plans {plans}"):
        played = play(root, story, plans, troubles, rng, room=1 if seed >= SCHEDULES else ROOM)
        check(played, expected)
    return played


def run_spending(seed: int, root: Path) -> Played:
    """A schedule whose budget of hours may end it early, which depends on the order of ends: checked is the sum."""
    rng = random.Random(f"spending {seed}")
    story = seed % STORIES
    plans = plans_of(seed, undisturbed(story).steps, rng)
    budgets = {"cpu_hours": rng.uniform(1000, 3000) / 3600, "gpu_hours": rng.uniform(120, 400) / 3600}
    with replayable(f"--spending {seed}", f"story {story}, plans {plans}, budgets {budgets}"):
        played = play(root, story, plans, rng.choice((TROUBLES, OUTAGE)), rng, budgets)
        check_kept(played)
        check_sums(played)
    return played


@contextlib.contextmanager
def replayable(seed: str, what: str) -> Iterator[None]:
    """Says with what breaks how to run it again."""
    try:
        yield
    except Exception as error:
        raise AssertionError(
            f"schedule {seed} ({what}) broke: {error!r}; replay it with\n    python -m tests.faults.schedules {seed}"
        ) from error


# --- what must hold ---------------------------------------------------------------------------------------------------


def check(played: Played, expected: Played) -> None:
    """Nothing finished is lost, nothing ran twice to a result, the ledger verifies, budgets add up, the end is same."""
    check_kept(played)
    check_sums(played)
    mine, theirs = (read_ledger(one.told.folder.ledger) for one in (played, expected))
    assert told(mine) == told(theirs), "another story than the undisturbed one"
    assert artefacts(played.told) == artefacts(expected.told)


def check_kept(played: Played) -> None:
    """Nothing finished is lost, nothing ran twice to a result, the ledger verifies, looks add up."""
    for before, after in zip(played.ledgers, played.ledgers[1:], strict=False):
        whole = before.splitlines(keepends=True)
        # The last line may have been torn, or written and not yet secured when its controller died.
        assert after.startswith(b"".join(whole[:-1])), "an event that stood in the ledger is gone"
    again = {key: count for key, count in played.cluster.finished.items() if count != 1}
    assert not again, f"ran twice to a result: {again}"
    assert not played.cluster.queue, "a job runs that nobody waits for"
    assert not played.cluster.disobeyed, f"begun after the order to stop: {played.cluster.disobeyed}"
    assert not played.told.folder.stop_file.exists(), "an order to stop stands after the end"
    mine = read_ledger(played.told.folder.ledger)
    ended = Counter(event.key for event in mine if event.kind == "ended")
    assert set(ended.values()) <= {1}
    said = {event.key: event.data["end"]["outcome"] for event in mine if event.kind == "ended"}
    finished = {key for key, outcome in said.items() if outcome in ("finished", "diverged")}
    assert finished == set(played.cluster.finished), "what finished and what the ledger says finished differ"
    for event in mine:
        if event.kind == "ended":
            check_files(played.told, event)
    check_looks(played)


def check_files(story: Invented, event: Event) -> None:
    """The files that a stage left are those whose digests stand in the ledger."""
    number, name, seed, stage = event.key.split("/")
    folder = story.folder
    place = folder.closing / name / seed if number == "0" else folder.run(int(number), name, int(seed))
    for file, digest in event.data["files"].items():
        check_file(place / stage / file, digest)


def check_sums(played: Played) -> None:
    """A stage is charged what its attempts took, each once, and nothing began that could exceed a budget.

    Where nobody measured, it is charged no less, and more only by the time that a sign of life was due.
    """
    for event in read_ledger(played.told.folder.ledger):
        if event.kind == "ended":
            attempts = played.cluster.took[event.key]
            least, most = (sum(one, Spend()) for one in zip(*attempts, strict=True))
            for name, charged in vars(of_end(event.data["end"])).items():
                fits = getattr(least, name) - 1e-5 < charged < getattr(most, name) + 1e-5
                assert fits, f"{event.key} took {attempts}, charged {name} {charged}"
    assert not played.cluster.exceeded, f"begun though a budget could be exceeded: {played.cluster.exceeded}"


def told(events: list[Any]) -> dict[tuple[str, str], Any]:
    """What the ledger tells, without what the machine decides: order of ends, times, attempts, folders and pauses."""
    found = {}
    for event in events:
        if event.kind in ("paused", "resumed"):
            continue
        data = json.loads(json.dumps(event.data))
        data.pop("substrate_folder", None)
        data.pop("judge_folder", None)
        if event.kind == "ended":
            data["end"].pop("attempts")
        if event.kind == "proposed":
            data["call"].pop("seconds")
        found[event.kind, event.key] = data
    return found


def artefacts(story: Invented) -> dict[str, bytes]:
    """Every policy, edit and evidence, and the account of looks, byte for byte."""
    root = story.folder.root
    names = ("policy.yaml", "edits.json", "evidence.json", "looks.jsonl")
    return {str(path.relative_to(root)): path.read_bytes() for name in names for path in root.rglob(name)}


def check_looks(played: Played) -> None:
    """No more looks than the budget, each paid once, and each before its answer was asked."""
    folder, rules = played.told.folder, played.told.campaign.constitution
    paid = folder.looks.read_bytes() if folder.looks.exists() else b""  # a budget may end it before any
    looks = [json.loads(line) for line in paid.splitlines()]
    keys = [(*look["candidates"], look["round"], look["split"]) for look in looks]
    assert len(set(keys)) == len(keys), "a look was paid twice"
    spent = sum(look["split"].startswith("external") for look in looks)
    assert spent <= rules.external_looks
    assert not played.cluster.unpaid, f"asked before it was paid: {played.cluster.unpaid}"


def main() -> None:
    """Replays the schedules named on the command line."""
    runs = run_spending if "--spending" in sys.argv else run_schedule
    for seed in (int(word) for word in sys.argv[1:] if word.isdigit()):
        with tempfile.TemporaryDirectory() as folder:
            played = runs(seed, Path(folder))
        print(
            json.dumps(
                {"seed": seed, "starts": played.starts, "struck": played.struck, "befell": played.cluster.befell}
            )
        )


if __name__ == "__main__":
    main()
