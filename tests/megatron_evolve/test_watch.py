"""The watch: fits its screen, survives what happens under it, and writes a file that Prometheus reads."""

import io
import itertools
import random
import shutil
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from megatron_evolve.cli import app
from megatron_evolve.ledger import read_ledger
from megatron_evolve.watch import SILENT_S, Watcher, duration, frame, watch
from tests.megatron_evolve.campaign_folder import build_campaign, build_empty
from tests.megatron_evolve.moment import candidates, hold, me, put_job

LONGEST_AXIS = "an-axis-with-a-name-that-is-much-too-long-for-any-screen"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds judged, the third open, its controller alive and its jobs in every state."""
    root = build_campaign(tmp_path_factory.mktemp("watch") / "campaign", judged=2, closed=False)
    hold(root, me())
    for place, name in enumerate(candidates(root, 3)):
        seed = 2_000_000_000 + place
        put_job(root, f"3/{name}/{seed}/external-a", supervisor=me(), progress=(10 * place, 120), attempt=1 + place % 3)
        put_job(root, f"3/{name}/{seed + 100}/train")
    return root


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_campaign(tmp_path_factory.mktemp("closed") / "campaign", judged=2, closed=True)


def drawn(root: Path, width: int, height: int = 40) -> list[str]:
    watcher = Watcher(root)
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False)
    console.print(frame(watcher.look(), watcher.tally, watcher.judged(), width=width, height=height))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_a_frame_fits_and_tells_what_there_is(opened: Path, width: int) -> None:
    lines = drawn(opened, width)
    text = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("demo  running   round 3 of 4   about ")
    for words in ("37 of 49 trained", "external looks", "7 running, 7 waiting", "1 timed out", "verdicts round 2 "):
        assert words in text, words
    (line,) = [line for line in lines if line.startswith(candidates(opened, 3)[2])][:1]
    assert line.split()[2:4] == ["2000000002", "external-a"] and "20/120" in line and "try 3" in line
    assert "DECOUPLED (selected, overall)" in text
    assert "killed after 1800 s of wall time" in text


@pytest.mark.parametrize("height", [24, 40, 60])
def test_a_frame_is_as_high_as_its_screen(opened: Path, height: int) -> None:
    lines = drawn(opened, 80, height)
    assert len(lines) <= height
    assert any(line.startswith("and ") for line in lines) == (height == 24)


def test_a_job_that_says_nothing_for_long_is_marked(opened: Path, monkeypatch) -> None:
    now = time.time()
    monkeypatch.setattr("megatron_evolve.standing.time.time", lambda: now + SILENT_S + 60)
    assert any("silent" in line for line in drawn(opened, 80))


def test_a_round_without_a_job_says_so(opened: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(opened, tmp_path / "campaign"))
    shutil.rmtree(root / "rounds" / "3")
    lines = [line.strip() for line in drawn(root, 80)]
    assert "0 running, 0 waiting" in lines
    assert any(line.startswith("CPU time") and line.endswith("min") for line in lines)


def test_before_it_is_opened_it_says_what_comes_first(tmp_path: Path) -> None:
    root = build_empty(tmp_path / "campaign")
    hold(root, me())
    assert drawn(root, 80)[0].split() == ["campaign", "preparing"]
    assert "come first" in drawn(root, 80)[-1]


def test_a_closed_campaign_ends_with_its_finding(closed: Path) -> None:
    lines = drawn(closed, 80)
    assert lines[0].startswith("demo  closed")
    assert "".join(lines).rstrip().endswith(".") and "running" not in " ".join(lines)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (7260, "2 h 01 min"), (60 * 3600, "2 d 12 h")],
)
def test_lengths_of_time(seconds: float, said: str) -> None:
    assert duration(seconds) == said.replace("90 min", "1 h 30 min")


def test_once_is_a_frame_and_changes_nothing(opened: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in opened.rglob("*")}
    ended = CliRunner().invoke(app, ["watch", str(opened), "--once"])
    assert ended.exit_code == 0 and ended.stdout.startswith("demo  running")
    assert {path: path.stat().st_mtime_ns for path in opened.rglob("*")} == before


def test_bad_input_is_one_sentence(tmp_path: Path, opened: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(opened, broken)
    lines = (broken / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (broken / "ledger.jsonl").write_bytes(b"".join([lines[0], *lines[2:]]))
    for words, said in (
        ([str(tmp_path), "--once"], "holds no campaign"),
        ([str(broken), "--once"], "ledger.jsonl line 2 breaks the chain"),
        ([str(opened)], "add --once for one frame"),
        ([str(opened), "--once", "--prometheus", str(tmp_path / "a.txt")], "end in .prom"),
        ([str(opened), "--once", "--prometheus", str(tmp_path / "none" / "a.prom")], "create the folder"),
    ):
        ended = CliRunner().invoke(app, ["watch", *words])
        assert ended.exit_code == 1 and said in ended.stderr, ended.stderr
        assert len(ended.stderr.splitlines()) == 1


def test_it_outlives_what_happens_under_it(closed: Path, tmp_path: Path) -> None:
    """Started before the campaign: the ledger grows in pieces that end anywhere, files are replaced and torn."""
    root, rng = tmp_path / "campaign", random.Random(5)
    screen = Console(file=io.StringIO(), width=100, height=50, force_terminal=True)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            watch(root, every_s=0.002, once=False, prometheus=None, console=screen)
        except BaseException as error:  # noqa: BLE001 - handed to the test, which fails with it
            failed.append(error)

    watching = threading.Thread(target=run)
    watching.start()
    data = (closed / "ledger.jsonl").read_bytes()
    place = 0
    for turn in itertools.count():
        time.sleep(0.004)
        if turn == 1:
            root.mkdir()
        elif turn == 2:
            (root / "ledger.jsonl").touch()
        elif turn > 2:
            place = min(len(data), place + rng.randrange(1, len(data) // 30))
            with open(root / "ledger.jsonl", "ab") as file:
                file.write(data[file.tell() : place])
            _stir(root, closed, turn)
        if place == len(data) or failed:
            break
    watching.join(timeout=60)
    assert not failed and not watching.is_alive()
    text = screen.file.getvalue()
    assert "no campaign in" in text
    assert "stopped tracking" in text, "the finding, in the last frame"


def _stir(root: Path, source: Path, turn: int) -> None:
    """What a controller and its jobs do meanwhile, cut off anywhere."""
    if turn % 3 == 0:
        (root / "controller.lock").write_text('{"pid": 1' if turn % 2 else "")
    if turn % 4 == 0 and (root / "ledger.jsonl").read_bytes().endswith(b"\n"):  # a restored copy takes its place
        shutil.copy(root / "ledger.jsonl", root / "copy")
        (root / "copy").rename(root / "ledger.jsonl")
    if turn == 12:
        shutil.copytree(source / "rounds", root / "rounds")
        shutil.copy(source / "looks.jsonl", root / "looks.jsonl")
    if turn == 16:
        shutil.rmtree(root / "rounds" / "1")


def test_the_prometheus_file_is_what_its_parser_reads(opened: Path, tmp_path: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")
    path = tmp_path / "campaign.prom"
    ended = CliRunner().invoke(app, ["watch", str(opened), "--once", "--prometheus", str(path)])
    assert ended.exit_code == 0, ended.stderr
    text = path.read_text()
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    samples = {(one.name, tuple(one.labels.items())): one.value for f in families.values() for one in f.samples}
    campaign = ("campaign", "demo")
    assert samples["megatron_evolve_runs_trained_total", (campaign,)] == 37
    assert samples["megatron_evolve_state", (campaign, ("state", "running"))] == 1
    assert samples["megatron_evolve_state", (campaign, ("state", "closed"))] == 0
    assert samples["megatron_evolve_budget_limit", (campaign, ("budget", "external_looks"))] == 64
    assert samples["megatron_evolve_jobs", (campaign, ("state", "waiting"))] == 7
    assert samples["megatron_evolve_ledger_events_total", (campaign,)] == len(read_ledger(opened / "ledger.jsonl"))
    progress = [value for (name, _), value in samples.items() if name == "megatron_evolve_job_progress_ratio"]
    assert len(progress) == 7 and all(0 <= value <= 1 for value in progress)
    assert all(family.documentation and family.type in ("gauge", "counter") for family in families.values())
    lines = text.splitlines()
    assert text.endswith("\n") and text.count("# TYPE") == len(families), "each family once, its samples together"
    assert all(line.startswith("# ") or len(line.rsplit("} ", 1)) == 2 for line in lines), "no time stamps"
    assert list(tmp_path.glob(".*")) == []


def test_names_in_labels_are_escaped() -> None:
    from megatron_evolve.prometheus import _escaped

    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")
    ugly = 'a "b" \\ c\nd'
    (family,) = parser.text_string_to_metric_families(f'# TYPE x gauge\nx{{a="{_escaped(ugly)}"}} 1\n')
    assert family.samples[0].labels == {"a": ugly}
