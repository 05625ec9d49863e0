"""Faults on real jobs: tiny campaigns whose controller, supervisors, jobs, warm parent and workers are killed.

    python -m tests.faults.real_jobs --faults 60 [--seed 0]      a longer run: one JSON line a campaign, and the sum

One fault is one blow that was seen to fall: a process that was killed, a controller that was told to stop, a byte that
was flipped. Some ten fall on a campaign of one round with one explorer, at transitions and moments drawn from a seed.
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
DEATHS = 7  # of the controller at points, a campaign
FROM_OUTSIDE = ("job", "supervisor", "warm parent", "worker")
SMALL = {"rounds": 1, "workers": 2, "anchor_seeds": 1, "external_looks": 4}


@dataclass
class Struck:
    """A campaign after its faults."""

    folder: Path
    fell: list[str] = field(default_factory=list)
    last: subprocess.CompletedProcess | None = None


def small(ground: Ground, file: Path) -> Path:
    """The campaign file: the tiny campaign's, one round, one explorer, one run each."""
    settings = settings_on(ground.substrate)
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


def torment(ground: Ground, folder: Path, file: Path, seed: int) -> Struck:
    """Runs one campaign to its end through faults drawn from a seed."""
    rng, struck = random.Random(seed), Struck(folder)
    points = sorted(rng.sample(range(len(POINTS)), DEATHS))
    stops_at, flips_at = rng.sample(points[2:], 2)  # before these it is told to stop, and its ledger is damaged
    blows = rng.sample(FROM_OUTSIDE, 2)  # a third loss of one job would be its end, and another story
    for point in points:
        if point == stops_at:
            stop(ground, struck, file, rng, by_file=seed % 2 == 1)
        if point == flips_at:
            flip(ground, struck, file, rng)
        kinds = tuple(kind for kind in blows if kind not in struck.fell)
        running = controller(ground, folder, file, first=STARTUP, TEST_KILL_AT=POINTS[point])
        struck.fell += strike(kinds, ground, folder, running)
        said, _ = running.communicate(timeout=START_SECONDS)
        if running.returncode == -signal.SIGKILL:
            struck.fell.append(POINTS[point])
        elif running.returncode != 0:  # it may have closed: what was promoted decides what the end runs
            raise AssertionError(f"seed {seed}: expected death at {POINTS[point]}, got {running.returncode}: {said}")
    struck.last = ground.run(folder, file=file)
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
    assert struck.last.returncode == 0, struck.last.stderr
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
    parser.add_argument("--seed", type=int, default=0, help="of the first campaign")
    arguments = parser.parse_args()
    fell: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        ground = Ground(Path(scratch))
        source = "from pathlib import Path\nfrom tests.megatron_evolve.tiny import build_tiny\n"
        build = [sys.executable, "-c", f"{source}build_tiny(Path({str(ground.substrate)!r}))"]
        subprocess.run(build, env=environment(), check=True, capture_output=True)
        file, calm, seed = small(ground, ground.root / "small.yaml"), ground.root / "calm", arguments.seed
        assert ground.run(calm, file=file).returncode == 0
        while fell.total() < arguments.faults:
            started = time.monotonic()
            struck = torment(ground, ground.root / str(seed), file, seed)
            check(struck, calm)
            fell.update(struck.fell)
            row: dict[str, Any] = {"seed": seed, "fell": struck.fell, "seconds": round(time.monotonic() - started, 1)}
            print(json.dumps(row), flush=True)
            shutil.rmtree(struck.folder)
            seed += 1
    print(json.dumps({"campaigns": seed - arguments.seed, "faults": fell.total(), "by_kind": dict(fell)}))


if __name__ == "__main__":
    main()
