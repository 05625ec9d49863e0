"""Faults on real jobs: tiny campaigns whose controller, supervisors, jobs, warm parent and workers are killed.

    python -m tests.faults.real_jobs --faults 60 [--seed 0]      a longer run: one JSON line a campaign, and the sum
    python -m tests.faults.real_jobs --schedules 32 [--seed 0]   one to three faults each, on campaigns of four seeds

One fault is one blow that was seen to fall: a process that was killed, a controller that was told to stop, a byte that
was flipped. A campaign has one round with one explorer; transitions and moments are drawn from a seed.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from megatron_evolve.audit import verify_campaign
from tests.megatron_evolve.test_loop import artefacts
from tests.megatron_evolve.test_resume import STARTUP, strike, supervisors
from tests.megatron_evolve.tiny import Ground, environment, events, settings_on

START_SECONDS = 300  # a loaded machine; 10 on an idle one

# Where the controller dies, in the order of a campaign of one round.
POINTS = (
    "os.rename */campaign.yaml",
    "os.rename */constitution.yaml",
    "os.rename */rounds/1/policy.yaml",
    "os.rename */rounds/1/edits.json",
    "os.rename */rounds/1/*/delta.yaml",
    "os.rename */rounds/1/*/train/attempts/1/job.json",
    "os.rename */rounds/1/*/dev/attempts/1/job.json",
    "open */looks.jsonl",
    "os.rename */rounds/1/*/external-a/attempts/1/job.json",
    "os.rename */rounds/1/*/external-b/attempts/1/job.json",
    "os.rename */rounds/1/evidence.json",
    "os.rename */rounds/2/policy.yaml",
    "os.rename */rounds/2/edits.json",
    "os.rename */closing/*/attempts/1/job.json",
    "os.rename */report.html",
)
FROM_OUTSIDE = ("job", "supervisor", "warm parent", "worker")
STORIES = 4  # campaigns of a seed each, which schedules share
SMALL = {"rounds": 1, "workers": 2, "anchor_seeds": 1, "external_looks": 4}


@dataclass(frozen=True)
class Plan:
    """What strikes a campaign.

    deaths       points at which its controller dies, a start each; the start after them runs to the end
    stop_before  the start before which one is told to stop, by a stop file or by SIGTERM; None: nowhere
    flip_before  the start before which a bit of the ledger is flipped, and then flipped back; None: nowhere
    blows        who else dies, in the first start that has one
    """

    deaths: tuple[str, ...]
    stop_before: int | None
    by_file: bool
    flip_before: int | None
    blows: tuple[str, ...]


def many(seed: int) -> Plan:
    """Some ten faults."""
    rng = random.Random(seed)
    stop_before, flip_before = rng.sample(range(2, 7), 2)
    blows = tuple(rng.sample(FROM_OUTSIDE, 2))  # a third loss of one job would be its end, and another story
    return Plan(_points(rng, 7), stop_before, seed % 2 == 1, flip_before, blows)


def few(seed: int) -> Plan:
    """One to three, a death of the controller among them."""
    rng = random.Random(f"few {seed}")
    more = rng.sample(("death", "death", "stop", "flip", *FROM_OUTSIDE), rng.randrange(3))
    deaths = _points(rng, 1 + more.count("death"))
    return Plan(
        deaths,
        rng.randrange(len(deaths) + 1) if "stop" in more else None,
        rng.random() < 0.5,
        rng.randrange(1, len(deaths) + 1) if "flip" in more else None,
        tuple(one for one in more if one in FROM_OUTSIDE),
    )


def _points(rng: random.Random, number: int) -> tuple[str, ...]:
    return tuple(POINTS[place] for place in sorted(rng.sample(range(len(POINTS)), number)))


@dataclass
class Struck:
    """A campaign after its faults."""

    folder: Path
    fell: list[str] = field(default_factory=list)
    last: tuple[int, str] | None = None  # exit status and words


def small(ground: Ground, file: Path, story: int = 0) -> Path:
    """The campaign file: the tiny campaign's, one round, one explorer, one run each; a seed for each story."""
    settings = settings_on(ground.substrate)
    settings["seed"] += story
    settings["constitution"] |= SMALL
    settings["search"]["replicates"] |= {"confirm_candidates": 0, "confirm_seeds": 0}
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    return file


