"""A late round costs what an early one costs, and a resume what the open round costs: counted, not timed."""

import random
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest

from megatron_evolve import review, rounds
from megatron_evolve.desk import Desk
from megatron_evolve.evidence import kept_evidence
from megatron_evolve.ledger import Ledger
from megatron_evolve.policy import SearchPolicy, kept_policy
from tests.faults.cluster import Cluster, FakeLauncher
from tests.faults.files import FaultyFiles
from tests.faults.invented import Invented, campaign, origin
from tests.faults.scale import run_round, world

ROUNDS = 16
EARLY, LATE = slice(6, 10), slice(12, 16)  # rounds whose windows are full


@pytest.mark.slow
def test_a_late_round_reads_no_more_than_an_early_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review, "POOLED_ROUNDS", 3)
    told = Invented(tmp_path, campaign(5, rounds=ROUNDS, workers=2, external_looks=99), origin())
    told.folder.root.mkdir(parents=True)
    files, parsed = FaultyFiles(told.folder.root), Counter()
    cluster = Cluster(random.Random(5), files, own_failures=0)
    steps, events = [], []

    def counted_round(desk: Desk, policy: SearchPolicy) -> SearchPolicy:
        before = len(files.steps), parsed.total()
        following = run_round(desk, policy)
        steps.append(len(files.steps) - before[0])
        events.append(parsed.total() - before[1])
        return following

    def counted(self: Ledger, line: bytes, number: int) -> object:
        parsed[number] += 1
        return real(self, line, number)

    real = Ledger._parsed
    monkeypatch.setattr(Ledger, "_parsed", counted)
    with world(cluster), files, mock.patch.object(rounds, "run_round", counted_round):
        with told.opened() as (ledger, account):
            told.control(ledger, account, FakeLauncher(cluster), lambda: False)
            told_events = len(ledger)
        # Opened again, it reads each line once, the last policy and nothing of closed rounds.
        parsed.clear()
        files.start({})
        for remembered in (kept_policy, kept_evidence):
            remembered.cache_clear()
        with told.opened() as (ledger, account):
            rounds.run_campaign_rounds(told.desk(ledger, account, FakeLauncher(cluster), lambda: False))
    assert max(steps[LATE]) <= 1.1 * max(steps[EARLY]), steps
    assert max(events[LATE]) <= 1.1 * max(events[EARLY]), events
    assert parsed.total() <= told_events + 5
    assert sum(step.startswith("read") for step in files.steps) <= 12, files.steps
