"""The warm parent: forks that are jobs like any other, and deaths of any of the parties."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_evolve.launch import rundir
from megatron_evolve.launch.job import Job, OutcomeKind, canonical_json
from megatron_evolve.launch.local import LocalLauncher
from megatron_evolve.launch.process import ProcessIdentity, read_stat
from megatron_evolve.launch.warm import LINGER_S, TICK_S, WarmError, forkable_module
from megatron_evolve.launch.warm_client import WarmSettings

# A package that stands for a training framework: what the preload leaves in it shows that a job is a fork.
HEAVY = """
import signal
LOADED_BY = None

def load():
    global LOADED_BY
    import os
    LOADED_BY = os.getpid()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
"""
SHOW = """
import json, os, signal, sys, warmjobs.heavy

def links():
    for name in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            pass  # the listing's own

run = os.environ["RUN"]
shown = {
    "loaded_by": warmjobs.heavy.LOADED_BY, "parent": os.getppid(), "argv": sys.argv[1:], "env": dict(os.environ),
    "fds": sorted(links()), "group": os.getpgid(0), "pid": os.getpid(), "session": os.getsid(0), "cwd": os.getcwd(),
    "usr1_is_default": signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL,
}
json.dump(shown, open(f"{run}/done", "w"))
print("shown")
"""
UNTIL_GO = """
import os, time
run = os.environ["RUN"]
open(f"{run}/pid", "w").write(str(os.getpid()))
while not os.path.exists(f"{run}/go"):
    time.sleep(0.01)
open(f"{run}/done", "w").close()
"""
MODULES = {
    "heavy": HEAVY,
    "show": SHOW,
    "until_go": UNTIL_GO,
    "fails": "raise ValueError('from a fork')",
    "exits": "import sys, atexit; atexit.register(print, 'at exit'); sys.exit(int(sys.argv[1]))",
    "threaded": "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    "slow": "import os, time\nwhile not os.path.exists(os.environ['LOADED']): time.sleep(0.01)",
}
CONTROLLER = """
import json, sys, time
from pathlib import Path
from megatron_evolve.launch.job import Job
from megatron_evolve.launch.local import LocalLauncher
from megatron_evolve.launch.warm_client import WarmSettings
job = Job.from_json(json.loads(sys.argv[2]))
launcher = LocalLauncher(1, Path(sys.argv[1]), WarmSettings(**json.loads(sys.argv[3])))
launcher.submit(job)
while True:
    launcher.poll([job.key])
    time.sleep(0.01)
