"""The control plane at scale: 10,000 candidates over 1,250 rounds by the controller's own code, in logical time.

    python -m tests.faults.scale --rounds 1250 --workers 8 [--copied 1085]      one JSON object: what it cost

Jobs end by drawing answers, a worker is a function in this process that draws a learning rate, and no file is secured
against a power cut (an fsync is the disk's time, not ours). Times are CPU seconds of this process, which the load of a
machine moves less than the clock, and the claim is a ratio within one run. An hour's run becomes minutes with
`--copied`: so many rounds after the first tenth are not run but entered, each with the events, looks and artefacts of
the round before them under its own number, and the registry of dead ends is filled.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_evolve import rounds
from megatron_evolve.artefacts import save_json, save_yaml
from megatron_evolve.dead_ends import MOST_DEAD_ENDS
from megatron_evolve.delta import Base, Change, Delta
from megatron_evolve.desk import Desk
from megatron_evolve.document import OWN_LOADER, load_yaml
from megatron_evolve.eval.looks import Looks
from megatron_evolve.evidence import kept_evidence
from megatron_evolve.launch.rundir import read_json
from megatron_evolve.ledger import Event, History, Ledger
from megatron_evolve.policy import SearchPolicy, kept_policy
from megatron_evolve.workers import seam
from megatron_evolve.workers.brief import Brief, Proposal, document
from megatron_evolve.workers.validate import standing_name
from tests.faults.cluster import Cluster, FakeLauncher
from tests.faults.files import FaultyFiles
from tests.faults.invented import Invented, campaign, origin

SEED = 1250
OWN_FAILURES = 0.1  # of the fault tests' odds: 2 runs of 100 fail


def propose(question: bytes) -> bytes:
    """Draws a learning rate and a weight decay: a space that 10,000 candidates do not exhaust."""
    brief = Brief.parse(json.loads(question), where="brief")
    rng = random.Random(brief.seed)
    change = {
        "recipe.lr": Change(set=round(10 ** rng.uniform(-5, -2), 9)),
        "recipe.weight_decay": Change(set=round(rng.random(), 9)),
    }
    base = Base(substrate=brief.substrate["digest"], recipe=standing_name(brief.policy))
    return json.dumps(
        document(Proposal(brief=brief.digest, delta=Delta(base=base, hypothesis="Drawn.", change=change)))
    ).encode()


@contextlib.contextmanager
def world(cluster: Cluster) -> Iterator[None]:
    """Replaces the clock that is waited on, the worker's process, and the disk's promise."""

    def answered(question: bytes) -> tuple[str, str, bytes]:
        before = time.process_time()
        reply = propose(question)
        if isinstance(cluster, TimedCluster):
            cluster.workers_seconds += time.process_time() - before
        return "ok", "", reply

    with (
        mock.patch.object(time, "sleep", cluster.pass_time),
        mock.patch.object(time, "monotonic", lambda: cluster.now),
        mock.patch.object(seam, "_run", lambda program, scratch, question, *rest: answered(question)),
        mock.patch.object(os, "fsync", lambda descriptor: None),
    ):
        yield


class TimedCluster(Cluster):
    """A cluster that knows what it cost itself, so that it is not taken for the controller's; and what workers cost."""

    seconds = 0.0
    workers_seconds = 0.0

    def pass_time(self, seconds: float) -> None:
        before = time.process_time()
        super().pass_time(seconds)
        self.seconds += time.process_time() - before


class HalfWay(Exception):
    """The rounds before the copied ones are over."""


class Meter:
    """CPU seconds and ledger events of each round of the controller."""

    def __init__(self, cluster: "TimedCluster", keep: int, tell_every: int) -> None:
        self.cluster, self.keep, self.tell_every = cluster, keep, tell_every
        self.seconds: list[float] = []
        self.workers_seconds: list[float] = []  # of those
        self.events: list[int] = []
        self.pause_at: int | None = None

    def _tell(self, policy: SearchPolicy) -> None:
        """How the last part went, for whoever watches a run of an hour."""
        part = slice(-self.tell_every, None)
        row = {"round": policy.round, "cpu_ms_per_event": self.per_event(part), "alone": self.per_event(part, True)}
        row |= {"peak_rss_mb": _peak_mb(), "dead_ends": len(policy.dead_ends)}
        print(json.dumps(row), file=sys.stderr, flush=True)

    def per_event(self, part: slice, alone: bool = False) -> float:
        """CPU milliseconds an event; of the controller `alone`, without its workers, which are functions here."""
        workers = sum(self.workers_seconds[part]) if alone else 0.0
        return 1e3 * (sum(self.seconds[part]) - workers) / sum(self.events[part])

    def round(self, desk: Desk, policy: SearchPolicy) -> SearchPolicy:
        """One round, measured. Raises HalfWay where it is to pause."""
        if policy.round == self.pause_at:
            raise HalfWay
        before, count = time.process_time() - self.cluster.seconds, len(desk.ledger)
        workers_before = self.cluster.workers_seconds
        following = run_round(desk, policy)
        self.workers_seconds.append(self.cluster.workers_seconds - workers_before)
        self.seconds.append(time.process_time() - self.cluster.seconds - before)
        self.events.append(len(desk.ledger) - count)
        if policy.round % self.tell_every == 0:
            self._tell(policy)
        # The disk is no part of the claim: answers that no window reaches any more are dropped as we go.
        past = desk.ground.folder.round(policy.round - self.keep)
        for one in past.glob("*/runs"):
            shutil.rmtree(one)
        return following


run_round = rounds.run_round


