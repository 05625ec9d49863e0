"""A process that can be named beyond its pid: who it is, whether it still lives, and whom it left behind.

A pid is reused; a pid with its start time and the boot of its machine is not. Linux only: all is read from /proc.
"""

import contextlib
import ctypes
import functools
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36


class Stat(NamedTuple):
    """The fields of /proc/PID/stat that are needed here (proc_pid_stat(5))."""

    pid: int
    state: str
    parent: int
    session: int
    start_ticks: int


def read_stat(pid: int) -> Stat | None:
    """The state of a process, or None if there is none with this pid."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name stands in parentheses and may itself hold spaces and parentheses.
    words = text[text.rindex(b")") + 2 :].split()
    return Stat(pid, words[0].decode(), int(words[1]), int(words[3]), int(words[19]))


def all_stats() -> Iterator[Stat]:
    """Every process of the machine that this user may see."""
    for name in os.listdir("/proc"):
        if name.isdigit() and (stat := read_stat(int(name))) is not None:
            yield stat


@dataclass(frozen=True)
class ProcessIdentity:
    """One process of one boot of one machine."""

    pid: int
    start_ticks: int
    boot_id: str
    host: str

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity":
        """Raises ProcessLookupError if there is no such process."""
        stat = read_stat(pid)
        if stat is None:
            raise ProcessLookupError(f"no process has pid {pid}")
        return cls(pid, stat.start_ticks, boot_id(), os.uname().nodename)

    @property
    def is_alive(self) -> bool:
        """Whether it runs on this machine. A zombie has ended; another machine's process cannot be seen from here."""
        stat = read_stat(self.pid) if self.boot_id == boot_id() else None
        return stat is not None and stat.start_ticks == self.start_ticks and stat.state not in "ZX"

    def send(self, signum: int) -> None:
        """Signal it, unless it has ended."""
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)


@functools.cache
def boot_id() -> str:
    """Changes with every boot of the machine, never before."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def children_of(pid: int) -> list[int]:
    """The processes whose parent this is, by pid."""
    return [stat.pid for stat in all_stats() if stat.parent == pid]


def set_death_signal(parent: int) -> None:
    """Have the kernel kill this process when `parent` dies. Raises ProcessLookupError if it already has."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise ProcessLookupError(f"the supervisor {parent} died before its job began")


def become_subreaper() -> None:
    """Adopt every orphan among this process's descendants, so that none can escape by its parent's death."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def kill_left_behind(leader: ProcessIdentity, token: str, within_s: float = 5.0) -> list[int]:
    """Kill what a dead session leader left behind on this machine, and return the pids that would not die.

    Left behind is what is still in its session, or has `token` in its environment (a program that opened a session of
    its own, as torchrun's workers do). A newer session under a reused number is spared: its leader started later.
    """
    if leader.boot_id != boot_id():
        return []
    deadline = time.monotonic() + within_s
    while True:
        remaining = _left_behind(leader, token)
        if not remaining or time.monotonic() > deadline:
            return remaining
        for pid in remaining:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)  # the kernel tells nobody but the parent when a process has died


def _left_behind(leader: ProcessIdentity, token: str) -> list[int]:
    holder = read_stat(leader.pid)
    session_is_ours = holder is None or holder.start_ticks == leader.start_ticks
    return [
        stat.pid
        for stat in all_stats()
        if stat.state not in "ZX"
        and stat.pid != os.getpid()
        and stat.start_ticks >= leader.start_ticks
        and ((session_is_ours and stat.session == leader.pid) or _has_in_environment(stat.pid, token))
    ]


def _has_in_environment(pid: int, token: str) -> bool:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended, or another user's: not of this job
        return False
    return token.encode() in entries


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) was refused")
