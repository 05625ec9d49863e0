"""Killed again and again, at every kind of moment, a campaign ends as the one that nobody interrupted.

One campaign, its judge included, is started once per kill point. The controller kills itself by SIGKILL just before the
point; between points its warm parent, workers, jobs and their supervisors are killed from outside.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from megatron_evolve.launch.process import ProcessIdentity, all_stats, children_of
from tests.megatron_evolve.test_loop import artefacts, story
from tests.megatron_evolve.tiny import Ground, command, environment, events, settings_on

pytestmark = pytest.mark.slow

STARTUP = str(Path(__file__).parent / "startup")
START_SECONDS = 300  # a loaded machine; 10 on an idle one

# Where the controller dies, in the order of a campaign, and who else dies on the way there.
POINTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("os.rename */judges/*/spec.json", ()),
    ("os.rename */origin/rounds/0/*/runs/*/train/attempts/1/job.json", ()),
    ("os.rename */judge/origin.json", ("warm parent", "supervisor", "job")),
    ("os.rename */campaign/campaign.yaml", ()),
    ("os.rename */campaign/rounds/1/edits.json", ()),
    ("os.rename */campaign/rounds/1/*/delta.yaml", ("worker",)),
    ("os.rename */campaign/rounds/1/*/train/attempts/1/job.json", ()),
    ("os.rename */campaign/rounds/1/*/dev/attempts/1/job.json", ("job",)),
    ("open */campaign/looks.jsonl", ()),
    ("os.rename */campaign/rounds/1/*/external-a/attempts/1/job.json", ("warm parent", "supervisor")),
    ("os.rename */campaign/rounds/1/evidence.json", ("job",)),
    ("os.rename */campaign/rounds/2/policy.yaml", ()),
    ("os.rename */campaign/rounds/2/edits.json", ()),
    ("os.rename */campaign/rounds/2/evidence.json", ("worker", "supervisor", "warm parent")),
    ("os.rename */campaign/rounds/3/*/candidate.json", ()),
    ("os.rename */campaign/closing/*/attempts/1/job.json", ("job",)),
    ("os.rename */campaign/report.html", ("supervisor",)),
)


@dataclass(frozen=True)
class Story:
    """What came of the campaign that was killed."""

    ground: Ground
    folder: Path
    struck: list[str]
    before: list[int]  # events when each start ended
    last: subprocess.CompletedProcess


def supervisors(*roots: Path) -> Iterator[ProcessIdentity]:
    """Live supervisors of attempts below these folders."""
    for root in roots:
        for path in root.rglob("supervisor.json"):
            if not (path.parent / "outcome.json").exists():
                found = ProcessIdentity(**json.loads(path.read_bytes()))
                if found.is_alive:
                    yield found


def victim(kind: str, ground: Ground, folder: Path, controller: int) -> int | None:
    """A live process of this kind, if there is one now."""
    if kind == "worker":
        programs = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children_of(controller)}
        return next((pid for pid, words in programs.items() if b"workers.propose" in words), None)
    running = list(supervisors(ground.root / "origin", ground.store, folder))
    if kind == "supervisor":
        return running[0].pid if running else None
    if kind == "job":
        return next((pid for one in running for pid in children_of(one.pid)), None)
    pointer = folder / "warm.json"
    if not running or not pointer.exists():
        return None
    parent = ProcessIdentity(**json.loads(pointer.read_bytes())["parent"])
    return parent.pid if parent.is_alive else None


def strike(kinds: tuple[str, ...], ground: Ground, folder: Path, controller: subprocess.Popen) -> list[str]:
    """Kills one process of each kind, in order, while the controller lives."""
    struck: list[str] = []
    deadline = time.monotonic() + START_SECONDS
    while len(struck) < len(kinds) and controller.poll() is None and time.monotonic() < deadline:
        try:
            found = victim(kinds[len(struck)], ground, folder, controller.pid)
            if found is not None:
                os.kill(found, signal.SIGKILL)
                struck.append(kinds[len(struck)])
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        time.sleep(0.005)
    return struck


@pytest.fixture(scope="module")
def killed(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The campaign after all its deaths."""

    mine = Ground(tmp_path_factory.mktemp("resume"))
    shutil.copytree(ground.substrate, mine.substrate)
    mine.file.write_text(yaml.safe_dump(settings_on(mine.substrate), sort_keys=False))
    folder, struck, before = mine.root / "campaign", [], []
    for point, kinds in POINTS:
        controller = subprocess.Popen(
            mine.arguments(folder),
            env=environment(first=STARTUP, TEST_KILL_AT=point),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        struck += strike(kinds, mine, folder, controller)
        _, said = controller.communicate(timeout=START_SECONDS)
        if controller.returncode == 0 and events(folder)[-1]["data"]["final"]["same"]:
            break  # this machine's arithmetic promoted nothing, so that the end has nothing to run
        assert controller.returncode == -signal.SIGKILL, f"{point} was not reached: {said}"
        before.append(len(events(folder)))
    return Story(mine, folder, struck, before, mine.run(folder))


def test_every_blow_fell_and_the_campaign_closed(killed: Story) -> None:
    assert killed.last.returncode == 0, killed.last.stderr
    assert Counter(killed.struck) == Counter(kind for _, kinds in POINTS[: len(killed.before)] for kind in kinds)
    assert len(killed.before) >= 14
    assert killed.before == sorted(killed.before), "no event was lost"
    assert len(set(killed.before)) >= 10, "the points lie apart"


def test_it_found_what_the_uninterrupted_campaign_found(killed: Story, ground: Ground) -> None:
    assert artefacts(killed.folder) == artefacts(ground.finished)
    ordered, ends = story(killed.folder)
    expected, expected_ends = story(ground.finished)
    for end in (*ends.values(), *expected_ends.values()):
        end["end"].pop("attempts")
    assert ordered == expected
    assert ends == expected_ends


def test_no_stage_that_ended_was_run_twice(killed: Story) -> None:
    ended = Counter(event["key"] for event in events(killed.folder) if event["kind"] == "ended")
    assert set(ended.values()) == {1}
    folders = {path.parent for root in (killed.folder, killed.ground.root) for path in root.rglob("attempts")}
    assert len(folders) > 60
    for folder in folders:
        attempts = sorted((folder / "attempts").iterdir(), key=lambda path: int(path.name))
        kinds = [json.loads((path / "outcome.json").read_bytes())["kind"] for path in attempts]
        assert kinds.count("finished") == 1, f"{folder}: {kinds}"
        assert kinds[-1] == "finished", f"{folder}: {kinds}"
        assert set(kinds[:-1]) <= {"lost"}, f"{folder}: {kinds}"


def test_it_verifies_and_leaves_no_process(killed: Story) -> None:
    verified = command("verify", killed.folder)
    assert verified.returncode == 0, verified.stderr
    time.sleep(2)  # a parent without launcher and jobs ends within a second
    assert not list(supervisors(killed.ground.root))
    root = str(killed.ground.root).encode()
    mine = [stat.pid for stat in all_stats() if stat.pid != os.getpid() and root in words_of(stat.pid)]
    assert mine == []


def words_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
