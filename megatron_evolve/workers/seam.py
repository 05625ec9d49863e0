"""The seam between the loop and whoever proposes: a process, a brief file in, a proposal file out.

Any program can stand behind it. It is started with the paths of both files, in a private folder of its own, with a
short list of environment variables, no input, and a time limit after which its whole process group is killed. Under one
user that is discipline and not a wall: it keeps a program from being told a path, not from searching the disk.

A program that cannot be reached now (not found, exit status 75, EX_TEMPFAIL of sysexits.h, or SIGKILL, which comes from
outside) is `unavailable`: the caller waits, and nobody answers in its place.
"""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

import megatron_evolve
from megatron_evolve.eval.hook import ends_within
from megatron_evolve.launch.rundir import make_folder, write_whole
from megatron_evolve.substrate.digest import canonical, digest_bytes
from megatron_evolve.substrate.frozen import Frozen
from megatron_evolve.workers.brief import Brief, Proposal, Usage, document

Ending = Literal["ok", "refused", "malformed", "timed_out", "unavailable"]

BRIEF, PROPOSAL, ERRORS = "brief.json", "proposal.json", "stderr.txt"
TEMPORARY_FAILURE = 75
MOST_BYTES = 1 << 20

# What a worker inherits of the environment; HOME and TMPDIR are its own folder, and PYTHONPATH finds this package.
KEPT = ("PATH", "LANG", "LC_ALL", "TZ")


class Call(Frozen):
    """One call as the ledger keeps it."""

    role: str = Field(description="who was asked, e.g. worker")
    program: tuple[str, ...] = Field(description="argv without the two files")
    verb: str
    prompt: str = Field(description="digest of the brief")
    reply: str = Field(default="", description="sha256 of the bytes that came back; empty if none did")
    ending: Ending
    reason: str = Field(default="", description="one sentence for anything but ok")
    seconds: float = Field(ge=0)
    usage: Usage | None = Field(default=None, description="model, sampling, tokens and cost, where the program tells")

    def refused(self, reason: str) -> "Call":
        """The same call, its well-formed answer refused by validation."""
        return self.replace(ending="refused", reason=reason)


def call_worker(
    program: Sequence[str],
    brief: Brief,
    folder: Path,
    *,
    time_limit_s: float,
    role: str = "worker",
    keep_env: Sequence[str] = (),
) -> tuple[Call, Proposal | None]:
    """Asks `program` and keeps brief and reply in `folder`. The proposal is None unless the ending is ok.

    `keep_env` names further variables that an operator lets through (a model's key, say).
    """
    folder = Path(folder)
    make_folder(folder)
    question = json.dumps(document(brief), ensure_ascii=False).encode()
    write_whole(folder / BRIEF, question)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="worker-", ignore_cleanup_errors=True) as scratch:
        ending, reason, reply = _run(tuple(program), Path(scratch), question, time_limit_s, keep_env)
    seconds = time.monotonic() - started
    proposal = None
    if ending == "ok":
        ending, reason, proposal = _read(reply, brief)
    if reply is not None:
        write_whole(folder / PROPOSAL, reply)
    call = Call(
        role=role,
        program=tuple(program),
        verb=brief.verb,
        prompt=brief.digest,
        reply="" if reply is None else digest_bytes(reply),
        ending=ending,
        reason=reason,
        seconds=round(seconds, 3),
        usage=proposal.usage if proposal else None,
    )
    return call, proposal


def _run(
    program: tuple[str, ...], scratch: Path, question: bytes, time_limit_s: float, keep_env: Sequence[str]
) -> tuple[Ending, str, bytes | None]:
    """Runs the program to its end. Returns how it ended, why, and what it wrote."""
    (scratch / BRIEF).write_bytes(question)
    with open(scratch / ERRORS, "wb") as errors:
        try:
            process = subprocess.Popen(
                [*program, str(scratch / BRIEF), str(scratch / PROPOSAL)],
                cwd=scratch,
                env=_environment(scratch, keep_env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        except OSError as error:
            return "unavailable", f"{program[0]} could not be started: {error.strerror or error}", None
        in_time = ends_within(process.pid, time_limit_s)
        # Its own session is its process group. The leader is not reaped yet, so the number still means this group.
        os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    if not in_time:
        return "timed_out", f"{program[0]} took longer than {time_limit_s:g} s and was stopped", None
    if status == TEMPORARY_FAILURE:
        return "unavailable", f"{program[0]} says it is unavailable now: {_last_line(scratch / ERRORS)}", None
    if status == -signal.SIGKILL:
        return "unavailable", f"{program[0]} was killed from outside", None
    reply = _reply(scratch / PROPOSAL)
    if status != 0:
        return "malformed", f"{program[0]} ended with status {status}: {_last_line(scratch / ERRORS)}", reply
    return "ok", "", reply


def _environment(scratch: Path, keep_env: Sequence[str]) -> dict[str, str]:
    kept = {name: os.environ[name] for name in (*KEPT, *keep_env) if name in os.environ}
    package = str(Path(megatron_evolve.__file__).resolve().parent.parent)
    return {**kept, "HOME": str(scratch), "TMPDIR": str(scratch), "PYTHONPATH": package, "PYTHONDONTWRITEBYTECODE": "1"}


def _reply(path: Path) -> bytes | None:
    """The bytes of a regular file, at most one more than is allowed; a link is not followed."""
    if path.is_symlink() or not path.is_file():
        return None
    with open(path, "rb") as file:
        return file.read(MOST_BYTES + 1)


def _read(reply: bytes | None, brief: Brief) -> tuple[Ending, str, Proposal | None]:
    """The proposal in a reply, or why it is malformed: also where JSON allows what no ledger could keep."""
    if reply is None:
        return "malformed", f"expected a proposal in {PROPOSAL}, got no file", None
    if len(reply) > MOST_BYTES:
        return "malformed", f"expected a proposal of at most {MOST_BYTES} bytes, got more", None
    try:
        proposal = Proposal.parse(json.loads(reply), where="proposal")
        canonical(document(proposal))  # half a surrogate pair and hundreds of brackets have no such form
    except (ValueError, RecursionError) as error:
        return "malformed", f"expected a proposal, got {error}", None
    if proposal.brief != brief.digest:
        return "malformed", f"the proposal answers brief {proposal.brief[:12]!r}, asked was {brief.digest[:12]!r}", None
    return "ok", "", proposal


def _last_line(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 2000))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"