def controller(ground: Ground, folder: Path, file: Path, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        ground.arguments(folder, file=file),
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def torment(ground: Ground, folder: Path, file: Path, plan: Plan, seed: int) -> Struck:
    """Runs one campaign to its end through the faults of a plan; moments are drawn from the seed."""
    rng, struck = random.Random(f"moments {seed}"), Struck(folder)
    for number, point in enumerate((*plan.deaths, None)):
        if number == plan.stop_before:
            stop(ground, struck, file, rng, by_file=plan.by_file)
        if number == plan.flip_before:
            flip(ground, struck, file, rng)
        kinds = tuple(kind for kind in plan.blows if kind not in struck.fell)
        running = controller(ground, folder, file, first=STARTUP, **({"TEST_KILL_AT": point} if point else {}))
        struck.fell += strike(kinds, ground, folder, running)
        said, _ = running.communicate(timeout=START_SECONDS)
        struck.last = running.returncode, said
        if point and running.returncode == -signal.SIGKILL:
            struck.fell.append(point)
        elif running.returncode != 0:  # it may have closed: what was promoted decides what the end runs
            raise AssertionError(f"seed {seed}: expected death at {point or 'no point'}, got {struck.last}; {plan}")
    return struck


def stop(ground: Ground, struck: Struck, file: Path, rng: random.Random, *, by_file: bool) -> None:
    """SIGTERM or a stop file, some time after the start: it drains and says so."""
    running = controller(ground, struck.folder, file)
    deadline = time.monotonic() + START_SECONDS
    known, more = _events(struck.folder), rng.randrange(1, 4)
    while running.poll() is None and _events(struck.folder) < known + more and time.monotonic() < deadline:
        time.sleep(0.02)
    if by_file:
        (struck.folder / "stop").touch()
    elif running.poll() is None:
        running.send_signal(signal.SIGTERM)
    said, _ = running.communicate(timeout=START_SECONDS)
    assert running.returncode in (0, 75), said
    if running.returncode == 75:
        struck.fell.append("stop file" if by_file else "SIGTERM")


def flip(ground: Ground, struck: Struck, file: Path, rng: random.Random) -> None:
    """One bit of a file that the controller reads when it starts: it refuses, naming the file, and changes nothing."""
    path = struck.folder / "ledger.jsonl"
    whole = path.read_bytes() if path.exists() else b""
    if not whole:
        return
    place = rng.randrange(len(whole) - 1)
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    refused = ground.run(struck.folder, file=file)
    assert refused.returncode == 1, refused.stdout
    assert path.name in "".join(refused.stderr.split()), refused.stderr
    path.write_bytes(whole)
    struck.fell.append("flipped byte")


def _events(folder: Path) -> int:
    path = folder / "ledger.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def check(struck: Struck, undisturbed: Path) -> None:
    """It closed, found the same, verifies, and nothing ran twice to a result."""
    assert struck.last[0] == 0, struck.last[1]
    assert artefacts(struck.folder) == artefacts(undisturbed)
    roots = (struck.folder, undisturbed)
    mine, theirs = ([one["key"] for one in events(root) if one["kind"] == "ended"] for root in roots)
    assert sorted(mine) == sorted(theirs)
    for folder in {path.parent for path in struck.folder.rglob("attempts")}:
        attempts = sorted((folder / "attempts").iterdir(), key=lambda path: int(path.name))
        kinds = [json.loads((path / "outcome.json").read_bytes())["kind"] for path in attempts]
        assert kinds[-1] == "finished" and kinds.count("finished") == 1, f"{folder}: {kinds}"
        assert set(kinds[:-1]) <= {"lost", "cancelled"}, f"{folder}: {kinds}"
    looks = [json.loads(line) for line in (struck.folder / "looks.jsonl").read_bytes().splitlines()]
    assert sum(look["split"].startswith("external") for look in looks) <= SMALL["external_looks"]
    found = verify_campaign(struck.folder)
    assert found["ok"], found
    assert not list(supervisors(struck.folder))


def main() -> None:
    """A longer run, for the record."""
    parser = argparse.ArgumentParser(prog="tests.faults.real_jobs", description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=60, help="go on until this many fell")
    parser.add_argument("--schedules", type=int, help="instead: so many schedules of one to three faults")
    parser.add_argument("--seed", type=int, default=0, help="of the first campaign")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        ground = Ground(Path(scratch))
        source = "from pathlib import Path\nfrom tests.megatron_evolve.tiny import build_tiny\n"
        build = [sys.executable, "-c", f"{source}build_tiny(Path({str(ground.substrate)!r}))"]
        subprocess.run(build, env=environment(), check=True, capture_output=True)
        record(ground, arguments.seed, arguments.faults, arguments.schedules)


def record(ground: Ground, seed: int, faults: int, schedules: int | None) -> None:
    """Runs campaigns until so many faults fell, or so many schedules; tells each, and the sum."""
    fell: Counter[str] = Counter()
    numbers = count(seed) if schedules is None else range(seed, seed + schedules)
    struck_none = 0
    for number in numbers:
        story, plan = (0, many(number)) if schedules is None else (number % STORIES, few(number))
        file, calm = ground.root / f"small-{story}.yaml", ground.root / f"calm-{story}"
        if not file.exists():
            ended = ground.run(calm, file=small(ground, file, story))
            assert ended.returncode == 0, ended.stderr
        started = time.monotonic()
        struck = torment(ground, ground.root / str(number), file, plan, number)
        check(struck, calm)
        fell.update(struck.fell)
        struck_none += not struck.fell
        row: dict[str, Any] = {"seed": number, "story": story, "fell": struck.fell}
        print(json.dumps(row | {"seconds": round(time.monotonic() - started, 1)}), flush=True)
        shutil.rmtree(struck.folder)
        if schedules is None and fell.total() >= faults:
            break
    run = number - seed + 1
    print(json.dumps({"campaigns": run, "none_fell": struck_none, "faults": fell.total(), "by_kind": dict(fell)}))


if __name__ == "__main__":
    main()
