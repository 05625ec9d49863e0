"""Pruning: the space of what a finished part of a campaign needs no more, given back without losing a fact.

    may go at once       checkpoints to go on from, and unfinished files of an hour ago, of runs whose training ended;
                         the warm parent's log while no controller lives
    may go after a round weights of its candidates, but for those that --keep names:
                         leading   the standing settings before and after the round, and the explorer it selected
                         standing  the standing settings as they are now, where a round ran them
                         all       none goes
    never goes           ledger, looks, campaign, policies, edits, evidence, candidates, proposals, results, scores,
                         metrics, logs, how jobs ended, the manifests of checkpoints with their digests; runs of the
                         standing settings, of the origin, of the closing and of `try`

What goes is entered in `pruned.jsonl` before it goes, one line a thing, with the digest of its manifest; `verify` takes
weights as pruned only by such a line. The manifest stays, so that what was there is still known by its sha256. A
campaign that runs may be pruned: its controller never returns to a closed round or to a run whose training ended.
"""

import contextlib
import errno
import functools
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_evolve.artefacts import CampaignFolder, load_json, load_yaml_checked
from megatron_evolve.candidate import candidate_id
from megatron_evolve.launch.rundir import Lock, RunDirError, sync_folder
from megatron_evolve.launch.warm_client import LOG_FILE as WARM_LOG
from megatron_evolve.ledger import Event, read_ledger
from megatron_evolve.live import controller_of
from megatron_evolve.policy import SearchPolicy
from megatron_evolve.substrate.digest import digest_file
from megatron_evolve.substrate.train.checkpoint import MANIFEST
from megatron_evolve.substrate.train.fit import RESUME_FOLDER
from megatron_evolve.substrate.train.open import CHECKPOINT_FOLDER

Keep = Literal["leading", "standing", "all"]
LOCK_FILE = "prune.lock"
LEFT_S = 3600.0  # an unfinished file of that age has no writer; a supervisor may yet be writing its last line
WEIGHTS, RESUME, LEFT_BEHIND, WARM = "weights", "resume checkpoints", "unfinished files", "warm parent's log"


@dataclass(frozen=True)
class Waste:
    """Something that may go: what it is, the files or folders of it, whose manifest stays."""

    what: str
    paths: tuple[Path, ...]
    manifest: str | None = None  # digest of the file that still tells what was there

    @property
    def num_bytes(self) -> int:
        return sum(_bytes_of(path) for path in self.paths)


def prune(root: Path, *, keep: str, dry_run: bool) -> dict[str, Any]:
    """What goes, in how many bytes, and, unless `dry_run`, its removal.

    Raises ValueError for a folder without a campaign or a `keep` that is none, LockHeld beside another prune.
    """
    if keep not in get_args(Keep):
        raise ValueError(f"--keep takes {', '.join(get_args(Keep))}; got {keep!r}")
    folder = CampaignFolder(root)
    events = read_ledger(folder.ledger)
    told = []
    with contextlib.nullcontext() if dry_run else Lock(folder.root / LOCK_FILE):
        for one in list(waste(folder, events, keep)):
            names = [path.relative_to(folder.root).as_posix() for path in one.paths]
            told.append({"what": one.what, "paths": names, "bytes": one.num_bytes})
            if not dry_run:
                _enter(folder, {**told[-1], "manifest": one.manifest})
                for path in one.paths:
                    _remove(path)
    return {"keep": keep, "dry_run": dry_run, "bytes": sum(one["bytes"] for one in told), "pruned": told}


def waste(folder: CampaignFolder, events: list[Event], keep: str) -> Iterator[Waste]:
    """Everything that may go now, in the order of the ledger."""
    closed = {int(event.key) for event in events if event.kind == "round-closed"} if keep != "all" else set()
    kept_of = functools.cache(lambda number: _kept(folder, events, number, keep))
    for event in events:
        if event.kind != "ended":
            continue
        number, name, seed, stage = event.key.split("/")
        run_dir = folder.run(int(number), name, int(seed)) / stage
        yield from _of_ended_stage(run_dir)
        if stage == "train" and int(number) in closed and name not in kept_of(int(number)):
            yield from _weights(run_dir / CHECKPOINT_FOLDER)
    controller = controller_of(folder)
    log = folder.root / WARM_LOG
    if log.exists() and log.stat().st_size and (controller is None or controller.alive is False):
        yield Waste(WARM, (log,))