def measure(root: Path, num_rounds: int, workers: int, copied: int = 0) -> dict[str, Any]:
    """Runs the campaign, opens it again, and says what both cost."""
    looks = 2 * workers * num_rounds
    told = Invented(root, campaign(SEED, rounds=num_rounds, workers=workers, external_looks=looks), origin())
    told.folder.root.mkdir(parents=True)
    cluster = TimedCluster(random.Random(SEED), FaultyFiles(root / "unwatched"), own_failures=OWN_FAILURES)
    tenth, window = max(1, num_rounds // 10), told.campaign.constitution.gap.window
    meter = Meter(cluster, window + 1, tenth)
    with world(cluster), mock.patch.object(rounds, "run_round", meter.round):
        if copied:
            meter.pause_at = tenth + 1
            with contextlib.suppress(HalfWay):
                control(told, cluster)
            meter.pause_at = None
            copy_rounds(told, tenth, tenth + copied, window)
        control(told, cluster)
    peak = _peak_mb()
    parts = {"first_tenth": slice(tenth), "last_tenth": slice(-min(tenth, num_rounds - tenth - copied), None)}
    per_event = {name: meter.per_event(part) for name, part in parts.items()}
    alone = {name: meter.per_event(part, True) for name, part in parts.items()}
    history = History(told.folder.ledger)
    return {
        "rounds": num_rounds,
        "rounds_run": len(meter.seconds),
        "candidates": len({tuple(key.split("/")[:2]) for key in history.keys("ended") if key.endswith("/train")}),
        "events": len(history),
        "ledger_bytes": told.folder.ledger.stat().st_size,
        "looks": told.folder.looks.read_bytes().count(b"\n"),
        "cpu_ms_per_event": {**per_event, "ratio": per_event["last_tenth"] / per_event["first_tenth"]},
        "without_workers": {**alone, "ratio": alone["last_tenth"] / alone["first_tenth"]},
        "cpu_s_per_round": {name: _quantiles(meter.seconds[part]) for name, part in parts.items()},
        "dead_ends": len(kept_policy_of(told, num_rounds + 1).dead_ends),
        "peak_rss_mb": peak,
        "resume_cpu_s": resume(told),
    }


def control(told: Invented, cluster: Cluster) -> None:
    """One controller."""
    with told.opened() as (ledger, account):
        told.control(ledger, account, FakeLauncher(cluster), lambda: False)


def copy_rounds(told: Invented, model: int, last: int, window: int) -> None:
    """Enters rounds after `model` up to `last` as if each had gone like it; answers only where a window reaches."""
    folder, its_own = told.folder, shutil.ignore_patterns("policy.yaml", "edits.json", "evidence.json")
    policy, evidence = load_yaml(folder.policy(model + 1), OWN_LOADER), read_json(folder.evidence(model))
    known = policy["dead_ends"]
    more = [known[0] | {"candidate": f"{place:012x}"} for place in range(MOST_DEAD_ENDS - len(known))] if known else []
    policy["dead_ends"] = known + more
    account = Looks(folder.looks, external_budget=told.campaign.constitution.external_looks)
    looks = [look for look in account.entries if look.round == model]
    with closing(Ledger(folder.root)) as ledger:
        events = [event for event in ledger if _round_of(event) == model]
        for number in range(model + 1, last + 1):
            if number > last - window:
                shutil.copytree(folder.round(model), folder.round(number), ignore=its_own, dirs_exist_ok=True)
            digests = {
                "evidence": {"digest": save_json(folder.evidence(number), evidence | {"round": number})},
                "policy": {
                    "digest": save_yaml(folder.policy(number + 1), policy | {"round": number + 1}),
                    "edits": save_json(folder.edits(number + 1), []),
                },
            }
            for event in events:
                first, slash, rest = event.key.partition("/")
                data = digests.get(event.kind, event.data | ({"round": number} if "round" in event.data else {}))
                ledger.append(event.kind, f"{int(first) + number - model}{slash}{rest}", data)
            for look in looks:
                account.pay(look.replace(round=number))


def _round_of(event: Event) -> int | None:
    first = event.key.partition("/")[0]
    return int(first) - (event.kind == "policy") if first.isdigit() else None


def kept_policy_of(told: Invented, number: int) -> SearchPolicy:
    with closing(Ledger(told.folder.root)) as ledger:
        return kept_policy(told.folder.policy(number), ledger.find("policy", str(number)).data["digest"])


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "least": ordered[0], "most": ordered[-1]}


def resume(told: Invented) -> list[float]:
    """Three times: the ledger of the campaign, as it was before its last event, opened and followed to that point."""
    found = []
    copy = Invented(told.root / "again", told.campaign, told.origin)
    shutil.copytree(told.folder.root, copy.folder.root, copy_function=os.link)
    lines = told.folder.ledger.read_bytes().splitlines(keepends=True)
    for _ in range(3):
        copy.folder.ledger.unlink()
        copy.folder.ledger.write_bytes(b"".join(lines[:-1]))
        for remembered in (kept_policy, kept_evidence):
            remembered.cache_clear()  # a new process remembers nothing
        before = time.process_time()
        nowhere = FakeLauncher(Cluster(random.Random(0), FaultyFiles(told.root / "unwatched")))
        with copy.opened() as (ledger, account):
            desk = copy.desk(ledger, account, nowhere, lambda: False)
            rounds.run_campaign_rounds(desk)
        found.append(time.process_time() - before)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tests.faults.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1250)
    parser.add_argument("--workers", type=int, default=8, help="candidates a round, the anchor included")
    parser.add_argument("--dir", type=Path, help="where the campaign is kept; none: it is deleted")
    parser.add_argument("--copied", type=int, default=0, help="rounds in the middle that are entered and not run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = arguments.dir or Path(scratch) / "scale"
        row = measure(place, arguments.rounds, arguments.workers, arguments.copied)
    print(json.dumps(row))


if __name__ == "__main__":
    sys.exit(main())
