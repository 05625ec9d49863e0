"""The command hook: a program that asks a leaderboard for one run's score, in a process group of its own.

    ARGV... FOLDER  ->  stdout: one JSON object {"score": 0.8512, "items": 1200}

The folder is the run's trained weights or adapter. What comes back is a score or why there is none; a reply that is cut
off, late or no number is lost, and whoever asked decides whether it may be asked again.
"""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

POLL_SECONDS = 0.02
MOST_BYTES = 65_536
LAST_WORDS = 300


@dataclass(frozen=True)
class Told:
    """What the program said: a score between 0 and 1, over so many items where it told."""

    score: float
    items: int | None


@dataclass(frozen=True)
class Lost:
    """No score: how it ended (`timed_out`, `crashed`, `lost`) and why, in a sentence."""

    ending: str
    reason: str


def ask_hook(argv: Sequence[str], folder: Path, timeout_s: float) -> Told | Lost:
    """Runs the program once, to its end or its time-out, and takes its whole process group with it."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                [*argv, str(folder)], stdin=subprocess.DEVNULL, stdout=out, stderr=errors, start_new_session=True
            )
        except OSError as error:
            return Lost("crashed", f"{argv[0]} could not be started: {error.strerror or error}")
        in_time = False
        try:
            in_time = ends_within(process.pid, timeout_s)
        finally:
            # Its own session is its process group. The leader is not reaped yet, so the number still means this group.
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        if not in_time:
            return Lost("timed_out", f"{argv[0]} took longer than {timeout_s:g} s and was stopped")
        if status:
            return Lost("crashed", f"{argv[0]} ended with status {status}: {_last_words(errors)}")
        return _read(out)


def ends_within(pid: int, limit_s: float) -> bool:
    """Whether a child of this process ends within the limit. It is left unreaped, so its number still means it."""
    deadline = time.monotonic() + limit_s
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def checked_score(score: Any) -> float:
    """A score as a number. Raises ValueError unless it is one between 0 and 1."""
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    if not is_number or not 0 <= score <= 1:  # a comparison: NaN fails it, and no integer is too large for it
        raise ValueError(f"expected a score between 0 and 1, got {score!r:.60}: give the share that was right")
    return float(score)


def _read(out: IO[bytes]) -> Told | Lost:
    out.seek(0)
    reply = out.read(MOST_BYTES + 1)
    try:
        if len(reply) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        document = json.loads(reply)
        if not isinstance(document, dict) or not {"score"} <= set(document) <= {"score", "items"}:
            raise ValueError(f'expected {{"score": ..., "items": ...}}, got {reply[:60]!r}')
        items = document.get("items")
        if items is not None and (isinstance(items, bool) or not isinstance(items, int)):
            raise ValueError(f"expected a count of items, got {items!r}")
        return Told(checked_score(document["score"]), items)
    except (ValueError, RecursionError) as error:
        return Lost("lost", f"its reply is no score: {error}")


def _last_words(errors: IO[bytes]) -> str:
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 2000))
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:LAST_WORDS] if lines else "it said nothing"
