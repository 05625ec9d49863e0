"""How a job ended: the rule that turns what its supervisor saw into one outcome kind and one sentence.

In this order:
1. finished       exit status 0 and the done file, even if it was being stopped at that moment: the work is done.
2. timed_out, hung, cancelled, lost    its supervisor stopped it: time limit, a count of progress that stood still, the
                  submitter's wish, or a signal from elsewhere to the supervisor (a machine that shuts down).
3. out_of_memory  it failed and an allocator said so in stderr: an exception line with the text of torch's CPU or CUDA
                  allocator, NCCL's "Cuda failure 'out of memory'", std::bad_alloc, or MemoryError as the final
                  exception. The lines of all ranks count, since ranks that lose their peer print a later exception.
4. SIGKILL (status 137, a shell's word for it, or torchrun's report of a rank): out_of_memory if the kernel's counter of
                  out-of-memory kills in our control group rose meanwhile. Where the job itself was killed, lost:
                  SIGKILL alone proves nothing about memory, and no program sends it to itself.
5. lost           a rank said what only the machine does: a CUDA error of memory, link or driver (ECC, NVLink, MPS, a
                  device that is busy or missing). Or a rank failed in CUDA or NCCL in any way, and the driver logged an
                  Xid that NVIDIA does not count among those of applications (`gpus.APPLICATION_XIDS`).
6. crashed        a rank has an exception of its own, or died of a signal of its own: SIGSEGV, SIGBUS, SIGFPE, SIGILL.
                  An illegal address or a device-side assert is one: kernels do that.
7. hung           all that is left are collectives that never returned: "Watchdog caught collective operation timeout".
8. lost           all that is left are ranks that lost a peer or their network: NCCL's "unhandled system error",
                  "unhandled cuda error" with no cause named, "remote process exited or there was a network error",
                  gloo's closed connections, torch's store and sockets, or a rank that SIGKILL took.
9. crashed        every other exit status or signal, and status 0 without the done file.

So a rank's own fault outweighs what its peers say of its end, and the machine's word outweighs both. lost and hung are
tried again unchanged; the others are the candidate's. The texts are those of ncclGetErrorString (NCCL 2.30.7), of
ProcessGroupNCCL and getNcclErrorDetailStr (torch 2.14) and of cudaGetErrorString (CUDA 13.0), read from the libraries;
torch of the years before words them the same (pytorch#118369, NVIDIA/nccl#1609, NVIDIA/Megatron-LM#935).
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
_LOG_PREFIX = re.compile(r"^\[\d{4}-\d\d-\d\dT[^\]\n]*\]\s*")  # when and who, as a job's own log lines begin
_BAD_ALLOC = re.compile(r"terminate called after throwing an instance of 'std::bad_alloc'")

# What C++ says when an exception ends a process, and what the thread that watches NCCL logs before it does.
_TERMINATED = re.compile(r"^\s*(?:\[[^\]\n]*\]:?\s*)?what\(\):\s+(.*)$", re.MULTILINE)
_WATCHDOG_LINE = re.compile(r"^.*Watchdog caught collective operation timeout.*$", re.MULTILINE)
_NCCL_CAUSE = re.compile(r"Cuda failure (?:\d+ )?'([^'\n]*)'")

_MACHINE_TEXT = re.compile(
    r"uncorrectable ECC error|uncorrectable NVLink error|Invalid access of peer GPU memory over nvlink"
    r"|CUDA-capable device\(s\) is/are busy or unavailable|no CUDA-capable device is detected"
    r"|system not yet initialized|system has unsupported display driver|MPS client failed to connect"
    r"|remote procedural call between the MPS server|MPS server is not ready"
)
_DEVICE_TEXT = re.compile(r"CUDA error|Cuda failure|NCCL error|AcceleratorError|CUBLAS_STATUS_|CUDNN_STATUS_")
_COLLECTIVE_TEXT = re.compile(r"Watchdog caught collective operation timeout|ProcessGroupNCCL's watchdog got stuck")
_PEER_TEXT = re.compile(
    r"unhandled system error|unhandled cuda error|remote process exited or there was a network error"
    r"|ncclSystemError|ncclUnhandledCudaError|ncclRemoteError|gloo/transport/|Connection (?:closed|reset) by peer"
    r"|NCCL communicator (?:was aborted|encountered error)|DistNetworkError|DistStoreError|Rendezvous\w*Error"
    r"|ChildFailedError"
)
_RANK_SIGNAL = re.compile(r"Signal (\d+) \(SIG\w+\) received by PID \d+")  # torchrun's account of its ranks
_OWN_SIGNALS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_SHELL_SIGKILL = 128 + signal.SIGKILL
STOPPED_FROM_OUTSIDE = "was stopped because its supervisor was signalled from outside"


class Stop(StrEnum):
    """Why the supervisor stopped the job."""

    TIME_LIMIT = "time limit"
    STANDSTILL = "standstill"
    CANCEL = "cancel"
    SIGNAL = "signal to the supervisor"


@dataclass(frozen=True)
class Ending:
    """What the supervisor saw. Either exit_code or signal is set. xids are the driver's faults while it ran."""

    exit_code: int | None
    signal: int | None
    stop: Stop | None
    done_file: str
    done: bool
    oom_kills: int
    stderr_tail: str
    stood_still: str = ""
    xids: tuple[int, ...] = ()


