"""Log lines say who speaks: round, candidate, seed, stage and rank; and an ending is told without the brackets."""

import io
import logging
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_evolve.candidate import candidate
from megatron_evolve.jobs import Run, StageEnd
from megatron_evolve.launch.ending import Ending, classify
from megatron_evolve.launch.job import Job, OutcomeKind
from megatron_evolve.launch.rundir import ATTEMPT_VARIABLE, prepare_attempt
from megatron_evolve.substrate import logs
from megatron_evolve.substrate.mix import Mix
from megatron_evolve.substrate.recipe import Recipe
from megatron_evolve.substrate.settings import Settings
from megatron_evolve.terminal import Narrator

KEY = "2/ab12cd34ef56/1310314897/train"
SETTINGS = Settings(mix=Mix(weight={"numeral": 1.0}, style={"numeral": "answer"}), recipe=Recipe())
LINE = re.compile(r"\[\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ([^\]]+)\] (.*)\n")


@pytest.fixture
def attempt(tmp_path: Path) -> Path:
    return prepare_attempt(Job(KEY, (sys.executable,), tmp_path / "run", 1.0, "done"), 1)


@pytest.fixture(autouse=True)
def _own_handlers():
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    root.handlers[:] = before


def test_a_job_s_lines_carry_its_key_and_rank(attempt: Path, capsys) -> None:
    logs.set_up(logs.job_name({ATTEMPT_VARIABLE: str(attempt), "RANK": "3"}, "train"))
    logging.getLogger("megatron_evolve.substrate.train.fit").info("training from step %d", 7)
    logging.getLogger("a.library").warning("careful")
    logging.getLogger("a.library").info("chatter")
    told = capsys.readouterr()
    assert LINE.fullmatch(told.out).groups() == (f"{KEY} rank 3", "training from step 7")
    assert LINE.fullmatch(told.err).groups() == (f"{KEY} rank 3", "careful")


@pytest.mark.parametrize(
    ("environ", "who"),
    [({}, "train rank 0"), ({"SLURM_PROCID": "5"}, "train rank 5"), ({ATTEMPT_VARIABLE: "/nowhere"}, "train rank 0")],
    ids=["by hand", "under srun", "an attempt that is gone"],
)
def test_a_job_that_nobody_prepared_still_speaks(environ: dict[str, str], who: str) -> None:
    assert logs.job_name(environ, "train") == who


def test_a_fork_says_its_own_name_once(capsys) -> None:
    logs.set_up("the parent")
    logs.set_up("the job")
    logging.getLogger("megatron_evolve").error("once")
    assert LINE.fullmatch(capsys.readouterr().err).groups() == ("the job", "once")


def test_where_stdout_is_an_answer_all_lines_go_to_stderr(capsys) -> None:
    logs.set_up("controller", all_on_stderr=True)
    logging.getLogger("megatron_evolve").info("round 1")
    told = capsys.readouterr()
    assert told.out == "" and LINE.fullmatch(told.err).groups() == ("controller", "round 1")


def test_the_controller_s_lines_carry_the_run_where_nobody_looks_on() -> None:
    end = StageEnd(Run(2, candidate("s", SETTINGS), 7), "train", "lost", "[rank0] its node is [/gone]", 9.0, 9.0, 1)
    for is_terminal in (True, False):
        console = Console(file=io.StringIO(), width=200, force_terminal=is_terminal, highlight=False, no_color=True)
        Narrator(console, 10)("ended", {"round": 2, "stage": "train", "end": end})
        told = console.file.getvalue()
        assert f"{end.run.key} " in told and "lost ([rank0] its node is [/gone])" in told.replace("\x1b[0m", "")
        assert bool(LINE.fullmatch(told)) == (not is_terminal)


@pytest.mark.parametrize("said", ["cannot write here: no space", "ValueError: a text"])
def test_an_ending_is_told_without_when_and_who(attempt: Path, capsys, said: str) -> None:
    """Reasons stand in the ledger, which is the same whenever a campaign runs."""
    logs.set_up(logs.job_name({ATTEMPT_VARIABLE: str(attempt)}, "train"))
    logging.getLogger("megatron_evolve").error(said)
    ending = Ending(1, None, None, "done", False, 0, capsys.readouterr().err)
    assert classify(ending) == (OutcomeKind.CRASHED, f"exited with status 1; stderr says: {said}")
