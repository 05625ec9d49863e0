"""Processes told apart beyond their pids."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from megatron_evolve.launch.process import ProcessIdentity, kill_left_behind, read_stat

LEADER = """
import subprocess
print(subprocess.Popen(["sleep", "60"], env={}).pid, flush=True)
print(subprocess.Popen(["sleep", "60"], start_new_session=True).pid, flush=True)
input()
"""


def test_a_process_lives_until_it_ends_and_no_other_takes_its_place(wait_until: Callable) -> None:
    process = subprocess.Popen(["sleep", "60"])
    identity = ProcessIdentity.of(process.pid)
    assert identity.is_alive
    assert not dataclasses.replace(identity, start_ticks=identity.start_ticks + 1).is_alive
    assert not dataclasses.replace(identity, boot_id="another").is_alive
    process.kill()
    wait_until(lambda: read_stat(process.pid).state == "Z", "the zombie")
    assert not identity.is_alive
    process.wait()
    assert not identity.is_alive
    identity.send(signal.SIGKILL)  # whoever has that pid now is left alone
    with pytest.raises(ProcessLookupError):
        ProcessIdentity.of(process.pid)


def test_a_command_name_with_spaces_and_parentheses_is_read() -> None:
    source = "import ctypes; ctypes.CDLL(None).prctl(15, b'a) S (b', 0, 0, 0); print(1, flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    assert read_stat(process.pid).parent == os.getpid()
    process.communicate(b"\n")


def test_what_a_leader_left_behind_is_found_by_session_and_by_token() -> None:
    """One orphan stays in the session; the other opens its own but has the token in its environment."""
    leader = subprocess.Popen(
        [sys.executable, "-c", LEADER],
        env=os.environ | {"TOKEN": "t-37"},
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    orphans = [int(leader.stdout.readline()), int(leader.stdout.readline())]
    identity = ProcessIdentity.of(leader.pid)
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    leader.kill()
    leader.wait()
    assert kill_left_behind(identity, "TOKEN=t-37") == []
    for pid in orphans:
        stat = read_stat(pid)
        assert stat is None or stat.state in "ZX"
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
