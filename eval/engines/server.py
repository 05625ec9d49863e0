"""A model server as a child of the scoring job: started, watched, started again, and never left behind.

It gets a process group of its own within the job's session, so that one signal ends it with all of its workers, and
whoever sweeps up after the job finds it too. All that it writes goes to one log.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from megatron_evolve.launch.rundir import make_folder

HOST = "127.0.0.1"
POLL_S = 0.02
LOG_TAIL_BYTES = 4096


def free_port() -> int:
    """A port of this machine that nobody listens on. Another program may take it first: the server then fails to start
    and is started again on another."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


class ModelServer:
    """One server, from start to stop:

        with ModelServer(argv_of_port, log, drain_seconds=30, restarts=2) as server:
            ask(server.url)

    Leaving the block, by an error or by SIGTERM too, asks the whole group to end, waits and then kills it.
    """

    def __init__(
        self, argv_of: Callable[[int], tuple[str, ...]], log: Path, *, drain_seconds: float, restarts: int
    ) -> None:
        self.log = log
        self.num_restarts = 0
        self._argv_of = argv_of
        self._drain_seconds = drain_seconds
        self._restarts = restarts
        self._process: subprocess.Popen | None = None
        self._port = 0
        self._former_handler: object = None

    def __enter__(self) -> "ModelServer":
        if threading.current_thread() is threading.main_thread():  # Python takes handlers from no other thread
            self._former_handler = signal.signal(signal.SIGTERM, _leave)
        try:
            self._start()
        except BaseException:
            self._restore_handler()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.stop()
        finally:
            self._restore_handler()

    @property
    def url(self) -> str:
        """Where it is asked."""
        return f"http://{HOST}:{self._port}/v1"

    @property
    def pid(self) -> int:
        """Of its first process, which is also the number of its group."""
        return self._process.pid

    def ended(self) -> str | None:
        """How its first process ended, None while it runs."""
        found = _end_of(self._process.pid)
        if found is None:
            return None
        killed = found.si_code != os.CLD_EXITED
        how = f"was killed by signal {found.si_status}" if killed else f"ended with status {found.si_status}"
        return f"the server {how}{self._last_words()}"

    def restart(self, why: str) -> None:
        """Stops what is left of it and starts another. Raises ValueError when it has been started often enough."""
        self.stop()
        if self.num_restarts >= self._restarts:
            raise ValueError(
                f"expected the server to answer every item, but {why}, after {self.num_restarts} restarts; its output "
                f"is in {self.log}: mend its command line or allow more restarts"
            )
        self.num_restarts += 1
        self._start()

    def stop(self) -> None:
        """Asks its group to end, waits, kills what is left. A server that has ended is fine too."""
        process = self._process
        if process is None:
            return
        self._process = None
        _signal(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + self._drain_seconds
        while _end_of(process.pid) is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        _signal(process.pid, signal.SIGKILL)
        process.wait()

    def _start(self) -> None:
        self._port = free_port()
        argv = self._argv_of(self._port)
        make_folder(self.log.parent)
        # Some servers log what they are asked, and that may be the sealed target: for the judge's eyes alone.
        with open(self.log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
            log.write(f"$ {' '.join(argv)}\n".encode())
            log.flush()
            try:
                self._process = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
                )
            except OSError as error:
                raise ValueError(
                    f"expected a server that can be started, {argv[0]!r} cannot ({(error.strerror or '').lower()}): "
                    "install it or mend the engine's argv"
                ) from None

    def _last_words(self) -> str:
        with open(self.log, "rb") as log:
            log.seek(max(0, self.log.stat().st_size - LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").strip().splitlines()
        return f" and said last {lines[-1].strip()[:200]!r}" if lines else ""

    def _restore_handler(self) -> None:
        if self._former_handler is not None:
            signal.signal(signal.SIGTERM, self._former_handler)
            self._former_handler = None


def _signal(group: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # nobody of the group is left
        os.killpg(group, signum)


def _end_of(pid: int) -> os.waitid_result | None:
    """How a child ended, None while it runs. It is not reaped, so that its number goes on to name its group."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + signum)
