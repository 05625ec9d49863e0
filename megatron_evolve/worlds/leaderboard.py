"""A leaderboard in a box: scores a run on a hidden suite and tells one number; the program of a `command` target.

    python -m megatron_evolve.worlds.leaderboard --judge DIR --substrate DIR --step 0.01 RUN
    ->  {"score": 0.61, "items": 1200}
    python -m megatron_evolve.worlds.leaderboard --judge DIR --list  ->  the run of every submission, one a line

RUN is the folder of a trained run, as the command hook gives it. The hidden suite is the external one of a frozen judge
that no campaign knows (`python -m megatron_evolve.eval.freeze` makes one): every run is asked the same items of its
external-b half, and only their mean is told, rounded. Each submission leaves a folder in `submissions/` beside the
judge, entered before anything is asked, so that submissions can be counted; its answers by item are for the
leaderboard's owner alone.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_evolve.eval.looks import round_to
from megatron_evolve.eval.run import score
from megatron_evolve.launch.rundir import RunDirError, make_folder, read_json, sync_folder, write_json
from megatron_evolve.prepare import JOB_ENV

SPLIT = "external-b"
ROUND = 0  # of the hidden items: the same for every run and whatever round a campaign is in
SUBMISSION_FILE = "submission.json"
DIGITS = 9  # a multiple of a step as it is written by hand: 0.07, not 0.07000000000000001


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the program. Status 0 with the reply on stdout; otherwise one sentence on stderr and status 1."""
    parser = argparse.ArgumentParser(prog="megatron_evolve.worlds.leaderboard", description=__doc__.splitlines()[0])
    parser.add_argument("--judge", type=Path, required=True, help="folder of the leaderboard's own frozen judge")
    parser.add_argument("--substrate", type=Path, help="folder of the frozen substrate")
    parser.add_argument("--step", type=float, default=0.0, help="what the score is rounded to; 0: not at all")
    parser.add_argument("--list", action="store_true", help="print the run of every submission and score nothing")
    parser.add_argument("run", type=Path, nargs="?", help="folder of the trained run")
    arguments = parser.parse_args(argv)
    if arguments.list:
        if not arguments.judge.is_dir():
            parser.error(f"expected the folder of a frozen judge, found none at {arguments.judge}: check --judge")
        print(*submitted_runs(arguments.judge), sep="\n")
        return 0
    if arguments.run is None or arguments.substrate is None:
        parser.error("expected --substrate and a run to score, or --list")
    os.environ.update(JOB_ENV)
    try:
        # Libraries may greet on stdout, which belongs to the reply.
        with contextlib.redirect_stdout(sys.stderr):
            reply = submit(arguments.judge, arguments.substrate, arguments.step, arguments.run)
    except (ValueError, OSError, RunDirError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(reply))
    return 0


def submit(judge: Path, substrate: Path, step: float, run: Path) -> dict[str, Any]:
    """Enters a submission, scores the run and returns what the leaderboard tells of it."""
    if not 0 <= step < 1:
        raise ValueError(f"expected a step of at least 0 and below 1, got {step}: give what scores are rounded to")
    if not (run / "result.json").is_file():
        raise ValueError(f"expected a trained run in {run}, found no result.json: give a run's train folder")
    place = submissions_of(judge)
    make_folder(place)
    out = Path(tempfile.mkdtemp(dir=place, prefix=""))
    write_json(out / SUBMISSION_FILE, {"run": str(run.resolve())})
    sync_folder(place)
    found = score(judge, substrate, run, round_number=ROUND, splits=[SPLIT], out=out)["splits"][SPLIT]["overall"]
    told = round(round_to(found["mean"], step), DIGITS) if step else found["mean"]
    return {"score": told, "items": found["n"]}


def submissions_of(judge: Path) -> Path:
    """Where a leaderboard keeps what was submitted to it."""
    return judge.parent / "submissions"


def submitted_runs(judge: Path) -> list[str]:
    """The run of every submission, sorted; one that was submitted twice stands there twice."""
    return sorted(read_json(path)["run"] for path in submissions_of(judge).glob(f"*/{SUBMISSION_FILE}"))


def argv_of(judge: Path, substrate: Path, step: float) -> tuple[str, ...]:
    """The command that a campaign declares to ask this leaderboard."""
    module = (sys.executable, "-m", "megatron_evolve.worlds.leaderboard")
    return (*module, "--judge", str(judge), "--substrate", str(substrate), "--step", f"{step:g}")


if __name__ == "__main__":
    sys.exit(main())
