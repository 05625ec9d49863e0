"""How a job ended: the rule that turns what its supervisor saw into one outcome kind and one sentence.

In this order:
1. finished       exit status 0 and the done file, even if it was being stopped at that moment: the work is done.
2. timed_out, cancelled, lost    its supervisor stopped it: time limit, the submitter's wish, or a signal from elsewhere
                  to the supervisor (a machine that shuts down).
3. out_of_memory  it failed and an allocator said so in stderr: an exception line with the text of torch's CPU or CUDA
                  allocator, std::bad_alloc, or MemoryError as the final exception. The lines of all ranks count, since
                  ranks that lose their peer print a later exception of their own.
4. SIGKILL (or status 137, a shell's word for it): out_of_memory if the kernel's counter of out-of-memory kills in our
                  control group rose meanwhile. Otherwise lost: SIGKILL alone proves nothing about memory, and no
                  program sends it to itself, so the same job is worth another attempt unchanged.
5. crashed        every other exit status or signal, and status 0 without the done file.
"""

import re
import signal
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from megatron_evolve.launch.job import OutcomeKind

STDERR_TAIL_BYTES = 65536  # eight ranks' tracebacks are about 20 kB

# "ValueError: text", "torch.OutOfMemoryError: text" at the start of a line, after torchrun's or torch's rank prefix.
_EXCEPTION_LINE = re.compile(
    r"^(?:\[[^\]\n]*\]:?\s*)?([A-Za-z_][\w.]*(?:Error|Exception|Interrupt)|AssertionError)(?::\s*(.*))?$", re.MULTILINE
)
_ALLOCATOR_TEXT = re.compile(
    r"DefaultCPUAllocator: (?:can't allocate|not enough) memory|CUDA out of memory|CUDA error: out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED|OutOfMemoryError"
)
_BAD_ALLOC = re.compile(r"terminate called after throwing an instance of 'std::bad_alloc'")
_SHELL_SIGKILL = 128 + signal.SIGKILL
STOPPED_FROM_OUTSIDE = "was stopped because its supervisor was signalled from outside"


class Stop(StrEnum):
    """Why the supervisor stopped the job."""

    TIME_LIMIT = "time limit"
    CANCEL = "cancel"
    SIGNAL = "signal to the supervisor"


@dataclass(frozen=True)
class Ending:
    """What the supervisor saw. Either exit_code or signal is set."""

    exit_code: int | None
    signal: int | None
    stop: Stop | None
    done_file: str
    done: bool
    oom_kills: int
    stderr_tail: str


def classify(ending: Ending) -> tuple[OutcomeKind, str]:
    """The outcome kind and its reason, by the rule above."""
    if ending.exit_code == 0 and ending.done:
        return OutcomeKind.FINISHED, f"exited with status 0 and wrote {ending.done_file}"
    if ending.stop is not None:
        return _stopped(ending.stop)
    exceptions = [match.group(0).strip() for match in _EXCEPTION_LINE.finditer(ending.stderr_tail)]
    if ending.exit_code != 0 and (line := _out_of_memory_line(exceptions, ending.stderr_tail)):
        return OutcomeKind.OUT_OF_MEMORY, f"{_how(ending)}; stderr says: {_shortened(line)}"
    if ending.signal == signal.SIGKILL or ending.exit_code == _SHELL_SIGKILL:
        if ending.oom_kills > 0:
            return (
                OutcomeKind.OUT_OF_MEMORY,
                "the kernel's out-of-memory killer struck in this control group and SIGKILL ended it",
            )
        return OutcomeKind.LOST, "SIGKILL from outside ended it, and no out-of-memory kill was counted"
    if ending.exit_code == 0:
        return OutcomeKind.CRASHED, f"exited with status 0 without writing {ending.done_file}"
    return OutcomeKind.CRASHED, f"{_how(ending)}; {_last_words(exceptions, ending.stderr_tail)}"


def read_tail(path: Path) -> str:
    """The end of a log, at most STDERR_TAIL_BYTES."""
    with open(path, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - STDERR_TAIL_BYTES))
        return file.read().decode(errors="replace")


def count_oom_kills() -> int:
    """Out-of-memory kills in this process's control group so far; 0 where the kernel shows no counter.

    memory.events of control groups v2, memory.oom_control of v1; in a container the group may be mounted as the root.
    """
    mount = Path("/sys/fs/cgroup")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            candidates = [mount / group.lstrip("/") / "memory.events", mount / "memory.events"]
        elif "memory" in controllers.split(":")[-1].split(","):
            candidates = [
                mount / "memory" / group.lstrip("/") / "memory.oom_control",
                mount / "memory/memory.oom_control",
            ]
        else:
            continue
        for path in candidates:
            if path.exists():
                counters = dict(entry.split() for entry in path.read_text().splitlines())
                if "oom_kill" in counters:
                    return int(counters["oom_kill"])
    return 0


def _stopped(stop: Stop) -> tuple[OutcomeKind, str]:
    if stop is Stop.TIME_LIMIT:
        return OutcomeKind.TIMED_OUT, "ran past its time limit and was stopped"
    if stop is Stop.CANCEL:
        return OutcomeKind.CANCELLED, "was stopped because its submitter cancelled it"
    return OutcomeKind.LOST, STOPPED_FROM_OUTSIDE


def _out_of_memory_line(exceptions: list[str], stderr_tail: str) -> str | None:
    for line in exceptions:
        if _ALLOCATOR_TEXT.search(line):
            return line
    if exceptions and re.match(r"(?:\[[^\]]*\]:?\s*)?[\w.]*MemoryError\b", exceptions[-1]):
        return exceptions[-1]
    bad_alloc = _BAD_ALLOC.search(stderr_tail)
    return bad_alloc.group(0) if bad_alloc else None


def _how(ending: Ending) -> str:
    if ending.signal is not None:
        return f"died of {signal.Signals(ending.signal).name}"
    return f"exited with status {ending.exit_code}"


def _last_words(exceptions: list[str], stderr_tail: str) -> str:
    lines = [line for line in stderr_tail.splitlines() if line.strip()]
    if not exceptions and not lines:
        return "stderr is empty"
    return f"stderr says: {_shortened(exceptions[-1] if exceptions else lines[-1])}"


def _shortened(line: str) -> str:
    return line if len(line) <= 300 else line[:297] + "..."
