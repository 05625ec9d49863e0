"""A file system that fails where it is told to: every change that the controller makes below one folder is a step.

    with FaultyFiles(root) as files:
        files.plan = {17: "kill_before"}   # step 17 of this start
        files.plan = {"cancel": "kill_after"}   # its first change of a file of that name

The calls that change files (open, write, fsync, rename, mkdir, unlink, truncate) and openings for reading pass through
here. A killed controller changes nothing more: later steps of the same start raise `Killed` too, so that no `finally`
of the process that is being unwound can write. A power cut also takes back what no fsync of file or folder had secured.
"""

import builtins
import contextlib
import errno
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

Fault = Literal[
    "kill_before", "kill_after", "torn", "power_cut", "disk_full", "io_error", "slow", "hang", "clock_back",
    "clock_forward", "terminate", "stop_file",
]  # fmt: skip
FAULTS: tuple[Fault, ...] = Fault.__args__
Plan = dict[int | str, Fault]  # by the number of a step, or by the name of the file that it changes
DEADLY = ("kill_before", "kill_after", "torn", "power_cut", "hang")
_ID, _TEMPORARY = re.compile("^[0-9a-f]{12}$"), re.compile(r"\.\d+\.[0-9a-f]{8}\.tmp$")
_START = re.compile(r"^\d\.")  # an attempt's starts are files by number
SLOW_S, HANG_S, JUMP_S = 40.0, 7200.0, 86_400.0


class Killed(BaseException):
    """The controller is dead; nothing of it may catch this."""


