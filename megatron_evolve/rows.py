"""Rows: whether those of a CSV target can be judged on, known before anything is frozen or trained.

    python -m megatron_evolve.rows --csv FILE --items JSON --sealed SHARE --rounds R  < SECRET

A family weighs in a score by its rows in the whole file, and each split draws its share of them. One of which a split
draws none has a weight and no answer, and one row of it shows no variance: no round could be reviewed, or the end would
fail with the sealed half open. A prompt that stands there twice may be open and sealed at once. Only this process opens
the file: it tells what is wrong, and no row.
"""

import sys
from collections import Counter
from collections.abc import Sequence

from megatron_evolve.campaign import Campaign, ExternalCsv
from megatron_evolve.eval.suite import CsvSuite, Item, csv_suite, draw, read_csv
from megatron_evolve.prepare import told_by
from megatron_evolve.reuse import target_argv, target_parser

LEAST = 2  # rows of a family in a split: no variance comes from one


def check_rows(campaign: Campaign) -> None:
    """Raises ValueError in one sentence for a CSV target whose rows cannot be judged on; a dry run may name none."""
    target, rounds = campaign.judge.external, campaign.constitution.rounds
    if isinstance(target, ExternalCsv) and target.path is not None:
        argv = (*target_argv("megatron_evolve.rows", target), "--rounds", str(rounds))
        told_by(argv, campaign.judge.secret)


def check_prompts(path: str, rows: Sequence[Item]) -> None:
    """Raises ValueError where a prompt stands in two rows."""
    first: dict[str, str] = {}
    again = [(first[key], row.id) for row in rows if first.setdefault(key := row.prompt.strip(), row.id) != row.id]
    if again:
        raise ValueError(
            f"{path}: expected every prompt once, got {len(again)} row(s) whose prompt an earlier row has, the first "
            f"with ids {again[0][0]!r} and {again[0][1]!r}: keep one of each, or it may be open and sealed at once"
        )


def check_families(suite: CsvSuite, rows: Sequence[Item], rounds: int, secret: str) -> None:
    """Raises ValueError where a split draws fewer than two rows of some family."""
    in_file = Counter(row.family for row in rows)
    # A split draws as many of a sub-family in every round. Where families share one, what it holds of each changes.
    shared = len({(row.family, row.subfamily) for row in rows}) > len({row.subfamily for row in rows})
    for split in ("final", *sorted(suite.items)):
        for moment in range(rounds + 1 if shared and split != "final" else 1):
            drawn = Counter(item.family for item in draw(suite, split=split, round_number=moment, secret=secret))
            few = min(in_file, key=lambda family: (drawn[family], family))
            if drawn[few] < LEAST:
                raise ValueError(
                    f"{suite.path}: expected at least {LEAST} rows of every family in every split, got {drawn[few]} of "
                    f"family {few!r} in {split}, of {in_file[few]} in the file: add rows of it, give it another "
                    f"family's name, or {'raise `sealed`' if split == 'final' else 'raise `items`'}"
                )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the process. Status 0 for rows that can be judged on; otherwise one sentence on stderr."""
    parser = target_parser("megatron_evolve.rows", __doc__)
    parser.add_argument("--rounds", type=int, required=True, help="declared rounds")
    arguments = parser.parse_args(argv)
    try:
        suite = csv_suite(arguments.csv, arguments.items, sealed=arguments.sealed)
        rows = read_csv(suite)
        check_prompts(suite.path, rows)
        check_families(suite, rows, arguments.rounds, sys.stdin.read())
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
