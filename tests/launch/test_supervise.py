"""Every kind of ending, made by real processes under a real supervisor."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_evolve.launch import rundir
from megatron_evolve.launch.job import Job, JobOutcome, OutcomeKind, Resources
from megatron_evolve.launch.process import read_stat


def start(job: Job, attempt: int = 1, **options: object) -> subprocess.Popen:
    folder = rundir.prepare_attempt(job, attempt)
    command = [sys.executable, "-m", "megatron_evolve.launch.supervise", str(folder)]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True, **options)


def run(job: Job, attempt: int = 1) -> JobOutcome:
    _, stderr = start(job, attempt).communicate(timeout=20)
    assert stderr == ""
    return rundir.read_outcome(rundir.attempt_dir(job.run_dir, attempt))


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A control group of this test's own with a memory limit; skips where none can be made."""
    mounts = {"/sys/fs/cgroup/memory": "memory.limit_in_bytes", "/sys/fs/cgroup": "memory.max"}
    for mount, limit in mounts.items():
        group = Path(mount, f"launch-test-{os.getpid()}")
        with contextlib.suppress(OSError):
            group.mkdir()
            try:
                if (group / limit).exists():
                    (group / limit).write_text(str(limit_bytes))
                    yield group
                    return
            finally:
                group.rmdir()
    pytest.skip("a control group with a memory limit needs root and a writable /sys/fs/cgroup")


def alive(pid: int) -> bool:
    stat = read_stat(pid)
    return stat is not None and stat.state not in "ZX"


def test_finished_needs_status_0_and_the_done_file(make_job: Callable[..., Job]) -> None:
    outcome = run(make_job("a", "echo out; echo err >&2; echo $HELLO > $RUN/done", env={"HELLO": "there"}))
    assert (outcome.kind, outcome.exit_code, outcome.signal, outcome.attempt) == (OutcomeKind.FINISHED, 0, None, 1)
    assert outcome.key == "a" and outcome.host == os.uname().nodename
    assert 0 < outcome.seconds < 20 and outcome.max_rss_bytes > 100_000
    job = make_job("a", "true")
    assert (job.run_dir / "done").read_text() == "there\n"
    assert (job.run_dir / "attempts/1/stdout.log").read_text() == "out\n"
    assert (job.run_dir / "attempts/1/stderr.log").read_text() == "err\n"
    assert rundir.read_json(job.run_dir / "outcome.json") == outcome.to_json()


def test_status_0_without_done_file_is_crashed(make_job: Callable[..., Job]) -> None:
    outcome = run(make_job("a", "exit 0"))
    assert (outcome.kind, outcome.exit_code) == (OutcomeKind.CRASHED, 0)
    assert outcome.reason == "exited with status 0 without writing done"


def test_an_earlier_attempts_done_file_does_not_count(make_job: Callable[..., Job]) -> None:
    assert run(make_job("a", "echo 1 > $RUN/done; exit 3")).kind is OutcomeKind.CRASHED
    job = make_job("a", "exit 0")
    second = run(job, attempt=2)
    assert (second.kind, second.attempt) == (OutcomeKind.CRASHED, 2)
    assert (job.run_dir / "attempts/2/done.earlier").read_text() == "1\n"
    assert rundir.read_outcome(job.run_dir / "attempts/1").exit_code == 3


def test_crashes_say_why(make_job: Callable[..., Job], python_job: Callable[..., Job]) -> None:
    outcome = run(python_job("raise", "raise ValueError('lr must be positive')"))
    assert (outcome.kind, outcome.exit_code) == (OutcomeKind.CRASHED, 1)
    assert outcome.reason.endswith("ValueError: lr must be positive")
    outcome = run(make_job("signal", "kill -SEGV $$"))
    assert (outcome.kind, outcome.exit_code, outcome.signal) == (OutcomeKind.CRASHED, None, signal.SIGSEGV)
    outcome = run(make_job("command", ("/no/such/program",)))
    assert (outcome.kind, outcome.exit_code) == (OutcomeKind.CRASHED, 127)
    assert "cannot run '/no/such/program': No such file" in outcome.reason


