"""A whole campaign through the command line: every command works on it, and the same campaign is the same again."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_evolve.ledger import read_ledger
from tests.megatron_evolve.tiny import Ground, command, events

pytestmark = pytest.mark.slow

# What may differ between two runs of one campaign: times, places, and the digests of what holds times.
TIMES = {"time", "hash", "previous", "seconds", "cpu_seconds", "substrate_folder", "judge_folder", "campaign"}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(one) for name, one in value.items() if name not in TIMES}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def story(folder: Path) -> tuple[list[Any], dict[str, Any]]:
    """The events in order, and the ends of stages by key: which of two jobs ends first is the machine's business."""
    others, ends = [], {}
    for event in events(folder):
        data = without_times(event["data"])
        data.pop("files", None)  # results and scores hold their seconds
        if event["kind"] == "ended":
            ends[event["key"]] = data
            continue
        if event["kind"] == "evidence":
            data = {}  # the artefact holds cpu-seconds: compared itself below
        others.append((event["kind"], event["key"], data))
    return others, ends


def artefacts(folder: Path) -> dict[str, Any]:
    """Every policy as bytes, every evidence without its times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("rounds/*/*")):
        name = path.relative_to(folder).as_posix()
        if path.name in ("policy.yaml", "edits.json"):
            found[name] = path.read_bytes()
        elif path.name == "evidence.json":
            found[name] = without_times(json.loads(path.read_bytes()))
    return found


def test_the_campaign_ran_to_its_end(ground: Ground) -> None:
    answer = json.loads((ground.root / "answer.json").read_text())
    assert (answer["campaign"], answer["state"], len(answer["rounds"])) == ("tiny", "closed", 2)
    assert Path(answer["report"]).stat().st_size > 10_000
    assert answer["closing"]["finding"].endswith(".")
    read_ledger(ground.finished / "ledger.jsonl")
    for one in answer["rounds"]:
        anchors = [found for found in one["candidates"] if found["role"] == "anchor"]
        assert len(anchors) == 1
        assert len(anchors[0]["runs"]) == 2
        assert all(run["outcome"] == "finished" for found in one["candidates"] for run in found["runs"])


def test_status_verify_explain_and_report_work_on_it(ground: Ground, tmp_path: Path) -> None:
    status = json.loads(command("status", ground.finished, "--json").stdout)
    answer = json.loads((ground.root / "answer.json").read_text())
    assert status == {name: value for name, value in answer.items() if name != "report"}
    verified = command("verify", ground.finished, "--json")
    assert verified.returncode == 0, verified.stdout
    found = json.loads(verified.stdout)
    proposed = sum(event["kind"] == "proposed" for event in events(ground.finished))
    assert (found["ok"], found["first_broken"], found["notes"]) == (True, None, [])
    assert found["replayed_decisions"] == proposed + 2 * 2 + 3, "proposals, evidence, policies, final, survey, finding"
    explained = command("explain", ground.finished, "--round", "1")
    assert explained.returncode == 0
    assert explained.stdout.startswith("Round 1 ")
    assert command("explain", ground.finished, "--round", "9").returncode == 1
    for words in (("status", ground.finished), ("verify", ground.finished), ("report", ground.finished)):
        assert command(*words).returncode == 0


def test_a_second_start_on_the_closed_folder_starts_nothing_and_is_quick(ground: Ground) -> None:
    before = (ground.finished / "ledger.jsonl").read_bytes()
    warm = (ground.finished / "warm.json").stat().st_mtime_ns
    started = time.monotonic()
    ended = ground.run(ground.finished, "--json")
    assert ended.returncode == 0, ended.stderr
    assert time.monotonic() - started < 20, "a loaded machine; 2 s on an idle one"
    assert (ground.finished / "ledger.jsonl").read_bytes() == before
    assert (ground.finished / "warm.json").stat().st_mtime_ns == warm, "no parent was started"


def test_the_same_campaign_again_is_the_same_ledger(ground: Ground, tmp_path: Path) -> None:
    ended = ground.run(tmp_path / "again")
    assert ended.returncode == 0, ended.stderr
    assert artefacts(tmp_path / "again") == artefacts(ground.finished)
    ordered, ends = story(tmp_path / "again")
    expected, expected_ends = story(ground.finished)
    assert ordered == expected
    assert ends == expected_ends


def test_a_researchers_delta_is_tried_against_the_anchor(
    ground: Ground, copy_of_finished: Path, tmp_path: Path
) -> None:
    delta = tmp_path / "delta.yaml"
    change = {"schema": "delta/1", "hypothesis": "A shorter run learns less.", "change": {"recipe.steps": {"set": 4}}}
    delta.write_text(yaml.safe_dump(change))
    before = (copy_of_finished / "ledger.jsonl").read_bytes()
    tried = command("try", delta, "--dir", copy_of_finished, "--seeds", 1, "--json")
    assert tried.returncode == 0, tried.stderr
    found = json.loads(tried.stdout)
    assert found["failures"] == []
    assert found["dev"]["items"] == 60
    assert found["external"] is None
    assert (copy_of_finished / "ledger.jsonl").read_bytes() == before
    assert command("verify", copy_of_finished).returncode == 0
    looks = (copy_of_finished / "looks.jsonl").read_text().splitlines()
    trials = [look for look in map(json.loads, looks) if look["purpose"] == "trial"]
    assert sorted(look["split"] for look in trials) == ["dev-a", "dev-a", "dev-b", "dev-b"]
    change["change"] = {"recipe.steps": {"set": 8}}  # as the substrate's own recipe has it
    delta.write_text(yaml.safe_dump(change))
    same = command("try", delta, "--dir", copy_of_finished, "--seeds", 1)
    assert same.returncode == 1
    assert "changes nothing" in same.stderr
