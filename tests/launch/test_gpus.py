"""GPUs through a stand-in for nvidia-smi on the path, and through a file for the kernel's log."""

import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_evolve.launch import gpus, local
from megatron_evolve.launch.job import Job, OutcomeKind, Resources
from megatron_evolve.launch.local import LocalLauncher

GIB = 2**30

# Answers as nvidia-smi does for a query, once or again and again; MIB.N holds what is in use on GPU N.
FAKE = """#!{python}
import sys, time
from pathlib import Path
words = dict(zip(sys.argv[1:], sys.argv[2:]))
fields = sys.argv[1].removeprefix("--query-gpu=").split(",")
shown = words["-i"].split(",") if "-i" in words else ["0", "1", "2"]
while True:
    for index in shown:
        used = Path({folder!r}, f"MIB.{{index}}").read_text()
        row = {{"timestamp": "2026/01/02 03:04:05.678", "index": index, "uuid": f"GPU-{{index}}", "memory.used": used}}
        print(", ".join(row.get(name, "81559") for name in fields), flush=True)
    if "-l" not in words:
        break
    time.sleep(0.05)
"""


@pytest.fixture
def used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Sets what is in use on a GPU, in MiB."""
    folder = tmp_path / "nvidia"
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(FAKE.format(python=sys.executable, folder=str(folder)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def put(index: int, mib: int) -> None:
        (folder / f"new.{index}").write_text(str(mib))
        (folder / f"new.{index}").rename(folder / f"MIB.{index}")

    for index in range(3):
        put(index, 4)
    return put


@pytest.fixture
def node(tmp_path: Path) -> Iterator[LocalLauncher]:
    with LocalLauncher(8, tmp_path / "state", devices=("0", "1", "2")) as launcher:
        yield launcher


def test_gpus_are_read_and_what_others_fill_is_known_by_index_and_uuid(used: Callable[[int, int], None]) -> None:
    used(1, 70_000)
    found = gpus.gpus_here()
    assert [(gpu.index, gpu.uuid) for gpu in found] == [("0", "GPU-0"), ("1", "GPU-1"), ("2", "GPU-2")]
    assert found[1].used_bytes == 70_000 * 2**20 and found[1].total_bytes == 81_559 * 2**20
    assert list(gpus.filled_by_others(["0", "1", "7"], found)) == ["1"]
    assert list(gpus.filled_by_others(["GPU-1"], found)) == ["GPU-1"]


def test_without_nvidia_smi_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.gpus_here() == []
    log = gpus.MemoryLog(tmp_path, "0", lambda: None)
    assert log.pid is None and log.peak_bytes() is None


def test_a_driver_that_does_not_answer_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpus, "ANSWER_S", 0.2)
    assert gpus.gpus_here() == []


def test_the_peak_of_a_jobs_gpus_is_in_its_outcome(
    node: LocalLauncher,
    used: Callable[[int, int], None],
    make_job: Callable[..., Job],
    ending_of: Callable,
    wait_until: Callable,
    tmp_path: Path,
) -> None:
    job = make_job(
        "a",
        'echo "$CUDA_VISIBLE_DEVICES $CUDA_DEVICE_ORDER" > $RUN/given; '
        "until [ -e $RUN/go ]; do sleep 0.02; done; touch $RUN/done",
        resources=Resources(gpus=2),
    )
    node.submit(job)
    node.poll(["a"])
    log = job.run_dir / "attempts/1/gpu-memory.csv"
    wait_until(lambda: log.exists() and log.stat().st_size, "a sample")
    for index, mib in ((0, 9_000), (1, 50_000), (2, 80_000)):
        used(index, mib)
    wait_until(lambda: "50000" in log.read_text(), "the peak")
    used(1, 4)
    (job.run_dir / "go").touch()
    outcome = ending_of(node, "a")
    assert (outcome.kind, outcome.max_gpu_bytes) == (OutcomeKind.FINISHED, 50_000 * 2**20), "of its own GPUs alone"
    assert (job.run_dir / "given").read_text() == "0,1 PCI_BUS_ID\n"
    assert outcome.reason == "exited with status 0 and wrote done", "and the sampler is gone"


def test_no_job_is_put_on_a_gpu_that_another_program_fills(
    node: LocalLauncher,
    used: Callable[[int, int], None],
    make_job: Callable[..., Job],
    ending_of: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of three is filled: a job of one GPU goes beside it, one of three waits, and then says what for."""
    monkeypatch.setattr(local, "ASK_AGAIN_S", 0.0)
    used(0, 70_000)
    show = 'echo "$CUDA_VISIBLE_DEVICES" > $RUN/done'
    small, large = (
        make_job("small", show, resources=Resources(gpus=1)),
        make_job("large", show, resources=Resources(gpus=3)),
    )
    node.submit(small)
    assert ending_of(node, "small").kind is OutcomeKind.FINISHED
    assert (small.run_dir / "done").read_text() == "1\n"
    node.submit(large)
    assert node.poll(["large"]) == {"large": "pending"}
    monkeypatch.setattr(local, "FILLED_S", 0.0)
    with pytest.raises(
        gpus.GpusFilled, match=r"job large needs 3 of the GPUs 0,1,2, and .* \(GPU 0 68 GiB\): end them"
    ):
        node.poll(["large"])
    used(0, 600)  # what a driver keeps for itself
    assert ending_of(node, "large").kind is OutcomeKind.FINISHED
    assert (large.run_dir / "done").read_text() == "0,1,2\n"


def test_only_faults_of_the_gpu_since_the_start_count(tmp_path: Path) -> None:
    path = tmp_path / "kmsg"
    path.write_text("4,1,1,-;NVRM: Xid (PCI:0000:10:1c): 79, pid=1, GPU has fallen off the bus.\n")
    log = gpus.XidLog(path)
    with open(path, "a") as kernel:
        kernel.write("4,2,2,-;NVRM: Xid (PCI:0000:10:1c): 31, pid=12, name=python, Ch 00000008, MMU Fault\n")
        kernel.write("4,3,3,-;NVRM: Xid (PCI:0000:10:1c): 48, pid=12, name=python, An uncorrectable double bit error\n")
    assert log.faults() == (48,)
    assert gpus.XidLog(tmp_path / "none").faults() == ()
