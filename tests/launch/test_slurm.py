"""Slurm's scripts: the templates filled in, what does not fit a cluster refused, and a batch script's start by hand.

No Slurm is needed here; `tests/slurm` runs a real one.
"""

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_evolve.launch import rundir, slurm_queue, starts
from megatron_evolve.launch.fence import Fenced, Token, check_fence, fence_environment, raise_fence, read_fence
from megatron_evolve.launch.job import Job, JobOutcome, OutcomeKind, Resources
from megatron_evolve.launch.slurm import SCRIPTS, Container, Queue, inside, name_of, render, render_array, shape
from megatron_evolve.launch.slurm_batch import job_id
from megatron_evolve.launch.slurm_launcher import SlurmLauncher

NODE = Queue(gpus_per_node=8)
WIDE = Resources(cores=128, gpus=16, tasks=16)


def job(tmp_path: Path, *argv: str, **fields: object) -> Job:
    return Job("1/ab/train", argv or ("true",), tmp_path / "run", 90.0, "done", **fields)


def options(script: str) -> dict[str, str]:
    """The script's options as sbatch reads them."""
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (shlex.split(line)[0].partition("=") for line in lines)}


def starter(script: str) -> list[str]:
    """The words that stand before the job's command."""
    return shlex.split(script.replace("\\\n", " ").splitlines()[-1])[6:]


def test_ranks_are_srun_s_tasks_on_whole_nodes(tmp_path: Path) -> None:
    wide = job(tmp_path, "python3", "-m", "train", resources=WIDE, grace_s=100.0)
    queue = Queue(
        8, account="me", partition="batch,long", constraint="h100&nvlink", options={"mem": "0", "exclusive": ""}
    )
    script = render(wide, queue)
    folder = tmp_path / "run" / "attempts" / "1"
    assert options(script.text) == {
        "job-name": script.name,
        "nodes": "2",
        "ntasks-per-node": "8",
        "cpus-per-task": "8",
        "gpus-per-node": "8",
        "time": "5",  # 90 s, its grace and a minute
        "output": str(folder / "slurm.log"),
        "account": "me",
        "partition": "batch,long",
        "constraint": "h100&nvlink",
        "mem": "0",
        "exclusive": "",
        "signal": "B:TERM@160",
        "requeue": "",
        "open-mode": "append",
    }
    assert starter(script.text) == ["srun", "--kill-on-bad-exit=1", "--input=none", "--cpus-per-task=8"]
    assert f"slurm_batch {folder} -- " in script.text and "# It runs: python3 -m train\n" in script.text
    assert "@" not in script.text.replace("B:TERM@160", "")


def test_one_process_needs_no_srun_and_a_part_of_a_node_no_other(tmp_path: Path) -> None:
    script = render(job(tmp_path, resources=Resources(cores=16, gpus=2)), NODE).text
    asked = {"nodes": "1", "ntasks-per-node": "1", "cpus-per-task": "16", "gpus-per-node": "2"}
    assert asked.items() <= options(script).items()
    assert starter(script) == []
    assert "gpus-per-node" not in options(render(job(tmp_path), NODE).text)


@pytest.mark.parametrize(
    ("runtime", "tasks", "words"),
    [
        ("pyxis", 16, ["--container-image=a.sqsh", "--container-mounts=/a:/a,/b:/c"]),
        ("pyxis", 1, ["srun", "--kill-on-bad-exit=1", "--input=none", "--container-image=a.sqsh"]),
        ("apptainer", 16, ["apptainer", "exec", "--nv", "--bind", "/a:/a,/b:/c", "a.sqsh"]),
        ("apptainer", 1, ["apptainer", "exec", "--bind", "/a:/a,/b:/c", "a.sqsh"]),
    ],
)
def test_containers(runtime: str, tasks: int, words: list[str], tmp_path: Path) -> None:
    queue = Queue(8, container=Container(runtime, "a.sqsh", ("/a:/a", "/b:/c"), python="/usr/bin/python3"))
    asked = WIDE if tasks == 16 else Resources()
    mine = inside(job(tmp_path, sys.executable, "-m", "train", resources=asked), queue)
    assert mine.argv == ("/usr/bin/python3", "-m", "train")
    found = starter(render(mine, queue).text)
    assert " ".join(words) in " ".join(found) and (found[0] == "srun") == (tasks == 16 or runtime == "pyxis")