def pruned_weights(folder: CampaignFolder) -> dict[str, str]:
    """Checkpoint folders whose weights were pruned, by their path within the campaign: digest of the manifest."""
    try:
        lines = folder.pruned.read_bytes().split(b"\n")[:-1]  # a line without its end was torn: nothing followed it
    except FileNotFoundError:
        return {}
    found = {}
    for line in lines:
        try:
            entry = json.loads(line)
            if entry["what"] == WEIGHTS:
                found[str(Path(entry["paths"][0]).parent)] = entry["manifest"]
        except (ValueError, RecursionError, KeyError, IndexError, TypeError):
            raise ValueError(f"{folder.pruned} is damaged at {line[:40]!r}: restore it from a copy") from None
    return found


def words(found: dict[str, Any]) -> str:
    """What went, by kind, for people."""
    if not found["pruned"]:
        return "nothing to prune"
    kinds: dict[str, list[int]] = {}
    for one in found["pruned"]:
        kinds.setdefault(one["what"], []).append(one["bytes"])
    lines = [f"  {sum(sizes) / 1e6:12,.1f} MB  {len(sizes):5,} x {what}" for what, sizes in kinds.items()]
    verb = "would free" if found["dry_run"] else "freed"
    return "\n".join([f"{verb} {found['bytes'] / 1e6:,.1f} MB, keeping weights: {found['keep']}", *lines])


def _kept(folder: CampaignFolder, events: list[Event], number: int, keep: str) -> set[str]:
    """Candidates of a closed round whose weights stay."""
    if keep == "standing":
        last = max(int(event.key) for event in events if event.kind == "policy")
        return {_standing(folder, events, last)}
    digest = next(event.data["digest"] for event in events if event.kind == "evidence" and event.key == str(number))
    evidence = load_json(folder.evidence(number), digest)
    return {evidence["anchor"], evidence["selected"], _standing(folder, events, number + 1)}


def _standing(folder: CampaignFolder, events: list[Event], number: int) -> str:
    """The candidate that the standing settings of a round's policy are."""
    opened = next(event.data for event in events if event.kind == "campaign-opened")
    digest = next(event.data["digest"] for event in events if event.kind == "policy" and event.key == str(number))
    path = folder.policy(number)
    policy = SearchPolicy.parse(load_yaml_checked(path, digest), where=str(path))
    return candidate_id(opened["substrate"], policy.standing)


def _of_ended_stage(run_dir: Path) -> Iterator[Waste]:
    resume = run_dir / RESUME_FOLDER
    if resume.is_dir():
        yield Waste(RESUME, (resume,))
    if run_dir.is_dir():
        unfinished = tuple(sorted(path for path in run_dir.iterdir() if _is_unfinished(path)))
        if unfinished:
            yield Waste(LEFT_BEHIND, unfinished)


def _is_unfinished(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp") and time.time() - path.stat().st_mtime > LEFT_S


def _weights(checkpoint: Path) -> Iterator[Waste]:
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return
    files = tuple(sorted(path for path in checkpoint.iterdir() if path != manifest))
    if files:
        yield Waste(WEIGHTS, files, digest_file(manifest))


def _bytes_of(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())


def _enter(folder: CampaignFolder, facts: dict[str, Any]) -> None:
    """Appends one line, which is on disk when this returns. Raises RunDirError."""
    line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **facts}).encode() + b"\n"
    fresh = not folder.pruned.exists()
    with open(folder.pruned, "ab+", buffering=0) as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(whole)
            raise RunDirError(
                f"expected to enter what goes in {folder.pruned}, got {(error.strerror or str(error)).lower()}: free "
                "a little space on that disk, then run the same command again"
            ) from error
    if fresh:
        sync_folder(folder.root)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    sync_folder(path.parent)
