"""Trouble with Slurm that passes: a campaign that was begun goes on or pauses with the reason, and its controller's job
puts itself back. Slurm's programs are shell scripts here; `tests/slurm` runs real ones."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.campaign import Campaign, find_campaign
from megatron_evolve.candidate import Candidate
from megatron_evolve.document import load_yaml
from megatron_evolve.jobs import Run, drive
from megatron_evolve.launch.slurm import SCRIPTS, Queue
from megatron_evolve.launch.slurm_launcher import SlurmLauncher
from megatron_evolve.preflight import check_campaign
from megatron_evolve.retries import Paused
from megatron_evolve.site import Site
from tests.megatron_evolve.small_jobs import DONE, Shell
from tests.megatron_evolve.test_delta import BASE

SILENT = 'echo "error: Socket timed out on send/recv operation" >&2; exit 1'
NO_CLUSTER = 'echo "sbatch: fatal: Could not establish a configuration source" >&2; exit 1'
REFUSES = 'echo "sbatch: error: Required partition not available (inactive or drain)" >&2; exit 1'


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a shell script of this name in front of everything on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def write(name: str, text: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)

    return write


@pytest.mark.parametrize(("text", "says"), [(SILENT, "Socket timed out"), (REFUSES, "partition not available")])
def test_a_campaign_that_goes_on_is_not_ended_by_what_slurm_says_at_its_start(
    text: str, says: str, program: Callable[[str, str], None], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    campaign = Campaign.parse(load_yaml(find_campaign("demo")), where="demo")
    program("sbatch", text)
    site = Site(launcher="slurm")
    with pytest.raises(ValueError, match=says):
        check_campaign(campaign, site, tmp_path, new=True)
    check_campaign(campaign, site, tmp_path, new=False)
    told = capsys.readouterr().err
    assert says in told and told.startswith("Slurm would take no job now: ")


@pytest.mark.parametrize("said", [REFUSES, NO_CLUSTER])
def test_a_job_that_slurm_refuses_pauses_the_campaign(
    said: str, program: Callable[[str, str], None], tmp_path: Path
) -> None:
    """It ended with status 1 and no event, so that `status` knew no reason."""
    program("sbatch", said)
    program("squeue", "true")
    ground = Shell(CampaignFolder(tmp_path), tmp_path, tmp_path, commands={"a": DONE}, time_limit_s=30.0)
    run = Run(1, Candidate(id="a", substrate="s", settings=BASE), 7)
    with SlurmLauncher(Queue(0), tmp_path) as launcher, pytest.raises(Paused, match=r"paused: .*(refuses|belongs to)"):
        list(drive(ground, launcher, [(run, "dev")], lambda end: ()))
    assert not list(tmp_path.rglob("submission.json"))


def test_a_drain_calls_off_what_slurm_refused_and_what_waits(
    program: Callable[[str, str], None], tmp_path: Path
) -> None:
    """It was submitted once more, and refused, and the campaign paused: what waited in the queue was left there."""
    sent, called_off = tmp_path / "sent", tmp_path / "called-off"
    program("sbatch", f"[ -e {sent} ] && {{ {REFUSES}; }}; echo 7 | tee {sent}")
    program("scancel", f"echo $* >> {called_off}")
    program("squeue", f'[ -e {called_off} ] && state=CANCELLED; echo "7|7|${{state:-PENDING}}||Priority|a"')
    ground = Shell(CampaignFolder(tmp_path), tmp_path, tmp_path, commands={"a": DONE, "b": DONE}, time_limit_s=30.0)
    stages = [(Run(1, Candidate(id=name, substrate="s", settings=BASE), 7), "dev") for name in "ab"]
    with SlurmLauncher(Queue(0), tmp_path) as launcher, pytest.raises(Paused, match="partition not available"):
        list(drive(ground, launcher, stages, lambda end: ()))
    with SlurmLauncher(Queue(0), tmp_path, queue_every_s=0.0) as launcher:
        assert list(drive(ground, launcher, stages, lambda end: (), stop=lambda: True)) == []
    assert called_off.read_text().split()[-1] == "7"
    reasons = [json.loads(path.read_bytes())["reason"] for path in sorted(tmp_path.rglob("attempts/1/outcome.json"))]
    assert reasons == ["was cancelled (Slurm job 7)", "was cancelled before it was submitted"]


@pytest.mark.parametrize(("state", "asked"), [("RUNNING", ["show"] * 4 + ["requeue"] * 2), ("CANCELLED", ["show"] * 3)])
def test_the_controller_s_job_puts_itself_back_once_slurm_answers(
    state: str, asked: list[str], program: Callable[[str, str], None], tmp_path: Path
) -> None:
    """Slurm is silent twice, and once more to the first requeue; one silence was the end of the campaign."""
    calls, child = tmp_path / "calls", tmp_path / "child"
    program("sleep", "exec /bin/sleep 0.01")
    program("me", f"echo $$ > {child}.new; mv {child}.new {child}; exec /bin/sleep 60")
    counted = f"case $* in *show*) word=show ;; *) word=requeue ;; esac; echo $word >> {calls}"
    known = f'echo "JobId=17 JobState={state} Reason=None"'
    answers = f"case $word$(grep -c $word {calls}) in show[12]|requeue1) {SILENT} ;; show*) {known} ;; esac"
    program("scontrol", f"{counted}; {answers}")
    env = {**os.environ, "SLURM_JOB_ID": "17", "MEGATRON_EVOLVE": "me"}
    script = subprocess.Popen(
        ["/bin/sh", SCRIPTS / "controller.sbatch"],
        env=env,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, []),  # as Slurm starts it, whoever runs this test
    )
    try:
        while not child.exists():
            time.sleep(0.01)
        script.send_signal(signal.SIGTERM)
        assert script.wait(20) == 0
    finally:
        script.kill()
    assert sorted(calls.read_text().split()) == sorted(asked)
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)
