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

# As torch 2.14 and NCCL 2.30 word them; the shapes are those of public reports (see `ending`).
NCCL = (
    "[rank{rank}]: torch.distributed.DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/x.cpp:90, "
)
SYSTEM = NCCL.format(rank=3) + "unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.30.7\n"
SYSTEM += "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. \n"
SYSTEM += "Last error:\nCall to ibv_modify_qp failed with 110 Connection timed out\n"
REMOTE = NCCL.format(rank=0) + "remote process exited or there was a network error, NCCL version 2.30.7\n"
REMOTE += "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
UNHANDLED = NCCL.format(rank=1) + "unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.30.7\n"
UNHANDLED += "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
TIMEOUT = (
    "[rank{rank}]:[E1218 20:27:21.426415540 ProcessGroupNCCL.cpp:685] [Rank {rank}] Watchdog caught collective "
    "operation timeout: WorkNCCL(SeqNum=64, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for "
    "600081 milliseconds before timing out.\n"
    "terminate called after throwing an instance of 'c10::DistBackendError'\n  what():  [PG ID 0 PG GUID 0(default_pg) "
    "Rank {rank}] Process group watchdog thread terminated with exception: [Rank {rank}] Watchdog caught collective "
    "operation timeout: WorkNCCL(SeqNum=64, OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600081 milliseconds before "
    "timing out.\nException raised from checkTimeout at ProcessGroupNCCL.cpp:688 (most recent call first):\n"
)
TIMEOUTS = TIMEOUT.format(rank=0) + TIMEOUT.format(rank=1)
ILLEGAL = "torch.AcceleratorError: CUDA error: an illegal memory access was encountered\n"
ECC = "[rank2]: torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered\n"
BUSY = "RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable\n"
OWN = "[rank1]: ValueError: a batch of 6 rows must divide by 4 ranks\n"
TORCHRUN = ELASTIC + "  exitcode  : -{n} (pid: 77)\n  traceback : Signal {n} (SIG{name}) received by PID 77\n"
SEGV, KILL = TORCHRUN.format(n=11, name="SEGV"), TORCHRUN.format(n=9, name="KILL")


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
        (ended(signum=signal.SIGTERM, stop=Stop.STANDSTILL, stood_still="stood still"), OutcomeKind.HUNG),
        (ended(0, done=True, stop=Stop.STANDSTILL, stood_still="stood still"), OutcomeKind.FINISHED),
        # the machine's word
        (ended(1, stderr=TRACEBACK + ECC + REMOTE + ELASTIC), OutcomeKind.LOST),
        (ended(1, stderr=TRACEBACK + ECC + OWN + ELASTIC), OutcomeKind.LOST),
        (ended(1, stderr=TRACEBACK + BUSY), OutcomeKind.LOST),
        (
            ended(1, stderr=UNHANDLED + "Cuda failure 'uncorrectable NVLink error detected during the execution'\n"),
            OutcomeKind.LOST,
        ),
        # a fault of a kernel's, unless the driver says that the GPU failed
        (ended(1, stderr=TRACEBACK + ILLEGAL), OutcomeKind.CRASHED),
        (ended(1, stderr=TRACEBACK + ILLEGAL, xids=(79,)), OutcomeKind.LOST),
        (ended(1, stderr=TIMEOUTS, xids=(79,)), OutcomeKind.LOST),
        (ended(1, stderr=TRACEBACK + OWN, xids=(79,)), OutcomeKind.CRASHED),
        (ended(1, stderr=UNHANDLED + "Cuda failure 'an illegal memory access was encountered'\n"), OutcomeKind.CRASHED),
        # a rank's own fault outweighs what its peers say
        (ended(1, stderr=REMOTE + TRACEBACK + OWN + TIMEOUTS + ELASTIC), OutcomeKind.CRASHED),
        (ended(1, stderr=TRACEBACK + OWN + PEER + ELASTIC), OutcomeKind.CRASHED),
        (ended(1, stderr=REMOTE + SEGV), OutcomeKind.CRASHED),
        (ended(1, stderr=UNHANDLED + "Cuda failure 2 'out of memory'\n" + TIMEOUTS), OutcomeKind.OUT_OF_MEMORY),
        (ended(1, stderr=TRACEBACK + "[rank0]: " + CUDA + REMOTE + TIMEOUTS), OutcomeKind.OUT_OF_MEMORY),
        # all that is left
        (ended(signum=signal.SIGABRT, stderr=TIMEOUTS), OutcomeKind.HUNG),
        (ended(1, stderr=TIMEOUTS + REMOTE + ELASTIC), OutcomeKind.HUNG),
        (ended(1, stderr=SYSTEM + REMOTE + ELASTIC), OutcomeKind.LOST),
        (ended(1, stderr=REMOTE + ELASTIC), OutcomeKind.LOST),
        (ended(1, stderr=UNHANDLED), OutcomeKind.LOST),
        (ended(1, stderr=TRACEBACK + PEER + ELASTIC), OutcomeKind.LOST),
        (ended(1, stderr=PEER + KILL), OutcomeKind.LOST),
        (ended(1, stderr="RuntimeError: NCCL communicator was aborted on rank 3.\n" + ELASTIC), OutcomeKind.LOST),
        (ended(1, stderr=PEER + KILL, oom_kills=1), OutcomeKind.OUT_OF_MEMORY),
    ],
)
def test_each_ending_has_one_kind(ending: Ending, kind: OutcomeKind) -> None:
    assert classify(ending)[0] is kind


def test_the_reason_holds_the_final_exception() -> None:
    reason = classify(ended(3, stderr=TRACEBACK + "ValueError: lr must be positive\nbye\n"))[1]
    assert reason == "exited with status 3; stderr says: ValueError: lr must be positive"
    assert "SIGSEGV" in classify(ended(signum=signal.SIGSEGV))[1]
    assert len(classify(ended(1, stderr="x" * 5000))[1]) < 400


def test_the_reason_names_what_decided() -> None:
    assert "Connection timed out" not in (reason := classify(ended(1, stderr=SYSTEM + REMOTE))[1])
    assert "no rank had a fault of its own" in reason
    assert "the GPU driver logged Xid 79, 48 meanwhile" in classify(ended(1, stderr=ILLEGAL, xids=(79, 48, 79)))[1]
    assert "ranks waited in vain: [rank0]" in classify(ended(1, stderr="noise\n" + TIMEOUT.format(rank=0)))[1]
    still = ended(signum=signal.SIGTERM, stop=Stop.STANDSTILL, stood_still="stood still at step 3 of 9 for 60 s")
    assert classify(still)[1] == "stood still at step 3 of 9 for 60 s though it lived, and was stopped"


def test_the_kernels_counter_is_readable() -> None:
    assert count_oom_kills() >= 0