def test_a_network_that_fails_is_the_machines_fault_and_a_rank_that_fails_is_not(
    python_job: Callable[..., Job],
) -> None:
    """Two ranks write to one log, as under torchrun; the second loses its peer."""
    peer = "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:90, unhandled system error (run with "
    peer += "NCCL_DEBUG=INFO for details), NCCL version 2.30.7\\nncclSystemError: System call failed. "
    rank = f"import os, sys; sys.stderr.write('{peer}'); os._exit(1)"
    both = "import subprocess, sys; codes = [subprocess.run([sys.executable, '-c', one]).returncode for one in {!r}]; "
    both += "sys.exit(max(codes))"
    assert run(python_job("network", both.format([rank, rank]))).kind is OutcomeKind.LOST
    outcome = run(python_job("rank", both.format(["raise ValueError('no such layout')", rank])))
    assert outcome.kind is OutcomeKind.CRASHED and outcome.reason.endswith("ValueError: no such layout")


def test_a_memory_limit_makes_the_allocator_speak(python_job: Callable[..., Job]) -> None:
    outcome = run(python_job("a", "x = bytearray(300_000_000)", resources=Resources(memory_bytes=100_000_000)))
    assert outcome.kind is OutcomeKind.OUT_OF_MEMORY
    assert "MemoryError" in outcome.reason


def test_sigkill_alone_is_lost(make_job: Callable[..., Job]) -> None:
    outcome = run(make_job("a", "kill -9 $$"))
    assert (outcome.kind, outcome.signal) == (OutcomeKind.LOST, signal.SIGKILL)


def test_the_kernels_out_of_memory_killer_is_recognised(python_job: Callable[..., Job]) -> None:
    with memory_group(64_000_000) as group:
        process = start(
            job := python_job("a", "x = b'1' * 300_000_000"),
            preexec_fn=lambda: Path(group, "cgroup.procs").write_text(str(os.getpid())),
        )
        process.communicate(timeout=20)
        outcome = rundir.read_outcome(job.run_dir / "attempts/1")
    assert (outcome.kind, outcome.signal) == (OutcomeKind.OUT_OF_MEMORY, signal.SIGKILL)


def test_the_whole_group_dies_at_the_time_limit(make_job: Callable[..., Job]) -> None:
    """Neither ignoring TERM, nor the background, nor a session of one's own saves a grandchild."""
    script = (
        "trap '' TERM; sleep 300 & echo $! >> $RUN/pids; setsid sleep 300 & echo $! >> $RUN/pids;"
        "sh -c 'sleep 300 & echo $! >> $RUN/pids'; echo $$ >> $RUN/pids; while :; do sleep 0.05; done"
    )
    job = make_job("a", script, time_limit_s=0.5, grace_s=0.3)
    outcome = run(job)
    assert (outcome.kind, outcome.signal) == (OutcomeKind.TIMED_OUT, signal.SIGKILL)
    assert 0.8 <= outcome.seconds < 10
    pids = [int(line) for line in (job.run_dir / "pids").read_text().split()]
    assert len(pids) == 4 and not any(map(alive, pids))


def test_a_job_that_is_stopped_before_it_could_open_its_log_has_its_kind(make_job: Callable[..., Job]) -> None:
    """At a limit of nothing some attempts are stopped between fork and exec."""
    assert {run(make_job(f"a{n}", "sleep 60", time_limit_s=1e-6)).kind for n in range(5)} == {OutcomeKind.TIMED_OUT}


def test_a_job_may_save_in_its_grace(make_job: Callable[..., Job]) -> None:
    script = "trap 'echo saved > $RUN/saved; exit 0' TERM; while :; do sleep 0.02; done"
    job = make_job("a", script, time_limit_s=0.3, grace_s=10)
    outcome = run(job)
    assert (outcome.kind, outcome.exit_code) == (OutcomeKind.TIMED_OUT, 0)
    assert outcome.seconds < 5 and (job.run_dir / "saved").exists()


def test_a_background_process_does_not_outlive_a_finished_job(make_job: Callable[..., Job]) -> None:
    job = make_job("a", "setsid sleep 300 & echo $! > $RUN/pid; touch $RUN/done")
    assert run(job).kind is OutcomeKind.FINISHED
    assert not alive(int((job.run_dir / "pid").read_text()))


