"""A server that the scoring job starts: dies, gets stuck, never gets ready, and is never left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_evolve.eval.engines.command import Place
from megatron_evolve.eval.engines.seam import Answers
from megatron_evolve.eval.engines.served import LOG_FILE, ask_started
from megatron_evolve.eval.engines.server import ModelServer
from tests.eval.engines import fake_endpoint
from tests.eval.engines.asked import examinee, expected, prompts, settings

pytest.importorskip("openai", reason="the endpoint's client is the [llm] extra")

ITEMS = prompts(12)
FAKE = ("{python}", fake_endpoint.__file__, "--port", "{port}", "--name", "{name}")


def started(
    folder: Path, *flags: str, patience: dict[str, Any] | None = None, items: list = ITEMS, **server: Any
) -> Answers:
    """The items, asked of a fake server that is started for them."""
    (folder / "lives").mkdir(exist_ok=True)
    argv = (*FAKE, "--lives", str(folder / "lives"), *flags)
    spec = {"kind": "command", "argv": argv, "start_seconds": 20, "drain_seconds": 2, "restarts": 2, **server}
    one = examinee(folder)
    return ask_started(settings(patience, server=spec, concurrency=1), one, items, Place(run=one.name))


def processes(folder: Path) -> list[int]:
    """Every server that was started, and its child."""
    return [int(pid) for life in (folder / "lives").iterdir() for pid in life.read_text().split()]


def still_there(pids: list[int]) -> list[int]:
    """Those that have not ended; a zombie waits for its parent only."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += [pid] if state not in "ZX" else []
    return found


def nobody_is_left(folder: Path, within_s: float = 3.0) -> bool:
    deadline = time.monotonic() + within_s
    while still_there(processes(folder)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not still_there(processes(folder))


def test_started_asked_and_stopped_with_its_children(tmp_path: Path) -> None:
    got = started(tmp_path)
    assert list(got.completions) == expected(ITEMS, 40)
    assert got.account == {}
    assert len(processes(tmp_path)) == 2
    assert nobody_is_left(tmp_path)
    log = (tmp_path / "work" / LOG_FILE).read_text()
    assert (tmp_path / "work" / LOG_FILE).stat().st_mode & 0o777 == 0o600
    assert log.startswith(f"$ {sys.executable} ") and log.endswith("life 0\n")


@pytest.mark.parametrize("fault", ["7:die", "7:hang", "warm-up:die"])
def test_a_server_that_dies_or_stands_still_is_started_again(tmp_path: Path, fault: str) -> None:
    got = started(tmp_path, "--first-life", fault, patience={"stall_seconds": 0.5})
    assert list(got.completions) == expected(ITEMS, 40)
    assert got.account["restarts"] == 1
    assert len(processes(tmp_path)) == 4
    assert nobody_is_left(tmp_path)


def test_a_server_that_dies_again_and_again_fails_the_job(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"but the server ended with status 3 .*after 2 restarts; its output is in .*log"
    ):
        started(tmp_path, "--every-life", "1:die")
    assert len(processes(tmp_path)) == 6
    assert nobody_is_left(tmp_path)


def test_a_server_that_never_gets_ready(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"was not ready in time .*after 0 restarts"):
        started(tmp_path, "--every-life", "start:never", start_seconds=0.7, restarts=0)
    assert nobody_is_left(tmp_path)


def test_a_server_that_ends_at_once_says_why(tmp_path: Path) -> None:
    argv = ("{python}", "-c", "raise SystemExit('no such flag: {port}')")
    with pytest.raises(ValueError, match=r"ended with status 1 and said last 'no such flag: \d+' before it was ready"):
        started(tmp_path, argv=argv, restarts=0)


def test_a_server_that_is_not_installed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'no-such-server' cannot \(no such file or directory\): install it"):
        started(tmp_path, argv=("no-such-server", "{port}"))


def test_a_stubborn_server_is_killed_after_its_drain(tmp_path: Path) -> None:
    got = started(tmp_path, "--stubborn", items=ITEMS[:2], drain_seconds=0.3)
    assert list(got.completions) == expected(ITEMS[:2], 40)
    assert nobody_is_left(tmp_path)


def test_a_refusal_stops_the_server_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="serves another model now"):
        started(tmp_path, "--every-life", "3:wrong-model")
    assert nobody_is_left(tmp_path)


def test_the_server_ends_with_a_job_that_is_told_to_end(tmp_path: Path) -> None:
    """SIGTERM to the scoring process alone, as a scheduler sends it."""
    program = (
        "import sys, time\nfrom pathlib import Path\n"
        "from megatron_evolve.eval.engines.server import ModelServer\n"
        "argv = lambda port: (sys.executable, '-c', 'import time; time.sleep(600)')\n"
        f"with ModelServer(argv, Path({str(tmp_path / 'log')!r}), drain_seconds=2, restarts=0) as server:\n"
        "    print(server.pid, flush=True)\n    time.sleep(600)\n"
    )
    job = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    server = int(job.stdout.readline())
    assert os.getpgid(server) == server and os.getsid(server) == os.getsid(job.pid)
    job.send_signal(signal.SIGTERM)
    assert job.wait(10) == 128 + signal.SIGTERM
    assert still_there([server]) == []


def test_the_handler_of_sigterm_is_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ModelServer(lambda port: ("sleep", "60"), tmp_path / "log", drain_seconds=1, restarts=0):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
