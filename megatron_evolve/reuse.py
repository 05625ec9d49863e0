"""Reuse: from which round on the rows of a CSV target come round again, known before any of them is asked.

    python -m megatron_evolve.reuse --csv FILE --items JSON --sealed SHARE

Each round walks on through its half's pool of rows and starts again when some sub-family's are used up. From then on a
round shares luck with an earlier one, and what is selected on it was selected on before: selection and the next policy
then read it as released (`released.py`), verdicts exactly. Only this process opens the file: it tells a number a half.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_evolve.campaign import Campaign, ExternalCsv
from megatron_evolve.eval.suite import csv_suite, rounds_without_reuse
from megatron_evolve.prepare import told_by


def rounds_anew(campaign: Campaign) -> dict[str, int]:
    """How many rounds of each half meet rows that no earlier round of the campaign asked; empty without such a file.

    Raises ValueError in one sentence for a file that is no such target.
    """
    target = campaign.judge.external
    if not isinstance(target, ExternalCsv) or not Path(target.path or "").is_file():
        return {}
    return json.loads(told_by(target_argv("megatron_evolve.reuse", target)))


def reuse_words(anew: Mapping[str, int], rounds: int) -> list[str]:
    """One sentence a half whose rows return within the declared rounds; one for all where none do."""
    if not anew:
        return []
    again = {split: number for split, number in anew.items() if number < rounds}
    if not again:
        return [f"external rows: all {rounds} rounds ask rows that no earlier round asked"]
    return [
        f"{split}: the file has new rows for {number} of {rounds} rounds; from round {number + 1} on rows are asked "
        "again, rounds share their luck, and selection reads only differences to the anchor beyond their standard "
        "error, to one row's worth (fewer `items` or a smaller `sealed` help)"
        for split, number in again.items()
    ]


def target_parser(prog: str, told: str) -> argparse.ArgumentParser:
    """The arguments by which a process of the judge's side is told of a CSV target; see `target_argv`."""
    parser = argparse.ArgumentParser(prog=prog, description=told.splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True, help="the target")
    parser.add_argument("--items", type=json.loads, required=True, help="JSON: rows of each half asked in one round")
    parser.add_argument("--sealed", type=float, required=True, help="share of the rows kept for the end")
    return parser


def target_argv(module: str, target: ExternalCsv) -> tuple[str, ...]:
    """The command of such a process."""
    told = ("--csv", target.path, "--items", json.dumps(target.items), "--sealed", str(target.sealed))
    return (sys.executable, "-m", module, *told)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the process. Status 0 once it has told the numbers; otherwise one sentence on stderr."""
    parser = target_parser("megatron_evolve.reuse", __doc__)
    arguments = parser.parse_args(argv)
    try:
        suite = csv_suite(arguments.csv, arguments.items, sealed=arguments.sealed)
        print(json.dumps({split: rounds_without_reuse(suite, split) for split in sorted(suite.items)}))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