def test_a_submission_s_name_is_its_attempts_alone(tmp_path: Path) -> None:
    one = job(tmp_path)
    names = {render(one, NODE).name, render(one, NODE, 2).name, render(dataclasses.replace(one, key="b"), NODE).name}
    names.add(render(dataclasses.replace(one, run_dir=tmp_path / "other"), NODE).name)
    assert len(names) == 4 and render(one, NODE).name in names
    assert name_of([tmp_path], "a b\n;c").startswith("a_b__c.")


def test_an_array_is_of_one_shape_and_throttled(tmp_path: Path) -> None:
    jobs = [dataclasses.replace(job(tmp_path), key=str(number)) for number in range(8)]
    script = render_array(jobs, Queue(8, throttle=3), tmp_path / "list.attempts", "eight").text
    assert options(script)["array"] == "0-7%3" and options(script)["job-name"] == "eight"
    assert f"slurm_batch {tmp_path / 'list.attempts'} --" in script
    assert shape(jobs[0]) == shape(jobs[1]) != shape(dataclasses.replace(jobs[1], time_limit_s=91.0))


@pytest.mark.parametrize(("gpus", "tasks"), [(12, 12), (16, 3)])
def test_what_does_not_fill_whole_nodes_is_refused(gpus: int, tasks: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"whole nodes of 8 GPUs.*asks for {gpus} GPUs and {tasks} tasks"):
        render(job(tmp_path, resources=Resources(cores=16, gpus=gpus, tasks=tasks)), NODE)


def test_a_job_that_outlasts_the_longest_allocation_asks_for_that(tmp_path: Path) -> None:
    day = dataclasses.replace(job(tmp_path), time_limit_s=86400.0)
    assert options(render(day, NODE).text)["time"] == "1442"
    assert options(render(day, Queue(8, longest_s=3600.0)).text)["time"] == "60"
    with pytest.raises(ValueError, match=r"must last 210 s or more.*got 120 s"):
        render(day, Queue(8, longest_s=120.0))


def test_an_administrator_s_templates_are_the_scripts(tmp_path: Path) -> None:
    mine = shutil.copytree(SCRIPTS, tmp_path / "scripts")
    text = (mine / "eval.sbatch").read_text()
    (mine / "eval.sbatch").write_text(text.replace("# It runs", "module load cuda\n# It runs"))
    assert "\nmodule load cuda\n" in render(job(tmp_path), Queue(8, scripts=mine)).text
    (mine / "eval.sbatch").write_text(text + "# @colour@\n")
    with pytest.raises(ValueError, match="unknown field @colour@; the fields are account, array"):
        render(job(tmp_path), Queue(8, scripts=mine))
    with pytest.raises(ValueError, match=r"expected a script's template at .*train\.sbatch"):
        render(job(tmp_path, resources=WIDE), Queue(8, scripts=tmp_path))


# --- a batch script's start, without Slurm ----------------------------------------------------------------------------


def start(one: Job, number: str = "17", restart: int = 0, attempt: int = 1) -> JobOutcome | None:
    """Run a job's script as Slurm's node would, and return the attempt's outcome."""
    folder = rundir.attempt_dir(one.run_dir, attempt)
    if not (folder / rundir.JOB_FILE).exists():
        rundir.prepare_attempt(one, attempt)
    env = {**os.environ, "SLURM_JOB_ID": number} | ({"SLURM_RESTART_COUNT": str(restart)} if restart else {})
    script = render(one, Queue(0), attempt).text
    done = subprocess.run(["/bin/sh"], input=script, text=True, capture_output=True, env=env, check=False)
    assert done.returncode == 0, (done.stderr, (folder / rundir.SUPERVISOR_LOG).read_text())
    return rundir.read_outcome(folder)


