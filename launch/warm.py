"""The warm parent: a process that has imported what jobs need and starts each in a fork of itself.

    python -m megatron_evolve.launch.warm --socket PATH --fork-prefix PACKAGE --preload MODULE[:FUNCTION] ...

Importing a training framework costs seconds; a fork costs milliseconds. One warm parent serves one campaign on one
machine. It knows nothing of what it imports. A request on its socket makes it fork a supervisor, which forks the job:

    {"verb": "start", "folder": ATTEMPT_FOLDER, "cwd": FOLDER, "env": {...}}  ->  {"pid": SUPERVISOR}
    {"verb": "stop"}                                                          ->  (ends)

A forked child has only the thread that forked, so a lock held by another thread would stay held for ever: the parent
refuses to serve if a preload started threads. Supervisors are not in its session and outlive it. An open connection is
a launcher's lease: the parent ends by itself when nobody is connected and no supervisor of its own runs.
"""

import argparse
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

from megatron_evolve.launch import rundir
from megatron_evolve.launch.job import Job
from megatron_evolve.launch.supervise import exec_argv, redirect, supervise

LINGER_S = 1.0  # between one launcher and the next that resumes its campaign
TICK_S = 0.25  # how long a supervisor that has ended may stay a zombie


class WarmError(Exception):
    """The warm parent cannot serve. The message is one sentence with the remedy."""


def preload(specs: list[str]) -> None:
    """Import each module, and call its function where one is named. Raises WarmError if that started threads."""
    for spec in specs:
        name, _, function = spec.partition(":")
        module = importlib.import_module(name)
        if function:
            getattr(module, function)()
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise WarmError(
            f"expected one thread after preloading {', '.join(specs)}; got {threads}, {threading.active_count()} of "
            "them Python's: set OMP_NUM_THREADS=1 and OPENBLAS_NUM_THREADS=1 for the warm parent, or preload nothing "
            "that starts threads"
        )


def forkable_module(argv: tuple[str, ...], prefixes: tuple[str, ...]) -> str | None:
    """The module that argv runs by this very interpreter, if it lies under one of the prefixes."""
    if len(argv) < 3 or argv[0] != sys.executable or argv[1] != "-m":
        return None
    return argv[2] if any(argv[2] == prefix or argv[2].startswith(f"{prefix}.") for prefix in prefixes) else None


class WarmParent:
    """Serves one socket. `serve` returns when there is nothing left to serve."""

    def __init__(self, path: Path, fork_prefixes: tuple[str, ...]) -> None:
        self._path = path
        self._fork_prefixes = fork_prefixes
        self._supervisors: set[int] = set()
        self._connections: dict[socket.socket, bytes] = {}  # with the bytes of an unfinished request
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._selector = selectors.DefaultSelector()

    def serve(self) -> None:
        # Whoever finds the socket can connect: it gets its name only once it listens.
        hidden = self._path.with_name(f"{self._path.name}.new")
        self._listener.bind(str(hidden))
        self._listener.listen(16)
        os.rename(hidden, self._path)
        self._selector.register(self._listener, selectors.EVENT_READ)
        wanted_at, serving = time.monotonic(), True
        while serving:
            for key, _ in self._selector.select(TICK_S):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    serving = self._receive(key.fileobj) and serving
            self._reap()
            if self._connections or self._supervisors:
                wanted_at = time.monotonic()
            serving = serving and time.monotonic() - wanted_at < LINGER_S
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        with contextlib.suppress(OSError):  # another's file is in it: not ours to remove
            self._path.parent.rmdir()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        self._connections[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _receive(self, connection: socket.socket) -> bool:
        """Answer the requests that have come in. Returns whether to go on serving."""
        try:
            received = connection.recv(65536)
        except ConnectionError:
            received = b""
        if not received:
            self._selector.unregister(connection)
            del self._connections[connection]
            connection.close()
            return True
        *requests, self._connections[connection] = (self._connections[connection] + received).split(b"\n")
        for line in requests:
            request = json.loads(line)
            if request["verb"] == "stop":
                return False
            reply = {"pid": self._fork_supervisor(request)}
            with contextlib.suppress(ConnectionError):  # the launcher died: the job goes on without it
                connection.sendall(json.dumps(reply).encode() + b"\n")
        return True

    def _fork_supervisor(self, request: dict) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid != 0:
            self._supervisors.add(pid)
            return pid
        status = 1
        try:
            self._leave_sockets()
            os.setsid()
            os.chdir(request["cwd"])
            folder = Path(request["folder"])
            redirect(1, folder / rundir.SUPERVISOR_LOG)
            redirect(2, folder / rundir.SUPERVISOR_LOG)
            for name in os.environ.keys() - request["env"].keys():
                del os.environ[name]
            os.environ.update(request["env"])
            supervise(folder, self._enter)
            status = 0
        except rundir.RunDirError as error:
            print(error, file=sys.stderr)
        finally:  # whatever happens, this copy must not go on as a second warm parent
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)

    def _leave_sockets(self) -> None:
        """Let go, in a forked child, of the parent's sockets: held open, they would look like a living parent."""
        self._selector.close()
        self._listener.close()
        for connection in self._connections:
            connection.close()

    def _enter(self, job: Job) -> NoReturn:
        """Become the job: run its module here if that is what it asks for, else replace this process by argv."""
        module = forkable_module(job.argv, self._fork_prefixes)
        if module is None:
            exec_argv(job)
        run_as_main(module, list(job.argv[3:]))

    def _reap(self) -> None:
        for pid in list(self._supervisors):
            if os.waitpid(pid, os.WNOHANG)[0]:
                self._supervisors.remove(pid)


def run_as_main(module: str, args: list[str]) -> NoReturn:
    """Run a module as `python -m module args` would in this process, and exit with its status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as at the start of any Python
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    gc.enable()
    sys.stdout.reconfigure(line_buffering=True)  # so that the last lines of a killed job are in its log
    sys.argv = [module, *args]
    status = 1
    try:
        with warnings.catch_warnings():
            # That the preload has imported the module is the point.
            warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if stop.code is not None and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        # What Python does at its end, in its order; then leave without unwinding into the warm parent's frames.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status & 0xFF)


def main() -> int:
    """Entry of the process: serves until told to end or not wanted; status 1 where a module cannot be preloaded."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_evolve.launch.warm", description="Serve forks of preloaded modules."
    )
    parser.add_argument(
        "--socket", type=Path, required=True, help="where to listen; at most 100 bytes, its folder private to this user"
    )
    parser.add_argument("--fork-prefix", action="append", default=[], help="package whose modules may run in a fork")
    parser.add_argument("--preload", nargs="*", default=[], metavar="MODULE[:FUNCTION]", help="import, then call")
    options = parser.parse_args()
    try:
        preload(options.preload)
    except WarmError as error:
        print(error, file=sys.stderr)
        return 1
    # Frozen objects are left alone by the collector, so their pages stay shared between the forks.
    gc.collect()
    gc.freeze()
    gc.disable()
    WarmParent(options.socket, tuple(options.fork_prefix)).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