def classify(ending: Ending) -> tuple[OutcomeKind, str]:
    """The outcome kind and its reason, by the rule above."""
    if ending.exit_code == 0 and ending.done:
        return OutcomeKind.FINISHED, f"exited with status 0 and wrote {ending.done_file}"
    if ending.stop is not None:
        return _stopped(ending)
    said = _Said.of(ending.stderr_tail)
    if ending.exit_code != 0 and (line := _out_of_memory_line(said.exceptions, ending.stderr_tail)):
        return OutcomeKind.OUT_OF_MEMORY, f"{_how(ending)}; stderr says: {_shortened(line)}"
    killed = ending.signal == signal.SIGKILL or ending.exit_code == _SHELL_SIGKILL
    if (killed or signal.SIGKILL in said.signals) and ending.oom_kills > 0:
        return (
            OutcomeKind.OUT_OF_MEMORY,
            "the kernel's out-of-memory killer struck in this control group and SIGKILL ended it",
        )
    if killed:
        return OutcomeKind.LOST, "SIGKILL from outside ended it, and no out-of-memory kill was counted"
    if ending.exit_code == 0:
        return OutcomeKind.CRASHED, f"exited with status 0 without writing {ending.done_file}"
    return _failed(ending, said)


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


@dataclass(frozen=True)
class _Said:
    """What the ranks left on stderr, sorted by whose fault it tells of. `exceptions` are all lines that name one."""

    exceptions: list[str]
    machine: list[str]
    own: list[str]
    collective: list[str]
    peers: list[str]
    signals: set[int]

    @classmethod
    def of(cls, tail: str) -> "_Said":
        exceptions = [match.group(0).strip() for match in _EXCEPTION_LINE.finditer(tail)]
        lines = [*exceptions, *(match.group(1).strip() for match in _TERMINATED.finditer(tail))]
        if any("unhandled cuda error" in line for line in lines):  # NCCL's last error may name the cause
            lines += [f"CUDA error: {cause}" for cause in _NCCL_CAUSE.findall(tail)]
        collective = [match.group(0).strip() for match in _WATCHDOG_LINE.finditer(tail)]
        said = cls(exceptions, [], [], collective, [], {int(number) for number in _RANK_SIGNAL.findall(tail)})
        for line in lines:
            if _MACHINE_TEXT.search(line):
                said.machine.append(line)
            elif _COLLECTIVE_TEXT.search(line):
                said.collective.append(line)
            else:
                (said.peers if _PEER_TEXT.search(line) else said.own).append(line)
        return said


def _failed(ending: Ending, said: _Said) -> tuple[OutcomeKind, str]:
    """Rules 5 to 9: whose fault an exit status or a signal is."""
    on_device = any(_DEVICE_TEXT.search(line) for line in (*said.own, *said.peers, *said.collective))
    if said.machine:
        return OutcomeKind.LOST, f"{_how(ending)}; the machine failed it: {_shortened(said.machine[-1])}"
    if ending.xids and (on_device or said.collective):
        numbers = ", ".join(map(str, dict.fromkeys(ending.xids)))
        last = (said.own or said.peers or said.collective)[-1]
        return OutcomeKind.LOST, f"{_how(ending)}; the GPU driver logged Xid {numbers} meanwhile: {_shortened(last)}"
    if said.own or ending.signal in _OWN_SIGNALS or said.signals & _OWN_SIGNALS:
        return OutcomeKind.CRASHED, f"{_how(ending)}; {_last_words(said.own, ending.stderr_tail)}"
    if said.collective:
        return OutcomeKind.HUNG, f"{_how(ending)}; ranks waited in vain: {_shortened(said.collective[0])}"
    if said.peers or signal.SIGKILL in said.signals:
        last = said.peers[-1] if said.peers else "SIGKILL from outside ended a rank"
        return OutcomeKind.LOST, f"{_how(ending)}; no rank had a fault of its own: {_shortened(last)}"
    return OutcomeKind.CRASHED, f"{_how(ending)}; {_last_words([], ending.stderr_tail)}"


def _stopped(ending: Ending) -> tuple[OutcomeKind, str]:
    if ending.stop is Stop.TIME_LIMIT:
        return OutcomeKind.TIMED_OUT, "ran past its time limit and was stopped"
    if ending.stop is Stop.STANDSTILL:
        return OutcomeKind.HUNG, f"{ending.stood_still} though it lived, and was stopped"
    if ending.stop is Stop.CANCEL:
        return OutcomeKind.CANCELLED, "was stopped because its submitter cancelled it"
    return OutcomeKind.LOST, STOPPED_FROM_OUTSIDE


def _out_of_memory_line(exceptions: list[str], stderr_tail: str) -> str | None:
    for line in exceptions:
        if _ALLOCATOR_TEXT.search(line):
            return line
    if any("unhandled cuda error" in line for line in exceptions):
        for match in _NCCL_CAUSE.finditer(stderr_tail):
            if match.group(1) == "out of memory":
                return match.group(0)
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
    line = _LOG_PREFIX.sub("", line)
    return line if len(line) <= 300 else line[:297] + "..."
