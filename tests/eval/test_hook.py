"""The command hook: one score or a lost reply, and nothing of it lives on."""

import subprocess
import sys
import time

import pytest

from megatron_evolve.eval.hook import Lost, Told, ask_hook, checked_score, ends_within


def python(body: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"import json, os, sys, time\n{body}")


def test_a_score_comes_back_and_the_folder_was_told(tmp_path):
    (tmp_path / "adapter").write_text("0.8512")
    body = "print(json.dumps({'score': float(open(sys.argv[1] + '/adapter').read()), 'items': 1200}))"
    assert ask_hook(python(body), tmp_path, 20) == Told(0.8512, 1200)
    assert ask_hook(python("print('{\"score\": 1}')"), tmp_path, 20) == Told(1.0, None)


def test_a_child_that_ends_in_time_is_left_unreaped():
    """So its number can still be killed for: nobody else can have it."""
    with subprocess.Popen(["sleep", "60"]) as process:
        assert not ends_within(process.pid, 0.05)
        process.kill()
        assert ends_within(process.pid, 30) and ends_within(process.pid, 0)


@pytest.mark.parametrize(
    ("body", "ending", "named"),
    [
        ("sys.exit('no such token')", "crashed", "status 1: no such token"),
        ("pass", "lost", "no score"),
        ("print('0.85')", "lost", "expected {"),
        ("print('{\"score\": NaN}')", "lost", "between 0 and 1, got nan"),
        ("print('{\"score\": 85.1}')", "lost", "got 85.1"),
        ("print('{\"score\": 1' + '0' * 400 + '}')", "lost", "between 0 and 1, got 1000"),
        ("print('{\"score\": true}')", "lost", "got True"),
        ('print(\'{"score": 0.5, "items": 1.5}\')', "lost", "count of items"),
        ('print(\'{"score": 0.5, "rank": 3}\')', "lost", "expected {"),
        ("print('[' * 60000)", "lost", "no score"),
        ("print('1' * 100000)", "lost", "more than 65536 bytes"),
    ],
)
def test_anything_else_is_lost_with_its_reason(body, ending, named, tmp_path):
    found = ask_hook(python(body), tmp_path, 20)
    assert isinstance(found, Lost) and found.ending == ending and named in found.reason
    assert "\n" not in found.reason


def test_a_program_that_is_not_there(tmp_path):
    found = ask_hook(("/nowhere/client",), tmp_path, 1)
    assert isinstance(found, Lost) and "could not be started" in found.reason


def test_a_time_out_takes_the_whole_group(tmp_path):
    """The child would outlive its parent; its pid is gone when the answer is there."""
    body = (
        "child = os.fork()\n"
        f"open({str(tmp_path / 'pid')!r} + ('' if child else '-child'), 'w').write(str(os.getpid()))\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    found = ask_hook(python(body), tmp_path, 1.5)
    assert isinstance(found, Lost) and found.ending == "timed_out" and time.monotonic() - start < 30
    for name in ("pid", "pid-child"):
        pid = int((tmp_path / name).read_text())
        deadline = time.monotonic() + 5  # an orphan is reaped by init, a moment later
        while time.monotonic() < deadline and _alive(pid):
            time.sleep(0.05)
        assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -0.01, 1.01, True, "0.5", None, 10**400])
def test_what_is_no_score(score):
    with pytest.raises(ValueError, match="between 0 and 1"):
        checked_score(score)


def test_what_is():
    assert [checked_score(score) for score in (0, 1, 0.25)] == [0.0, 1.0, 0.25]