def test_the_script_does_what_the_job_does(tmp_path: Path) -> None:
    command = 'echo "$HELLO" && touch "$RUN/done"'
    one = job(tmp_path, "/bin/sh", "-c", command, env={"HELLO": "it's; here", "RUN": str(tmp_path / "run")})
    outcome = start(one)
    assert outcome.kind is OutcomeKind.FINISHED and outcome.cpu_seconds is not None
    assert (tmp_path / "run/attempts/1/stdout.log").read_text() == "it's; here\n"


def test_a_second_job_for_an_attempt_does_nothing(tmp_path: Path) -> None:
    one = job(tmp_path, "/bin/sh", "-c", f"echo x >> {tmp_path}/ran; exit 3")
    first = start(one)
    assert first.kind is OutcomeKind.CRASHED
    assert start(one, number="18") == first == start(one)
    assert (tmp_path / "ran").read_text() == "x\n"
    assert read_fence(one.run_dir) == Token(1, 0, "17")


def test_a_task_of_an_array_is_never_called_by_a_number_that_means_all_tasks() -> None:
    """The last task has the array's number as its own."""
    last = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}
    assert job_id(last) == "17_2"
    assert job_id(last | {"SLURM_JOB_ID": "18", "SLURM_ARRAY_TASK_ID": "0"}) == "17_0"
    assert job_id({"SLURM_JOB_ID": "17"}) == "17"


def test_an_overtaken_start_runs_nothing_and_records_nothing(tmp_path: Path) -> None:
    one = job(tmp_path, "/bin/sh", "-c", f"touch {tmp_path}/ran")
    one.run_dir.mkdir()
    raise_fence(one.run_dir, Token(2, 0, "19"))
    assert start(one) is None
    assert not (tmp_path / "ran").exists()


def test_a_copy_that_is_overtaken_while_it_runs_records_nothing(tmp_path: Path) -> None:
    source = (
        "from pathlib import Path; from megatron_evolve.launch.fence import Token, raise_fence; "
        f"raise_fence(Path({str(tmp_path / 'run')!r}), Token(1, 1, '17'))"
    )
    assert start(job(tmp_path, sys.executable, "-c", source)) is None


def test_a_restart_of_a_job_that_had_finished_only_records_it(tmp_path: Path) -> None:
    one = job(tmp_path, "/bin/sh", "-c", f"echo x >> {tmp_path}/ran")
    rundir.prepare_attempt(one, 1)
    (one.run_dir / "done").touch()
    outcome = start(one, restart=1)
    assert outcome.kind is OutcomeKind.FINISHED and outcome.seconds is None
    assert not (tmp_path / "ran").exists()


def test_each_start_is_judged_by_its_own_words_and_no_job_is_started_for_ever(tmp_path: Path) -> None:
    one = job(tmp_path, "/bin/sh", "-c", 'echo "start $SLURM_RESTART_COUNT" >&2; exit 75')
    folder = rundir.prepare_attempt(one, 1)
    raise_fence(one.run_dir, Token(1, 198, "17"))
    (folder / "stderr.log").write_text("OutOfMemoryError: of the start before\n")
    outcome = start(one, restart=199)
    assert outcome.kind is OutcomeKind.LOST and outcome.reason.endswith("it has been started 200 times")
    assert (folder / "stderr.log").read_text() == "start 199\n"
    assert (folder / "starts/198.stderr.log").exists() and (folder / "starts/199.json").exists()


def sign(folder: Path, lived_s: float) -> None:
    """What a start leaves whose node died after so long."""
    rundir.write_json(folder / rundir.SUPERVISOR_FILE, {"pid": 1, "start_ticks": 1, "boot_id": "b", "host": "there"})
    (folder / rundir.ALIVE_FILE).touch()
    last_s = (folder / rundir.ALIVE_FILE).stat().st_mtime
    os.utime(folder / rundir.SUPERVISOR_FILE, (last_s - lived_s,) * 2)