"""


@pytest.fixture
def settings(tmp_path: Path) -> WarmSettings:
    package = tmp_path / "modules/warmjobs"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name, source in MODULES.items():
        (package / f"{name}.py").write_text(source)
    env = {
        "PYTHONPATH": os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "LOADED": str(tmp_path / "loaded"),
    }
    return WarmSettings(("warmjobs.heavy:load",), ("warmjobs",), env)


@pytest.fixture
def launcher(tmp_path: Path, settings: WarmSettings) -> Iterator[LocalLauncher]:
    with LocalLauncher(2, tmp_path / "state", settings) as launcher:
        yield launcher


@pytest.fixture
def module_job(make_job: Callable[..., Job]) -> Callable[..., Job]:
    return lambda key, module, *args, **fields: make_job(
        key, (sys.executable, "-m", f"warmjobs.{module}", *args), **fields
    )


def parent_of(state_dir: Path) -> ProcessIdentity:
    return ProcessIdentity(**rundir.read_json(state_dir / "warm.json")["parent"])


def test_a_fork_is_a_job_like_any_other(
    launcher: LocalLauncher,
    module_job: Callable[..., Job],
    ending_of: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OF_THE_LAUNCHER", "yes")
    monkeypatch.chdir(tmp_path)
    job = module_job("a", "show", "--steps", "3", env={"OF_THE_JOB": "too"})
    launcher.submit(job)
    assert ending_of(launcher, "a").kind is OutcomeKind.FINISHED
    shown = json.loads((job.run_dir / "done").read_text())
    supervisor = rundir.read_supervisor(job.run_dir / "attempts/1").pid
    assert shown["loaded_by"] == parent_of(tmp_path / "state").pid  # it did not import the package again
    assert shown["argv"] == ["--steps", "3"]
    assert (shown["parent"], shown["session"]) == (supervisor, supervisor)
    assert shown["group"] == shown["pid"]
    assert shown["usr1_is_default"]
    assert shown["cwd"] == str(tmp_path)
    assert (shown["env"]["OF_THE_LAUNCHER"], shown["env"]["OF_THE_JOB"]) == ("yes", "too")
    assert "LOADED" not in shown["env"]  # of the parent only
    assert not [link for link in shown["fds"] if link.startswith(("socket:", "anon_inode:", "pipe:")) or "lock" in link]
    assert (job.run_dir / "attempts/1/stdout.log").read_text() == "shown\n"


def test_forks_end_as_programs_do(launcher: LocalLauncher, module_job: Callable[..., Job], ending_of: Callable) -> None:
    jobs = [module_job("fails", "fails"), module_job("exits", "exits", "5"), module_job("zero", "exits", "0")]
    for job in jobs:
        launcher.submit(job)
    fails, exits, zero = (ending_of(launcher, job.key) for job in jobs)
    assert (fails.kind, fails.exit_code) == (OutcomeKind.CRASHED, 1) and fails.reason.endswith(
        "ValueError: from a fork"
    )
    assert (exits.kind, exits.exit_code) == (OutcomeKind.CRASHED, 5)
    assert (zero.kind, zero.exit_code) == (OutcomeKind.CRASHED, 0)
    assert (jobs[1].run_dir / "attempts/1/stdout.log").read_text() == "at exit\n"


def test_other_commands_are_executed(
    launcher: LocalLauncher, make_job: Callable[..., Job], ending_of: Callable
) -> None:
    launcher.submit(make_job("a", "echo $PPID > $RUN/done"))
    assert ending_of(launcher, "a").kind is OutcomeKind.FINISHED


def test_which_commands_may_be_forked() -> None:
    prefixes = ("warmjobs",)
    assert forkable_module((sys.executable, "-m", "warmjobs.show", "x"), prefixes) == "warmjobs.show"
    assert forkable_module((sys.executable, "-m", "warmjobs"), prefixes) == "warmjobs"
    assert forkable_module((sys.executable, "-m", "warmjobsmore"), prefixes) is None
    assert forkable_module((sys.executable, "-c", "pass"), prefixes) is None
    assert forkable_module(("/usr/bin/other-python", "-m", "warmjobs"), prefixes) is None


def test_jobs_outlive_a_killed_parent_and_a_new_one_serves(
    launcher: LocalLauncher, module_job: Callable[..., Job], ending_of: Callable, wait_until: Callable, tmp_path: Path
) -> None:
    first, second = module_job("a", "until_go"), module_job("b", "show")
    launcher.submit(first)
    wait_until(lambda: launcher.poll(["a"]) and (first.run_dir / "pid").exists(), "the job")
    killed = parent_of(tmp_path / "state")
    killed.send(signal.SIGKILL)
    launcher.submit(second)
    assert ending_of(launcher, "b").kind is OutcomeKind.FINISHED
    assert parent_of(tmp_path / "state") != killed
    assert launcher.poll(["a"])["a"] == "running"
    (first.run_dir / "go").touch()
    assert ending_of(launcher, "a").kind is OutcomeKind.FINISHED


def test_a_parent_killed_while_it_loads_is_replaced(
    settings: WarmSettings, module_job: Callable[..., Job], ending_of: Callable, tmp_path: Path
) -> None:
    slow = WarmSettings(("warmjobs.slow", *settings.preload), settings.fork_prefixes, settings.env)
    with LocalLauncher(1, tmp_path / "state", slow) as launcher:
        launcher.submit(module_job("a", "show"))
        assert launcher.poll(["a"])["a"] == "pending"
        parent_of(tmp_path / "state").send(signal.SIGKILL)
        (tmp_path / "loaded").touch()
        assert ending_of(launcher, "a").kind is OutcomeKind.FINISHED


@pytest.mark.parametrize(
    ("preload", "words"),
    [
        ("warmjobs.threaded", "expected one thread after preloading"),
        ("warmjobs.absent", "No module named 'warmjobs.absent'"),
    ],
)
def test_a_parent_that_cannot_load_says_why(
    settings: WarmSettings,
    module_job: Callable[..., Job],
    ending_of: Callable,
    tmp_path: Path,
    preload: str,
    words: str,
) -> None:
    broken = WarmSettings((preload,), settings.fork_prefixes, settings.env)
    with LocalLauncher(1, tmp_path / "state", broken) as launcher:
        launcher.submit(module_job("a", "show"))
        with pytest.raises(WarmError, match=words):
            ending_of(launcher, "a")


def test_a_killed_controllers_parent_serves_the_next_and_then_leaves_nothing(
    settings: WarmSettings, module_job: Callable[..., Job], ending_of: Callable, wait_until: Callable, tmp_path: Path
) -> None:
    job = module_job("a", "until_go")
    arguments = [str(tmp_path / "state"), canonical_json(job.to_json()), json.dumps(settings.to_json())]
    controller = subprocess.Popen([sys.executable, "-c", CONTROLLER, *arguments])
    wait_until((job.run_dir / "pid").exists, "the job")
    controller.kill()
    controller.wait()
    parent = parent_of(tmp_path / "state")
    with LocalLauncher(2, tmp_path / "state", settings) as launcher:
        launcher.submit(job)
        launcher.submit(module_job("b", "show"))
        assert ending_of(launcher, "b").kind is OutcomeKind.FINISHED
        assert parent_of(tmp_path / "state") == parent
        (job.run_dir / "go").touch()
        assert ending_of(launcher, "a").kind is OutcomeKind.FINISHED
    wait_until(lambda: not parent.is_alive, "the parent's end")


def test_a_parent_without_launcher_and_jobs_ends_by_itself(
    settings: WarmSettings, module_job: Callable[..., Job], wait_until: Callable, tmp_path: Path
) -> None:
    job = module_job("a", "until_go")
    arguments = [str(tmp_path / "state"), canonical_json(job.to_json()), json.dumps(settings.to_json())]
    controller = subprocess.Popen([sys.executable, "-c", CONTROLLER, *arguments])
    wait_until((job.run_dir / "pid").exists, "the job")
    controller.kill()
    controller.wait()
    pointer = rundir.read_json(tmp_path / "state/warm.json")
    parent, folder = ProcessIdentity(**pointer["parent"]), Path(pointer["socket"]).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    time.sleep(LINGER_S + 2 * TICK_S)  # that nothing happens can only be waited for
    assert parent.is_alive  # since the job still runs
    (job.run_dir / "go").touch()
    wait_until(lambda: not parent.is_alive, "the parent's end")
    assert not folder.exists()
    assert rundir.read_outcome(job.run_dir / "attempts/1").kind is OutcomeKind.FINISHED


def test_nothing_remains_as_a_zombie(
    launcher: LocalLauncher, module_job: Callable[..., Job], ending_of: Callable, wait_until: Callable, tmp_path: Path
) -> None:
    for i in range(3):
        launcher.submit(module_job(f"j{i}", "show"))
    pids = []
    for i in range(3):
        ending_of(launcher, f"j{i}")
        pids.append(rundir.read_supervisor(tmp_path / f"j{i}/attempts/1").pid)
    wait_until(lambda: all(read_stat(pid) is None for pid in pids), "the supervisors' burial")
    assert os.listdir(Path(rundir.read_json(tmp_path / "state/warm.json")["socket"]).parent) == ["socket"]
