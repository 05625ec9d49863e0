"""GPUs as their driver tells of them: memory in use by nvidia-smi, and faults by the kernel's log.

Both are asked only for jobs that take GPUs, and both may be silent: a machine without nvidia-smi, or a kernel log that
this user may not read, leaves a measurement untaken (None or nothing), never a job unrun.
"""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # so that CUDA counts GPUs as nvidia-smi does, not the fastest first

MEMORY_LOG = "gpu-memory.csv"
SAMPLE_EVERY_S = 10  # torch's allocator gives nothing back to the driver, so what it takes is seen at the next sample
ANSWER_S = 15.0  # without persistence mode the driver starts up for each call; 1 to 3 s an 8-GPU node

# More than this on a GPU without a job of ours is somebody else's: the driver itself keeps up to about 0.6 GB.
FOREIGN_BYTES = 2 * 2**30

MIB = 2**20
KERNEL_LOG = Path("/dev/kmsg")

# Faults that programs cause and that leave the GPU healthy: NVIDIA's own list, `ignoredXids` of internal/rm/health.go
# in github.com/NVIDIA/k8s-device-plugin. Every other Xid takes a GPU out of service there.
APPLICATION_XIDS = frozenset({13, 31, 43, 45, 68, 109})
_XID = re.compile(r"NVRM: Xid \([^)]*\): (\d+)")


class GpusFilled(Exception):
    """The GPUs that a job needs are filled by other programs. The message is one sentence with the remedy."""


@dataclass(frozen=True)
class Gpu:
    """Memory of one GPU, whoever uses it."""

    index: str
    uuid: str
    used_bytes: int
    total_bytes: int


def gpus_here() -> list[Gpu]:
    """Every GPU that nvidia-smi lists; none where it is missing, fails or does not answer in time."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.used,memory.total", "--format=csv,noheader,nounits"]
    asked = subprocess.Popen(query, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        told, _ = asked.communicate(timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        asked.kill()  # not waited for: below a dead GPU it may never end
        return []
    rows = [_fields(line, 4) for line in told.decode(errors="replace").splitlines()]
    return [Gpu(row[0], row[1], int(row[2]) * MIB, int(row[3]) * MIB) for row in rows if row]


def filled_by_others(wanted: Sequence[str], gpus: Sequence[Gpu]) -> dict[str, Gpu]:
    """Of the wanted GPUs (by index or uuid, none of them ours now), those that another program fills."""
    known = {name: gpu for gpu in gpus for name in (gpu.index, gpu.uuid)}
    return {name: known[name] for name in wanted if name in known and known[name].used_bytes > FOREIGN_BYTES}


class MemoryLog:
    """Samples the memory of a job's GPUs into a file of its attempt, by one nvidia-smi that runs as long as the job.

    In the sampling process `prepare` is called before anything else.
    """

    def __init__(self, folder: Path, devices: str, prepare: Callable[[], None]) -> None:
        self._path = folder / MEMORY_LOG
        self._process: subprocess.Popen | None = None
        if not devices or shutil.which("nvidia-smi") is None:
            return
        query = ["nvidia-smi", "--query-gpu=timestamp,index,memory.used,memory.total", "--format=csv,noheader,nounits"]
        with open(self._path, "wb") as file:
            command = [*query, "-i", devices, "-l", str(SAMPLE_EVERY_S)]
            quiet = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.DEVNULL}
            self._process = subprocess.Popen(command, preexec_fn=prepare, **quiet)

    @property
    def pid(self) -> int | None:
        """The sampling process, a child of this one; None where nothing is sampled."""
        return self._process.pid if self._process is not None else None

    def peak_bytes(self) -> int | None:
        """The most that was in use on any of the GPUs, None if no sample was taken."""
        if self._process is None:
            return None
        rows = [_fields(line, 4) for line in self._path.read_text(errors="replace").splitlines()]
        return max((int(row[2]) * MIB for row in rows if row), default=None)


class XidLog:
    """The driver's fault reports in the kernel's log from now on."""

    def __init__(self, path: Path = KERNEL_LOG) -> None:
        self._fd: int | None = None
        with contextlib.suppress(OSError):  # no such log in a container, or it is the administrator's
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            os.lseek(self._fd, 0, os.SEEK_END)

    def faults(self) -> tuple[int, ...]:
        """Numbers of the reports that no program causes, in order. Ends the reading."""
        if self._fd is None:
            return ()
        text = []
        while record := self._record():
            text.append(record.decode(errors="replace"))
        os.close(self._fd)
        self._fd = None
        found = (int(number) for number in _XID.findall("".join(text)))
        return tuple(number for number in found if number not in APPLICATION_XIDS)

    def _record(self) -> bytes:
        """The next record, empty at the end."""
        while True:
            try:
                return os.read(self._fd, 8192)
            except BrokenPipeError:  # overwritten before it was read: the one after it comes next
                continue
            except OSError:
                return b""


def _fields(line: str, count: int) -> list[str] | None:
    """The fields of a line of numbers; None for any other line, as of a GPU that is lost."""
    words = [word.strip() for word in line.split(",")]
    return words if len(words) == count and words[-1].isdigit() and words[-2].isdigit() else None