def test_the_time_of_a_start_that_died_with_its_node_counts_against_the_limit(tmp_path: Path) -> None:
    one = job(tmp_path, "/bin/sh", "-c", "sleep 20")  # of 90 s
    folder = rundir.prepare_attempt(one, 1)
    raise_fence(one.run_dir, Token(1, 0, "17"))
    sign(folder, lived_s=80.0)
    outcome = start(one, restart=1)
    assert outcome.kind is OutcomeKind.TIMED_OUT and outcome.seconds is None
    assert starts.life_s(folder) == pytest.approx(80 + rundir.ALIVE_EVERY_S + 1, abs=3)


def test_what_slurm_alone_saw_end_is_not_said_to_be_measured_and_counts_with_all_its_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its recorded start was all that was told: the hours of the one that was lost were nobody's."""
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho '17|17|NODE_FAIL|n1|None|name'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    one = job(tmp_path)
    folder = rundir.prepare_attempt(one, 1)
    rundir.write_json(folder / "submission.json", {"name": "name", "index": None, "job": "17"})
    sign(folder, lived_s=9.0)
    first = JobOutcome.unmeasured(one.key, 1, OutcomeKind.LOST, "there", "was told to stop")
    starts.record(folder, 0, dataclasses.replace(first, seconds=7.0, cpu_seconds=7.0))
    starts.put_aside(folder, 0)
    sign(folder, lived_s=50.0)
    launcher = SlurmLauncher(NODE, tmp_path, settle_s=0.0)
    launcher.submit(one)
    outcome = launcher.poll([one.key])[one.key]
    assert outcome.kind is OutcomeKind.LOST and outcome.seconds is None and outcome.cpu_seconds is None
    assert starts.life_s(folder) == pytest.approx(7 + 50 + rundir.ALIVE_EVERY_S)


def test_a_start_that_begins_while_its_attempt_is_given_up_writes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked for an end before there was one; with the fence in its hand its end would have overwritten that."""
    one = job(tmp_path)
    folder = rundir.prepare_attempt(one, 1)
    raise_fence(one.run_dir, Token(1, 0, "17"))
    rundir.write_json(folder / "submission.json", {"name": "name", "index": None, "job": "17"})
    begins, real = fence_environment(one.run_dir, Token(1, 1, "17")), rundir.write_outcome

    def begun_before_it(*words: object) -> None:
        rundir.write_json(one.run_dir / "fence.json", {"attempt": 1, "start": 1, "holder": "17"})
        real(*words)

    monkeypatch.setattr(rundir, "write_outcome", begun_before_it)
    monkeypatch.setattr(slurm_queue, "queue", lambda: ())
    launcher = SlurmLauncher(NODE, tmp_path, settle_s=0.0)
    launcher.submit(one)
    assert launcher.poll([one.key])[one.key].kind is OutcomeKind.LOST
    with pytest.raises(Fenced):
        check_fence(begins)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_without_slurm_one_sentence_and_no_attempt_is_left_half_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    launcher = SlurmLauncher(NODE, tmp_path / "state")
    launcher.submit(job(tmp_path))
    with pytest.raises(slurm_queue.SlurmError, match="expected Slurm's sbatch on this machine's PATH, found none"):
        launcher.poll(["1/ab/train"])
    assert not (tmp_path / "run/attempts/1/submission.json").exists()


def test_a_run_folder_of_another_is_refused(tmp_path: Path) -> None:
    one = job(tmp_path)
    rundir.prepare_attempt(dataclasses.replace(one, key="another"), 1)
    with pytest.raises(ValueError, match="must belong to job 1/ab/train; it belongs to another"):
        SlurmLauncher(NODE, tmp_path).submit(one)


def test_a_job_that_a_local_supervisor_runs_is_left_alone(tmp_path: Path) -> None:
    one = job(tmp_path)
    folder = rundir.prepare_attempt(one, 1)
    rundir.write_json(folder / rundir.SUPERVISOR_FILE, {"pid": 1, "start_ticks": 1, "boot_id": "b", "host": "there"})
    with rundir.Lock(one.run_dir / rundir.LOCK_FILE), pytest.raises(rundir.LockHeld, match="in use by process"):
        SlurmLauncher(NODE, tmp_path).submit(one)
    launcher = SlurmLauncher(NODE, tmp_path)
    launcher.submit(one)
    assert launcher.poll([one.key])[one.key].kind is OutcomeKind.LOST
