"""The mirror: only what is allowed leaves, whatever the campaign holds, and the campaign hears nothing of it."""

import importlib.util
import os
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_evolve.cli import app
from megatron_evolve.mirror import FIELDS, mirror
from tests.megatron_evolve.campaign_folder import MARKUP, build_campaign, build_empty
from tests.megatron_evolve.tiny import command

ALLOWED = {
    *("round", "rounds_closed", "runs_trained", "runs_planned", "stages_finished", "stages_failed"),
    *("jobs_running", "jobs_waiting", "external_looks", "cpu_hours", "gpu_hours"),
}


class Kept:
    """A tracker that keeps what it is told."""

    def __init__(self, name: str) -> None:
        self.name, self.points, self.finished = name, [], False

    def log(self, point: dict[str, float], step: int) -> None:
        self.points.append((step, point))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_campaign(tmp_path_factory.mktemp("mirror") / "a-path-of-ours", judged=1, closed=True)


def test_only_allowed_fields_leave_and_all_are_counts(campaign: Path) -> None:
    opened: list[Kept] = []
    sent = mirror(campaign, lambda name: opened.append(Kept(name)) or opened[0], every_s=1, once=False)
    (tracker,) = opened
    assert (sent, tracker.finished) == (1, True)
    ((step, point),) = tracker.points
    assert set(point) == set(FIELDS) == ALLOWED
    assert all(type(value) is float for value in point.values())
    assert step == len((campaign / "ledger.jsonl").read_text().splitlines())
    assert tracker.name.startswith("demo-") and len(tracker.name) == len("demo-") + 8
    assert all(value.is_integer() for name, value in point.items() if name != "cpu_hours"), "a score is no count"


def test_the_mirror_s_failure_is_the_mirror_s_alone(campaign: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(campaign, tmp_path / "campaign"))
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

    class Down(Kept):
        def log(self, point: dict[str, float], step: int) -> None:
            raise ConnectionError("the tracker is down")

    down = Down("x")
    with pytest.raises(ConnectionError):
        mirror(root, lambda name: down, every_s=1, once=True)
    assert down.finished
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_bad_input_is_one_sentence(tmp_path: Path, campaign: Path) -> None:
    empty = build_empty(tmp_path / "empty")
    for words, said in (
        ([str(campaign), "--to", "mlflow", "--once"], "--to takes wandb or trackio, got 'mlflow'"),
        ([str(empty), "--to", "trackio", "--once"], "was not opened yet"),
        ([str(tmp_path), "--to", "trackio", "--once"], "holds no campaign"),
    ):
        ended = CliRunner().invoke(app, ["mirror", *words])
        assert ended.exit_code == 1 and said in ended.stderr, ended.stderr
        assert len(ended.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trackio", "wandb"])
def test_what_a_real_tracker_keeps_of_it(kind: str, campaign: Path, tmp_path: Path) -> None:
    """Offline. Nothing in the record that would be sent names a path, a machine, a verdict or a hypothesis."""
    if importlib.util.find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed")
    place = {"TRACKIO_DIR": str(tmp_path), "WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline"}
    for _ in range(2):  # the second goes on with the same run
        ended = command("mirror", campaign, "--to", kind, "--once", **place)
        assert ended.returncode == 0, ended.stderr
    records = [path for path in tmp_path.rglob("*") if path.suffix in (".wandb", ".db")]
    data = b"".join(path.read_bytes() for path in records)
    assert b"runs_trained" in data
    here = (campaign.name, str(Path.cwd()), os.uname().nodename, "DECOUPLED", "headroom", MARKUP[:20], "a substrate")
    words = (re.search(rb"(?<![A-Za-z0-9])" + re.escape(word.encode()) + rb"(?![A-Za-z0-9])", data) for word in here)
    assert [found.group() for found in words if found] == []
