"""The launcher's side of a warm parent: finds it, starts it, asks it for forks, starts another when it has died.

state_dir/warm.json points to the socket, whose own path must stay below 108 bytes and therefore lies in a private
temporary folder; state_dir/warm.log is what the parent and its preloads print. A launcher that resumes a campaign finds
the parent of the one before it there, if that still runs.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_evolve.launch import rundir
from megatron_evolve.launch.process import ProcessIdentity
from megatron_evolve.launch.warm import WarmError

POINTER_FILE = "warm.json"
LOG_FILE = "warm.log"
REPLY_S = 60.0  # a fork takes milliseconds; a machine that swaps can take long
KILLED_WHILE_LOADING_MAX = 3
_TEMPORARY_ROOT_BYTES = 80  # leaves room for the folder's and the socket's name within 107


@dataclass(frozen=True)
class WarmSettings:
    """What a warm parent loads before it serves.

    preload        "module" or "module:function", imported and called in this order
    fork_prefixes  packages whose modules may run in a fork; every other command is executed as usual
    env            variables of the parent, for what is read at import only: OMP_NUM_THREADS=1, PYTHONHASHSEED
    """

    preload: tuple[str, ...]
    fork_prefixes: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "env", types.MappingProxyType(dict(self.env)))

    def to_json(self) -> dict:
        return {"preload": list(self.preload), "fork_prefixes": list(self.fork_prefixes), "env": dict(self.env)}


class WarmClient:
    """One launcher's connection to one warm parent after another."""

    def __init__(self, settings: WarmSettings, state_dir: Path) -> None:
        self._settings = settings
        self._state_dir = state_dir
        self._socket_path: Path | None = None
        self._parent: ProcessIdentity | None = None
        self._process: subprocess.Popen | None = None  # of a parent that this client started
        self._connection: socket.socket | None = None
        self._has_served = False
        self._killed_while_loading = 0
        self._find()

    def fork(self, folder: Path, cwd: Path, env: Mapping[str, str]) -> int | None:
        """Have a supervisor for the attempt in `folder` forked; its pid, or None if the parent is not ready: ask again.

        None after the parent died in the middle may hide a supervisor that was forked: asking again is safe, since an
        attempt begins only once. Raises WarmError if the parent cannot load what it should.
        """
        if not self._connect():
            return None
        request = {"verb": "start", "folder": str(folder), "cwd": str(cwd), "env": dict(env)}
        try:
            self._connection.sendall(json.dumps(request).encode() + b"\n")
            reply = b""
            while not reply.endswith(b"\n"):
                received = self._connection.recv(4096)
                if not received:
                    raise ConnectionResetError("the warm parent closed the connection")
                reply += received
        except TimeoutError:
            self._parent.send(signal.SIGKILL)  # it hangs; what it forked runs on
            self._disconnect()
            return None
        except ConnectionError:
            self._disconnect()
            return None
        return json.loads(reply)["pid"]

    def close(self) -> None:
        """End the parent; what it forked runs on."""
        if self._connect_once():
            with contextlib.suppress(ConnectionError):  # it has ended already
                self._connection.sendall(b'{"verb": "stop"}\n')
            self._disconnect()
        elif self._parent is not None:
            self._parent.send(signal.SIGKILL)  # it still loads: nothing depends on it
        if self._process is not None:
            self._process.wait()
        self._forget()

    def _connect(self) -> bool:
        """Whether a parent is ready, after doing what is needed to have one."""
        if self._connection is not None:
            return True
        if self._parent is None or not self._parent.is_alive:
            self._bury()
            self._start()
        return self._connect_once()

    def _connect_once(self) -> bool:
        if self._connection is None and self._socket_path is not None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(REPLY_S)
            try:
                connection.connect(str(self._socket_path))
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                return False
            self._connection, self._has_served, self._killed_while_loading = connection, True, 0
        return self._connection is not None

    def _find(self) -> None:
        """Adopt the parent of an earlier launcher if it lives and has loaded the same."""
        path = self._state_dir / POINTER_FILE
        if not path.exists():
            return
        try:
            pointer = rundir.read_json(path)
            parent = ProcessIdentity(**pointer["parent"])
            socket_path, settings = Path(pointer["socket"]), pointer["settings"]
        except (rundir.DamagedFile, KeyError, TypeError):  # the old parent ends by itself; a new one is started
            return
        self._parent, self._socket_path = parent, socket_path
        if not parent.is_alive:
            self._forget()
        elif settings != self._settings.to_json():
            self._parent = self._socket_path = None

    def _start(self) -> None:
        root = tempfile.gettempdir() if len(os.fsencode(tempfile.gettempdir())) <= _TEMPORARY_ROOT_BYTES else "/tmp"
        self._socket_path = Path(tempfile.mkdtemp(prefix="warm-", dir=root)) / "socket"  # mode 0700
        command = [sys.executable, "-m", "megatron_evolve.launch.warm", "--socket", str(self._socket_path)]
        for prefix in self._settings.fork_prefixes:
            command += ["--fork-prefix", prefix]
        command += ["--preload", *self._settings.preload]
        rundir.make_folder(self._state_dir)
        with open(self._state_dir / LOG_FILE, "ab") as log:
            self._process = subprocess.Popen(
                command,
                env=os.environ | self._settings.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # an interrupt at the controller's terminal is not for it
            )
        self._parent = ProcessIdentity.of(self._process.pid)
        rundir.write_json(
            self._state_dir / POINTER_FILE,
            {
                "socket": str(self._socket_path),
                "parent": dataclasses.asdict(self._parent),
                "settings": self._settings.to_json(),
            },
        )

    def _bury(self) -> None:
        """Clear away a parent that has died. Raises WarmError if it could not load, since another could not either."""
        if self._process is not None:
            status = self._process.wait()
            self._killed_while_loading += not self._has_served and status < 0
            failed = not self._has_served and status > 0
            if failed or self._killed_while_loading >= KILLED_WHILE_LOADING_MAX:
                log = self._state_dir / LOG_FILE
                lines = log.read_text(errors="replace").splitlines() or ["nothing"]
                raise WarmError(
                    f"expected a warm parent with {', '.join(self._settings.preload)}; it ended with status {status} "
                    f"while loading and said {lines[-1].strip()!r}: see {log}"
                )
        self._forget()

    def _disconnect(self) -> None:
        self._connection.close()
        self._connection = None

    def _forget(self) -> None:
        if self._socket_path is not None:
            shutil.rmtree(self._socket_path.parent, ignore_errors=True)  # the parent may be removing it too
        self._parent = self._process = self._socket_path = None
        self._has_served = False
