"""SIGTERM and the stop file drain: what runs is finished, nothing is begun, status 75, the same command goes on."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_evolve.audit import verify_campaign
from tests.megatron_evolve.tiny import Ground, environment, events

pytestmark = pytest.mark.slow

DEADLINE_S = 300  # a loaded machine


def start(ground: Ground, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        ground.arguments(folder),
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], object], controller: subprocess.Popen) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert controller.poll() is None, controller.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def outcomes(folder: Path) -> list[str]:
    """How each attempt of the campaign's jobs ended; `running` where it has not."""
    found = []
    for path in folder.rglob("attempts/*"):
        ended = path / "outcome.json"
        found.append(json.loads(ended.read_bytes())["kind"] if ended.exists() else "running")
    return found


def test_it_drains_and_goes_on(ground: Ground, tmp_path: Path) -> None:
    folder = tmp_path / "campaign"
    controller = start(ground, folder)
    wait_for(lambda: list(folder.glob("rounds/1/*/runs/*/train/attempts/1/supervisor.json")), controller)
    controller.send_signal(signal.SIGTERM)
    told, _ = controller.communicate(timeout=DEADLINE_S)
    assert controller.returncode == 75
    assert "run the same command to go on" in " ".join(told.split())
    kinds = outcomes(folder)
    assert set(kinds) == {"finished", "cancelled"}
    assert 1 <= kinds.count("finished") <= 3, "two cores: what ran was waited for, what waited was called off"
    trained = [event for event in events(folder) if event["kind"] == "ended"]
    assert len(trained) == kinds.count("finished")

    controller = start(ground, folder)
    wait_for(lambda: "evidence" in {event["kind"] for event in events(folder)}, controller)
    (folder / "stop").touch()
    controller.communicate(timeout=DEADLINE_S)
    assert controller.returncode == 75
    known = events(folder)
    (folder / "stop").touch()
    assert ground.run(folder).returncode == 75, "ordered while the controller waited in a queue"
    assert events(folder) == known

    ended = ground.run(folder)
    assert ended.returncode == 0, ended.stderr
    assert events(folder)[: len(known)] == known
    assert not (folder / "stop").exists(), "an order that was carried out is over"
    assert verify_campaign(folder)["ok"]
    for name in ("policy.yaml", "edits.json"):
        for number in (1, 2, 3):
            mine, expected = (one / "rounds" / str(number) / name for one in (folder, ground.finished))
            assert mine.read_bytes() == expected.read_bytes()


def test_it_stops_while_the_ground_is_prepared(own_ground: Ground) -> None:
    judge = own_ground.judge
    folder = own_ground.root / "campaign"
    for path in (judge / "judge" / "manifest.json", judge / "judge" / "origin.json"):
        path.unlink()
    for path in (judge / "origin").rglob("scores.json"):
        path.unlink()
    for path in (judge / "origin").rglob("attempts"):
        path.rename(path.with_name("aside"))
    controller = start(own_ground, folder)
    wait_for(lambda: list((judge / "origin").rglob("attempts/1/supervisor.json")), controller)
    controller.send_signal(signal.SIGTERM)
    controller.communicate(timeout=DEADLINE_S)
    assert controller.returncode == 75
    assert events(folder) == []
    assert not (judge / "judge" / "origin.json").exists()
    assert "running" not in outcomes(judge / "origin")
