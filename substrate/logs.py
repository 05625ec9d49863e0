"""Log lines of jobs and of the controller: when, who, then what.

    [2026-11-26T19:03:55Z 2/ab12cd34ef56/1310314897/train rank 0] resuming at step 50
    [2026-11-26T19:03:55Z controller] ...

Who is the job's key as the ledger has it (round, candidate, seed, stage), read from its attempt's folder, and the rank.
Warnings of the libraries carry it too. What went wrong in a job goes to stderr, everything else to stdout: the last
words on stderr are what a job's ending is told with, without the brackets.
"""

import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_evolve.launch.rundir import ATTEMPT_VARIABLE, RunDirError, read_job


class Lines(logging.Handler):
    """Writes each record as one line, to the streams that stand there at that moment."""

    def __init__(self, who: str, all_on_stderr: bool) -> None:
        super().__init__()
        self._who, self._all_on_stderr = who, all_on_stderr

    def emit(self, record: logging.LogRecord) -> None:
        """One line, flushed."""
        is_trouble = self._all_on_stderr or record.levelno >= logging.WARNING
        text = f"{stamp(self._who, record.created)} {self.format(record)}"
        print(text, file=sys.stderr if is_trouble else sys.stdout, flush=True)


def stamp(who: str, at: float | None = None) -> str:
    """When and who, as a line begins; now unless a moment in unix seconds is given."""
    return f"[{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(at))} {who}]"


def set_up(who: str, *, all_on_stderr: bool = False) -> None:
    """Has this process's log lines say who speaks. The last call counts: a forked job replaces its parent's."""
    root = logging.getLogger()
    for handler in [one for one in root.handlers if isinstance(one, Lines)]:
        root.removeHandler(handler)
    root.addHandler(Lines(who, all_on_stderr))
    logging.getLogger("megatron_evolve").setLevel(logging.INFO)


def job_name(environ: Mapping[str, str], otherwise: str) -> str:
    """The key of the job that this process is, and its rank; `otherwise` in place of a key when started by hand."""
    rank = environ.get("RANK") or environ.get("SLURM_PROCID") or "0"
    try:
        key = read_job(Path(environ[ATTEMPT_VARIABLE])).key if environ.get(ATTEMPT_VARIABLE) else otherwise
    except RunDirError:  # a log line is not worth a job
        key = otherwise
    return f"{key} rank {rank}"


def of_job(otherwise: str) -> None:
    """Sets up the log lines of the job that this process is."""
    set_up(job_name(os.environ, otherwise))
