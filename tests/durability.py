"""What reaches a disk, watched at the boundary to the operating system: fsync, rename and replace, in their order.

The law of a writer that lasts on NFS and Lustre: whatever it renames lies in one folder with its new name and was
synced before; the folder was synced after; so at the end every file's bytes and name are on disk.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Recorder:
    """The calls of this process, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str]] = []  # what, path, new path

    def broken(self, root: Path, ignore: tuple[str, ...] = ()) -> list[str]:
        """Every way in which the files below `root` are not on disk; empty where the law holds."""
        found, synced, named = [], {}, {}
        for moment, (what, path, new) in enumerate(self.calls):
            if what == "fsync":
                synced[path] = moment
                continue
            if Path(path).parent != Path(new).parent:
                found.append(f"{path} was renamed into another folder, {new}")
            if path not in synced:
                found.append(f"{path} was renamed to {new} before it was synced")
            inside = [one for one in synced if one == path or one.startswith(f"{path}/")]
            synced |= {new + one[len(path) :]: synced[one] for one in inside}
            named |= {new + one[len(path) :]: at for one, at in named.items() if one.startswith(f"{path}/")}
            named[new] = moment
        for path in sorted(one for one in root.rglob("*") if one.is_file() and one.name not in ignore):
            if str(path) not in synced:
                found.append(f"the bytes of {path} were not synced")
            if str(path.parent) not in synced:
                found.append(f"the folder of {path} was not synced")
        for path, moment in named.items():
            folder = str(Path(path).parent)
            if os.path.exists(path) and synced.get(folder, -1) < moment and not Path(path).is_dir():
                found.append(f"{folder} was not synced after {path} had its name")
        return found


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Records within the block."""
    recorder = Recorder()
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def record_fsync(fd: int) -> None:
        recorder.calls.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"), ""))
        fsync(fd)

    def moving(what: str, move):
        def record(source, target, **fields) -> None:
            move(source, target, **fields)
            recorder.calls.append((what, os.path.abspath(source), os.path.abspath(target)))

        return record

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", record_fsync)
        patch.setattr(os, "rename", moving("rename", rename))
        patch.setattr(os, "replace", moving("replace", replace))
        yield recorder
