"""The rule that names an ending, on what supervisors see."""

import signal

import pytest

from megatron_evolve.launch.ending import Ending, Stop, classify, count_oom_kills
from megatron_evolve.launch.job import OutcomeKind

TRACEBACK = 'Traceback (most recent call last):\n  File "run.py", line 3, in <module>\n'
CPU_ALLOCATOR = (
    "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
    "to allocate 4000000000000000 bytes. Error code 12 (Cannot allocate memory)\n"
)
CUDA = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139 GiB\n"
PEER = "[rank1]: RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234\n"
ELASTIC = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n====\nrun.py FAILED\n"
BAD_ALLOC = "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n"


def ended(code: int | None = None, signum: int | None = None, stderr: str = "", **fields: object) -> Ending:
    return Ending(
        code, signum, **({"stop": None, "done_file": "d", "done": False, "oom_kills": 0} | fields), stderr_tail=stderr
    )


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        (ended(0, done=True), OutcomeKind.FINISHED),
        (ended(0, done=True, stop=Stop.TIME_LIMIT), OutcomeKind.FINISHED),
        (ended(0, done=True, stderr=TRACEBACK + CUDA), OutcomeKind.FINISHED),
        (ended(0), OutcomeKind.CRASHED),
        (ended(1, done=True), OutcomeKind.CRASHED),
        (ended(0, stop=Stop.TIME_LIMIT), OutcomeKind.TIMED_OUT),
        (ended(signum=signal.SIGKILL, stop=Stop.TIME_LIMIT, oom_kills=1), OutcomeKind.TIMED_OUT),
        (ended(signum=signal.SIGTERM, stop=Stop.CANCEL), OutcomeKind.CANCELLED),
        (ended(signum=signal.SIGTERM, stop=Stop.SIGNAL), OutcomeKind.LOST),
        (ended(1, stderr=TRACEBACK + CPU_ALLOCATOR), OutcomeKind.OUT_OF_MEMORY),
        (ended(1, stderr=TRACEBACK + "[rank0]: " + CUDA + PEER + ELASTIC), OutcomeKind.OUT_OF_MEMORY),
        (ended(1, stderr=TRACEBACK + "MemoryError\n"), OutcomeKind.OUT_OF_MEMORY),
        (
            ended(1, stderr=TRACEBACK + "numpy._core._exceptions._ArrayMemoryError: Unable to\n"),
            OutcomeKind.OUT_OF_MEMORY,
        ),
        (ended(signum=signal.SIGABRT, stderr=BAD_ALLOC), OutcomeKind.OUT_OF_MEMORY),
        (
            ended(1, stderr=TRACEBACK + "MemoryError\n\nDuring handling ...\n" + TRACEBACK + "ValueError: no\n"),
            OutcomeKind.CRASHED,
        ),
        (
            ended(1, stderr="warning: CUDA out of memory once, batch halved\n" + TRACEBACK + "ValueError: no\n"),
            OutcomeKind.CRASHED,
        ),
        (ended(signum=signal.SIGKILL, oom_kills=1), OutcomeKind.OUT_OF_MEMORY),
        (ended(137, oom_kills=1), OutcomeKind.OUT_OF_MEMORY),
        (ended(1, oom_kills=1), OutcomeKind.CRASHED),
        (ended(signum=signal.SIGKILL), OutcomeKind.LOST),
        (ended(signum=signal.SIGSEGV), OutcomeKind.CRASHED),
    ],
)
def test_each_ending_has_one_kind(ending: Ending, kind: OutcomeKind) -> None:
    assert classify(ending)[0] is kind


def test_the_reason_holds_the_final_exception() -> None:
    reason = classify(ended(3, stderr=TRACEBACK + "ValueError: lr must be positive\nbye\n"))[1]
    assert reason == "exited with status 3; stderr says: ValueError: lr must be positive"
    assert "SIGSEGV" in classify(ended(signum=signal.SIGSEGV))[1]
    assert len(classify(ended(1, stderr="x" * 5000))[1]) < 400


def test_the_kernels_counter_is_readable() -> None:
    assert count_oom_kills() >= 0