def test_cpu_time_of_the_whole_tree_is_counted(python_job: Callable[..., Job]) -> None:
    burn = "import time, subprocess, sys\nwhile time.process_time() < 0.3: pass\n"
    source = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    assert 0.3 <= run(python_job("a", source)).cpu_seconds < 3


def test_a_job_starts_with_every_signal_at_its_default(make_job: Callable[..., Job]) -> None:
    job = make_job("a", "grep -E 'SigBlk|SigIgn' /proc/self/status > $RUN/done")
    assert run(job).kind is OutcomeKind.FINISHED
    masks = [int(line.split()[1], 16) for line in (job.run_dir / "done").read_text().splitlines()]
    # Signals 32 and 33 belong to the C library: what it inherits as ignored it can neither see nor change.
    assert [mask & ~(0b11 << 31) for mask in masks] == [0, 0]


def test_a_job_cancelled_before_it_began_never_begins(make_job: Callable[..., Job]) -> None:
    job = make_job("a", "touch $RUN/done")
    rundir.prepare_attempt(job, 1)
    (job.run_dir / "attempts/1/cancel").touch()
    assert run(job).kind is OutcomeKind.CANCELLED
    assert not (job.run_dir / "done").exists()


@pytest.mark.parametrize(("marked", "kind"), [(True, OutcomeKind.CANCELLED), (False, OutcomeKind.LOST)])
def test_a_signalled_supervisor_ends_its_job(
    make_job: Callable[..., Job], wait_until: Callable, marked: bool, kind: OutcomeKind
) -> None:
    """With the mark it is a cancellation; without, somebody shuts the machine down."""
    job = make_job("a", "echo $$ > $RUN/pid; while :; do sleep 0.05; done")
    supervisor = start(job)
    wait_until((job.run_dir / "pid").exists, "the job")
    if marked:
        (job.run_dir / "attempts/1/cancel").touch()
    supervisor.terminate()
    supervisor.communicate(timeout=20)
    assert rundir.read_outcome(job.run_dir / "attempts/1").kind is kind
    assert not alive(int((job.run_dir / "pid").read_text()))


def test_the_job_dies_with_its_supervisor(make_job: Callable[..., Job], wait_until: Callable) -> None:
    job = make_job("a", "echo $$ > $RUN/pid.new; mv $RUN/pid.new $RUN/pid; while :; do sleep 0.05; done")
    supervisor = start(job)
    wait_until((job.run_dir / "pid").exists, "the job")
    supervisor.kill()
    supervisor.communicate()
    pid = int((job.run_dir / "pid").read_text())
    wait_until(lambda: not alive(pid), "the job's death")
    assert rundir.read_outcome(job.run_dir / "attempts/1") is None


def test_an_attempt_begins_once(make_job: Callable[..., Job]) -> None:
    job = make_job("a", "echo x >> $RUN/ran; sleep 0.3; touch $RUN/done")
    supervisors = [start(job) for _ in range(4)]
    for supervisor in supervisors:
        assert supervisor.communicate(timeout=20)[1] == ""
    assert run(job).kind is OutcomeKind.FINISHED
    assert (job.run_dir / "ran").read_text() == "x\n"


def test_an_outcome_waits_for_space_on_a_full_disk(
    make_job: Callable[..., Job], small_disk: Path, wait_until: Callable
) -> None:
    """The job fills the disk and finishes; its end is recorded as soon as there is room."""
    script = "touch $RUN/done; cat /dev/zero > $RUN/filler 2>/dev/null; exit 0"
    job = Job("a", ("/bin/sh", "-c", script), small_disk / "a", 60.0, "done", {"RUN": str(small_disk / "a")})
    supervisor = start(job)
    assert "no space left on device; free space" in supervisor.stderr.readline()
    assert rundir.read_outcome(job.run_dir / "attempts/1") is None
    (job.run_dir / "filler").unlink()
    supervisor.communicate(timeout=20)
    assert rundir.read_outcome(job.run_dir / "attempts/1").kind is OutcomeKind.FINISHED


def test_an_unreadable_attempt_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "attempts/1"
    command = [sys.executable, "-m", "megatron_evolve.launch.supervise", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1 and "missing" in ended.stderr
