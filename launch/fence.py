"""The fence of a run folder: whoever started last may write, an older copy that still runs somewhere may not.

    RUN_DIR/fence.json                 {"attempt": 2, "start": 1, "holder": "4711"}
    MEGATRON_EVOLVE_FENCE              the same, with its path, in the environment of the job that was started under it

A scheduler that loses sight of a node starts the job again elsewhere, while the first copy may live on. A lock does not
help: its holder may be the copy that nobody can reach. So each start raises the fence, and a job that writes what
others will read checks before that its own start is still the latest. Between check and write remains an instant;
files are written whole, and their manifests name every byte, so that a mixed checkpoint is found when it is read.

Jobs of Slurm and pods of Kubernetes have that variable. Without it nothing is checked: a local job is watched by its
supervisor, whose death is its own.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_evolve.launch.rundir import DamagedFile, RunDirError, read_json, write_json

FENCE_FILE = "fence.json"
FENCE_VARIABLE = "MEGATRON_EVOLVE_FENCE"
GAVE_UP = "the controller, which gave it up"
NO_START = 10**9  # above the number of any start, so that none of them can raise the fence again


class Fenced(RunDirError):
    """A later start has taken the run folder; this one must stop. The message is one sentence."""


@dataclass(frozen=True)
class Token:
    """One start of one attempt. `holder` is the scheduler's name for the job: two jobs never share an attempt."""

    attempt: int
    start: int
    holder: str

    def __str__(self) -> str:
        what = "no further start" if self.start == NO_START else f"start {self.start}"
        return f"{what} of attempt {self.attempt} by {self.holder}"


def read_fence(run_dir: Path) -> Token | None:
    """The latest start of a run folder, None if none was ever fenced. Raises RunDirError."""
    path = run_dir / FENCE_FILE
    if not path.exists():
        return None
    try:
        return Token(**read_json(path))
    except TypeError as error:
        raise DamagedFile(f"cannot use {path}: {error}; remove it once no job of this folder runs") from error


def check_free(run_dir: Path, token: Token) -> Token | None:
    """The start before this one, None for the first. Raises Fenced if this or a later start has the run folder."""
    held = read_fence(run_dir)
    if held is not None and (held.attempt, held.start) >= (token.attempt, token.start):
        raise Fenced(f"expected {run_dir} to be free for {token}; {held} has it: this copy ends")
    return held


def raise_fence(run_dir: Path, token: Token) -> None:
    """Take the run folder for a start. Raises Fenced if this or a later start has it already."""
    check_free(run_dir, token)
    write_json(run_dir / FENCE_FILE, asdict(token))


def shut_out(run_dir: Path, attempt: int, holder: str) -> None:
    """Take the run folder from every start of an attempt that was given up: those that run, begin now, or are to come.

    To be called before and after the end is recorded: a start that looked at the fence before the first call and takes
    it after looks for an end next. It finds that and runs nothing, or had the fence before it and loses it again.
    """
    with contextlib.suppress(Fenced):  # shut out already, or a later attempt has the folder
        raise_fence(run_dir, Token(attempt, NO_START, holder))


def fence_environment(run_dir: Path, token: Token) -> dict[str, str]:
    """The variable that tells a job's processes which start they belong to."""
    return {FENCE_VARIABLE: json.dumps({"run_dir": str(run_dir), **asdict(token)}, sort_keys=True)}


def check_fence(environment: Mapping[str, str] | None = None) -> None:
    """Raises Fenced if a later start has taken the run folder of the job that this process belongs to."""
    text = (os.environ if environment is None else environment).get(FENCE_VARIABLE)
    if not text:
        return
    document = json.loads(text)
    run_dir, mine = Path(document.pop("run_dir")), Token(**document)
    held = read_fence(run_dir)
    if held != mine:
        raise Fenced(f"expected {run_dir} to be held by {mine}; {held or 'nobody'} has it: this copy writes no more")


def claim(path: Path, holder: str) -> str:
    """The one who claimed `path` first, now or earlier. Atomic on NFS and Lustre too: a link is made or is not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(holder)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
        return path.read_text()
    except OSError as error:
        raise RunDirError(f"cannot claim {path}: {(error.strerror or str(error)).lower()}; check its disk") from error
    finally:
        temporary.unlink(missing_ok=True)