class FaultyFiles:
    """Faults at numbered steps of the current start, within `root` only."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.plan: Plan = {}
        self.steps: list[str] = []
        self.struck: list[tuple[Fault, str]] = []
        self.stopping = False
        self.jumped_s = 0.0
        self.waits: Callable[[float], None] = lambda seconds: None
        self._dead = self._full = False
        self._asides = 0
        self._paths: dict[int, str] = {}
        self._held: set[int] = set()  # opened by number and not closed yet
        # Changes not yet secured: the path whose fsync secures one, the path changed, and what takes it back.
        self._undo: list[tuple[str, str, Callable[[str], None]]] = []
        self._real: dict[tuple[Any, str], Any] = {}

    # --- a start of the controller ------------------------------------------------------------------------------------

    def start(self, plan: Plan) -> None:
        """A new controller: steps count from 0, the disk has space again."""
        self.plan, self.steps, self.stopping = dict(plan), [], False
        self._dead = self._full = False
        for descriptor in list(self._held):  # the kernel closes what a dead process held, its locks among it
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._held.clear()
        self._paths.clear()

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """What others do: no step, no fault."""
        self._asides += 1
        try:
            yield
        finally:
            self._asides -= 1

    def step(self, call: str, path: str) -> bool:
        """One change about to be made. Returns whether the controller is to die right after it; may raise."""
        if self._dead:
            raise Killed
        place = f"{call} {self.place(path)}"
        fault = self.plan.get(len(self.steps)) or self.plan.pop(place.rsplit("/", 1)[-1], None)
        self.steps.append(place)
        if fault is not None:
            self.struck.append((fault, place))
        if fault in ("kill_before", "torn"):
            self._die()
        if fault == "hang":
            self.waits(HANG_S)
            self._die()
        if fault == "slow":
            self.waits(SLOW_S)
        elif fault in ("clock_back", "clock_forward"):
            self.jumped_s += -JUMP_S if fault == "clock_back" else JUMP_S
        elif fault == "terminate":
            self.stopping = True
        elif fault == "stop_file":
            with self.outside():
                (Path(self.root) / "stop").touch()
        elif fault == "io_error":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        elif fault == "disk_full":
            self._full = True
        if self._full and call in ("write", "create", "mkdir", "rename"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return fault in ("kill_after", "power_cut")

    def place(self, path: str) -> str:
        """A path within the root that names what it is and not whose: `rounds/N/ID/runs/N/train/result.json`."""
        parts = os.path.relpath(path, self.root).split(os.sep)
        named = (_ID.sub("ID", _START.sub("N.", _TEMPORARY.sub(".tmp", part))) for part in parts)
        return "/".join("N" if part.isdigit() else part for part in named)

    def fault_here(self) -> Fault | None:
        """The fault planned for the step that comes next."""
        return self.plan.get(len(self.steps))

    def is_full(self) -> bool:
        """Whether the next write finds no room."""
        return self._full or self.fault_here() == "disk_full"

    def die_after(self, dying: bool) -> None:
        """Ends the controller once the change it made last is on its way to the disk."""
        if dying:
            self._die(power=self.struck[-1][0] == "power_cut")

    def _die(self, power: bool = False) -> None:
        self._dead = True
        if power:
            with self.outside():
                for _, path, take_back in reversed(self._undo):
                    take_back(path)
            self._undo.clear()
        raise Killed

    # --- the calls ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> "FaultyFiles":
        for owner, name, made in (
            (builtins, "open", self._open),
            (io, "open", self._open),
            (os, "open", self._os_open),
            (os, "write", self._os_write),
            (os, "close", self._os_close),
            (os, "fsync", self._fsync),
            (os, "rename", self._rename),
            (os, "mkdir", self._changed("mkdir")),
            (os, "unlink", self._changed("unlink")),
            (os, "ftruncate", self._ftruncate),
        ):
            self._real[owner, name] = getattr(owner, name)
            setattr(owner, name, made)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for (owner, name), real in self._real.items():
            setattr(owner, name, real)

    def mine(self, path: Any) -> bool:
        """Whether a path is watched now."""
        return not self._asides and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.root)

    def secured(self, what: str) -> None:
        """An fsync: changes that it secures are no longer taken back."""
        self._undo = [change for change in self._undo if change[0] != what]

    def unsecured(self, by: str, path: str, take_back: Callable[[str], None]) -> None:
        """Notes a change of `path` that a power cut takes back until `by` is fsynced."""
        self._undo.append((by, path, take_back))

    def _open(self, file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        real = self._real[builtins, "open"]
        if not self.mine(file):
            return real(file, mode, *arguments, **named)
        path = os.fspath(file)
        if not set(mode) & set("wxa+"):
            self.step("read", path)
            return real(file, mode, *arguments, **named)
        fresh = not os.path.exists(path)
        dying = self.step("create" if fresh else "append", path)
        raw = real(file, mode.replace("t", "").replace("b", "") + "b", buffering=0)
        if fresh:
            self.unsecured(os.path.dirname(path), path, lambda at: Path(at).unlink(missing_ok=True))
        whole = named.get("buffering", arguments[0] if arguments else -1) != 0
        self._paths[raw.fileno()] = path
        self.die_after(dying)
        return _Writing(self, raw, path, whole)

    def _os_open(self, path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        real = self._real[os, "open"]
        if not self.mine(path):
            return real(path, flags, *arguments, **named)
        dying = self.step("create" if flags & os.O_CREAT else "open", os.fspath(path))
        descriptor = real(path, flags, *arguments, **named)
        self._paths[descriptor] = os.fspath(path)
        self._held.add(descriptor)
        self.die_after(dying)
        return descriptor

    def _os_close(self, descriptor: int) -> None:
        self._paths.pop(descriptor, None)
        self._held.discard(descriptor)
        self._real[os, "close"](descriptor)

    def _os_write(self, descriptor: int, data: bytes) -> int:
        return self._on(descriptor, "write", data)

    def _ftruncate(self, descriptor: int, length: int) -> None:
        self._on(descriptor, "ftruncate", length)

    def _on(self, descriptor: int, name: str, *arguments: Any) -> Any:
        path = None if self._asides else self._paths.get(descriptor)
        dying = path is not None and self.step(name.removeprefix("f"), path)
        found = self._real[os, name](descriptor, *arguments)
        self.die_after(dying)
        return found

    def _fsync(self, descriptor: int) -> None:
        path = None if self._asides else self._paths.get(descriptor)
        if path is None:
            return  # nothing outside is ever lost here
        dying = self.step("fsync", path)
        self.secured(path)
        self.die_after(dying)

    def _rename(self, source: Any, target: Any, **named: Any) -> None:
        real = self._real[os, "rename"]
        if not self.mine(target):
            real(source, target, **named)
            return
        source, target = os.fspath(source), os.fspath(target)
        dying = self.step("rename", target)
        with self.outside():
            old = Path(target).read_bytes() if os.path.exists(target) else None
        real(source, target, **named)
        # What was written under the old name and never fsynced is lost under the new one as well.
        moved = {source: target}
        self._undo = [(moved.get(by, by), moved.get(path, path), back) for by, path, back in self._undo]
        self.unsecured(os.path.dirname(target), target, lambda at: _put_back(at, old))
        self.die_after(dying)

    def _changed(self, name: str) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **named: Any) -> Any:
            dying = self.mine(path) and self.step(name, os.fspath(path))
            found = self._real[os, name](path, *arguments, **named)
            self.die_after(dying)
            return found

        return call


class _Writing:
    """An open file whose every write is a step. It buffers nothing; `whole`: a write is all or an error."""

    def __init__(self, files: FaultyFiles, raw: Any, path: str, whole: bool) -> None:
        self._files, self._raw, self._path, self._whole = files, raw, path, whole

    def write(self, data: Any) -> int:
        data = bytes(data)
        if self._files._asides:
            return self._raw.write(data)
        length = os.fstat(self._raw.fileno()).st_size
        torn, full = self._files.fault_here() == "torn", self._files.is_full()
        if (torn or full) and not self._files._dead:
            self._raw.write(data[: len(data) // 2])
        if full and not self._whole and not self._files._full:  # the system took a part and said so
            with contextlib.suppress(OSError):
                self._files.step("write", self._path)
            return len(data) // 2
        dying = self._files.step("write", self._path)
        self._raw.write(data)
        self._files.unsecured(self._path, self._path, lambda at: _cut(at, length))
        self._files.die_after(dying)
        return len(data)

    def truncate(self, size: int) -> int:
        if os.fstat(self._raw.fileno()).st_size == size and not self._files._asides:
            return size  # it changes nothing, so it is no step
        dying = not self._files._asides and self._files.step("truncate", self._path)
        found = self._raw.truncate(size)
        self._files.die_after(dying)
        return found

    def fileno(self) -> int:
        return self._raw.fileno()

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        if not self._raw.closed:
            self._files._paths.pop(self._raw.fileno(), None)
            self._raw.close()

    def __enter__(self) -> "_Writing":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _put_back(path: str, old: bytes | None) -> None:
    if old is not None:
        Path(path).write_bytes(old)
    elif os.path.exists(path):
        os.unlink(path)


def _cut(path: str, length: int) -> None:
    if os.path.exists(path):
        os.truncate(path, length)
