"""The external target touches nothing before its time, and no process but the judge's own opens it."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_evolve.audit import verify_campaign
from megatron_evolve.eval.suite import GeneratedSuite, draw
from tests.megatron_evolve.tiny import Ground, events, suite

pytestmark = pytest.mark.slow

STARTUP = str(Path(__file__).parent / "startup")


def proposals(folder: Path) -> dict[str, bytes]:
    """Briefs, proposals and deltas of round 1, byte by byte."""
    names = ("brief.json", "proposal.json", "delta.yaml", "candidate.json")
    found = [path for path in (folder / "rounds" / "1").rglob("*") if path.name in names]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_another_external_suite_changes_no_brief_and_no_delta(
    ground: Ground, own_ground: Ground, variant: Callable[..., Path]
) -> None:
    other = suite(99, {"external-a": 7, "external-b": 7, "final": 9}, weight=9, cue_rate=0.5)
    file = variant(own_ground.settings(), judge__external=other)
    folder = own_ground.root / "campaign"
    ended = own_ground.run(folder, file=file, first=STARTUP, TEST_KILL_AT="os.rename */rounds/1/*/train/*/job.json")
    assert ended.returncode < 0, ended.stderr
    expected = proposals(ground.finished)
    assert len([name for name in expected if name.endswith("brief.json")]) == 2
    assert proposals(folder) == expected
    digests = [next(event["data"]["judge"] for event in events(one)) for one in (folder, ground.finished)]
    assert digests[0] != digests[1], "the judges do differ"


# A worker that runs the default one while the target is nowhere.
WORKER = """
import os, subprocess, sys
from pathlib import Path
target = Path({target!r})
hidden = target.with_name("hidden")
os.rename(target, hidden)
try:
    status = subprocess.call([sys.executable, "-m", "megatron_evolve.workers.propose", *sys.argv[1:]])
    told = Path(sys.argv[1]).read_text() + str(dict(os.environ)) + str(os.listdir("/proc/self/fd"))
    assert str(target) not in told and not target.exists()
finally:
    os.rename(hidden, target)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of generated rows as external target."""
    rows = GeneratedSuite.model_validate(suite(5, {"external-a": 8, "external-b": 8, "final": 8}))
    path = tmp_path_factory.mktemp("target") / "target.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "answer", "family"])
        for split in ("external-a", "external-b", "final"):
            for item in draw(rows, split=split, round_number=1, secret="the rows of the tests"):
                writer.writerow([f"{split}-{item.id}", item.prompt, item.answer, item.family])
    return path


def test_only_the_judge_opens_the_target(
    own_ground: Ground, variant: Callable[..., Path], target: Path, tmp_path: Path
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(target=str(target)))
    file = variant(
        own_ground.settings(),
        judge__external={"kind": "csv", "items": {"external-a": 12, "external-b": 12}, "sealed": 0.3},
        constitution__rounds=1,
        constitution__workers=2,
        constitution__external_looks=4,  # 2 candidates x 2 halves: none is left for the survey's open rows
        worker=[sys.executable, str(worker)],
    )
    folder, log = own_ground.root / "campaign", tmp_path / "opened.jsonl"
    watched = {"TEST_OPENED": str(target), "TEST_OPENED_LOG": str(log)}
    ended = own_ground.run(folder, "--external", str(target), file=file, first=STARTUP, **watched)
    assert ended.returncode == 0, ended.stderr
    opened = [json.loads(line)["process"] for line in log.read_text().splitlines()]
    freezing = [words for words in opened if any("eval/freeze" in word or "eval.freeze" in word for word in words)]
    asking = [words for words in opened if any("eval/run" in word or "eval.run" in word for word in words)]
    names = ("megatron_evolve/reuse.py", "megatron_evolve/rows.py")
    counting = [words for words in opened if any(word.endswith(names) for word in words)]
    assert freezing
    assert asking
    # `reuse` tells how many rounds have rows of their own, `rows` what of them cannot be judged on, and nothing else
    assert len(freezing) + len(asking) + len(counting) == len(opened), "another process opened the target"
    splits = {words[words.index("--splits") + 1] for words in asking}
    assert {"external-a", "external-b"} <= splits <= {"external-a", "external-b", "final"}
    proposed = [event["data"] for event in events(folder) if event["kind"] == "proposed"]
    assert [one["call"]["ending"] for one in proposed] == ["ok"], "the worker ran with the target absent"
    surveyed = next(event["data"] for event in events(folder) if event["kind"] == "survey")
    assert surveyed["unasked"] == ["open"] and surveyed["runs"] > 0
    verified = verify_campaign(folder)
    assert verified["ok"] and ["open rows were not asked" in note for note in verified["notes"]] == [True]
    assert "had spent every external look" in (folder / "report.html").read_text()


def test_what_others_are_given_does_not_name_the_target(
    own_ground: Ground, variant: Callable[..., Path], target: Path
) -> None:
    file = variant(
        own_ground.settings(),
        judge__external={"kind": "csv", "items": {"external-a": 12, "external-b": 12}, "sealed": 0.3},
    )
    folder = own_ground.root / "campaign"
    point = "os.rename */rounds/1/*/dev/*/job.json"
    ended = own_ground.run(folder, "--external", str(target), file=file, first=STARTUP, TEST_KILL_AT=point)
    assert ended.returncode < 0, ended.stderr
    given = [*folder.rglob("brief.json"), *folder.rglob("candidate.json"), *folder.glob("rounds/1/*/runs/*/train/**/*")]
    told = [path for path in given if path.is_file()]
    assert len(told) > 10
    assert [path for path in told if str(target).encode() in path.read_bytes()] == []
