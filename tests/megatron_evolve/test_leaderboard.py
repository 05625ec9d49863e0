"""A leaderboard in a box: what it hides, what it refuses, and a whole campaign whose external target it is."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_evolve.audit import open_record, verify_campaign
from megatron_evolve.campaign import find_campaign, load_campaign
from megatron_evolve.eval.score import read_rows
from megatron_evolve.launch.rundir import read_json
from megatron_evolve.status import status
from megatron_evolve.worlds.grid import board_judge_of, campaign_of, judge_of, load_grid, truth_judge_of
from megatron_evolve.worlds.leaderboard import argv_of, main, submitted_runs
from tests.megatron_evolve.test_worlds import CODE, FOLDER, grid_of, wait_for
from tests.megatron_evolve.tiny import COMMAND, Ground, command, environment


def test_a_leaderboard_hides_its_items_from_the_campaign(tmp_path: Path) -> None:
    grid, base = load_grid(Path("score-only"))
    (world,) = grid.worlds
    campaign = campaign_of(grid, base, world, 0, CODE, FOLDER, tmp_path / "board")
    board = board_judge_of(base, world, 0, CODE)
    target = campaign.judge.told_scores
    assert (target.kind, target.items, target.step, campaign.claim) == ("command", 1200, 0.01, "infrastructure")
    assert target.command == argv_of(tmp_path / "board", FOLDER, 0.01)
    assert board.external.items_per_family == {"external-b": 200, "final": 400}
    secrets = [board.secret, campaign.judge.secret, truth_judge_of(grid, base, world, CODE).secret]
    secrets.append(board_judge_of(base, world, 1, CODE).secret)
    assert len(set(secrets)) == 4 and board.secret not in str(campaign.model_dump())
    assert campaign.judge.dev == judge_of(base, world, "s" * 16).dev


def test_no_target_tells_scores_alone_to_a_campaign_that_asks_the_origin_again(tmp_path: Path) -> None:
    document = load_campaign(find_campaign("demo")).model_dump(mode="json", by_alias=True)
    document["constitution"]["gap"]["estimands"] = ["selected", "cumulative"]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(document))
    path = grid_of(tmp_path, {"name": "a", "score_only": {"step": 0.01}}, campaign="base.yaml")
    with pytest.raises(ValueError, match="without the cumulative estimand"):
        load_grid(path)


@pytest.mark.parametrize(("step", "said"), [("2", "below 1"), ("0.01", "no result.json")])
def test_a_leaderboard_refuses_in_one_sentence(
    step: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))  # it sets what its jobs need
    words = ["--judge", tmp_path / "judge", "--substrate", tmp_path, "--step", step, tmp_path]
    assert main([str(word) for word in words]) == 1
    out, error = capsys.readouterr()
    assert said in error and len(error.strip().splitlines()) == 1 and not out
    assert submitted_runs(tmp_path / "judge") == []


def test_a_leaderboard_lists_what_was_submitted_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place, run in (("x", "/b/train"), ("y", "/a/train"), ("z", "/b/train")):
        folder = tmp_path / "submissions" / place
        folder.mkdir(parents=True)
        (folder / "submission.json").write_text(json.dumps({"run": run}))
    with pytest.raises(SystemExit):
        main(["--judge", str(tmp_path / "judge"), "--list"])
    assert "expected the folder of a frozen judge" in capsys.readouterr().err, "no judge has no empty list"
    (tmp_path / "judge").mkdir()
    program = (sys.executable, "-m", "megatron_evolve.worlds.leaderboard", "--judge", tmp_path / "judge", "--list")
    ran = subprocess.run(program, env=environment(), capture_output=True, text=True, check=True)
    assert not ran.stderr, "its package doesn't import the program before it runs"
    assert main(["--judge", str(tmp_path / "judge"), "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == ["/a/train", "/b/train", "/b/train"], "twice where twice submitted"
    with pytest.raises(SystemExit):
        main(["--judge", str(tmp_path / "judge")])
    assert "--substrate and a run to score, or --list" in capsys.readouterr().err


def told_grid(own_ground: Ground, tmp_path: Path) -> Path:
    """One campaign whose target is a leaderboard, small enough for a test."""
    settings = own_ground.settings()
    settings["constitution"] |= {"workers": 2, "external_looks": 4}
    base, spec = tmp_path / "base.yaml", tmp_path / "told.yaml"
    base.write_text(yaml.safe_dump(settings, sort_keys=False))
    world = {"name": "told", "cue": {"equation": 0.9}, "dev_weight": {"equation": 5}, "score_only": {"step": 0.01}}
    document = {"schema": "worlds/1", "campaign": str(base), "rounds": 1, "seeds": 1, "worlds": [world]}
    spec.write_text(yaml.safe_dump({**document, "truth": {"dev": 60, "external": 60}}))
    return spec


@pytest.mark.slow
def test_a_target_that_is_a_leaderboard_is_asked_once_a_run(own_ground: Ground, tmp_path: Path) -> None:
    """A whole campaign against the shipped program. Its controller is killed while it waits: that one reply is lost."""
    out = tmp_path / "out"
    words = ("worlds", told_grid(own_ground, tmp_path), "--dir", out, "--store", own_ground.store)
    folder = out / "told" / "1" / "campaign"
    first = subprocess.Popen([*COMMAND, *map(str, words)], env=environment(), stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: list(own_ground.store.glob("judges/*/submissions/*/submission.json")), first)
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    second = command(*words, "--json")
    assert second.returncode == 0, second.stderr

    record = open_record(folder)
    target = record.campaign.judge.told_scores
    board = Path(target.command[target.command.index("--judge") + 1])
    asked = [event.data["run"] for event in record.events.of_kind("external-asked")]
    paid = [run for look in record.looks.entries if look.split.startswith("external") for run in look.runs]
    assert sorted(asked) == sorted(paid) and len(set(asked)) == len(asked) >= 3
    place = folder.resolve() / "rounds" / "1"
    ran = [str(place / name / "runs" / seed / "train") for _, name, seed in (run.split("/") for run in asked)]
    assert submitted_runs(board) == sorted(ran), "the leaderboard itself counted"
    assert len(list(record.events.of_kind("external-lost"))) == 1, "the reply that was awaited when the controller died"
    told = {str(path.parents[1] / "train"): read_json(path) for path in place.glob("*/runs/*/external-b/reported.json")}
    assert len(told) == len(asked) - 1
    for path in board.parent.glob("submissions/*/submission.json"):
        answers = read_rows(path.with_name("scores.parquet")).correct
        one = told.get(read_json(path)["run"])
        assert one is None or (one["score"], one["items"]) == (round(answers.mean(), 2), len(answers))
    assert verify_campaign(folder)["ok"] and status(folder)["state"] == "closed"
    assert board.resolve() not in folder.resolve().parents and not board.resolve().is_relative_to(out.resolve())
    for path in (board / "manifest.json", board.parent / "spec.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, "the secret is its owner's alone"

    (one,) = read_json(out / "worlds.json")["campaigns"]
    assert {effect["scope"] for effect in one["truth"]} == {"overall"}
    assert one["sealed"]["difference"] is not None or one["sealed"]["reason"]
