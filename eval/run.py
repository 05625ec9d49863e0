"""The judge's process: opens a trained run, asks it the items of some splits, writes what it got.

    python -m megatron_evolve.eval.run --judge DIR --substrate DIR --run DIR --round R --splits dev-a,dev-b --out DIR

This is the only process that opens the external target. It leaves `scores.parquet` (one row an item, no right answers)
and, last, `scores.json`. Under one user that is discipline, not a wall: put the judge's folder under another user, or
on a host of its own, where a wall is needed.
"""

import argparse
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_evolve.eval.engines.seam import Completion, Examinee, Prompt, ask
from megatron_evolve.eval.judge import Judge, comparison_key, load_judge
from megatron_evolve.eval.score import SCORES_FILE, ItemRows, answer_row, split_scores, write_rows
from megatron_evolve.eval.suite import Item, family_weights
from megatron_evolve.launch.fence import check_fence
from megatron_evolve.launch.rundir import Pulse, RunDirError, make_folder, write_json
from megatron_evolve.substrate import logs
from megatron_evolve.substrate.checkpoint_tokenizer import read_tokenizer
from megatron_evolve.substrate.manifest import read_manifest

ROWS_FILE = "scores.parquet"
log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the job. Exit status 0 once `scores.json` is written; otherwise one sentence on stderr and status 1."""
    parser = argparse.ArgumentParser(prog="megatron_evolve.eval.run", description=__doc__.splitlines()[0])
    parser.add_argument("--judge", type=Path, required=True, help="folder of the frozen judge")
    parser.add_argument("--substrate", type=Path, required=True, help="folder of the frozen substrate")
    parser.add_argument("--run", type=Path, required=True, help="folder of the trained run, or the substrate's own")
    parser.add_argument("--round", type=int, required=True, help="whose items are asked")
    parser.add_argument("--splits", required=True, help="comma-separated")
    parser.add_argument("--out", type=Path, required=True, help="folder for the scores")
    arguments = parser.parse_args(argv)
    logs.of_job(otherwise="score")
    try:
        score(
            arguments.judge,
            arguments.substrate,
            arguments.run,
            round_number=arguments.round,
            splits=arguments.splits.split(","),
            out=arguments.out,
        )
    except (ValueError, OSError, RunDirError) as error:
        log.error("%s", error)
        return 1
    return 0


def score(
    judge_folder: Path, substrate_folder: Path, run: Path, *, round_number: int, splits: Sequence[str], out: Path
) -> dict[str, Any]:
    """Scores one run on the splits of a round and returns what `scores.json` says."""
    started = time.monotonic()
    judge, substrate = load_judge(judge_folder), read_manifest(substrate_folder)
    tokenizer = read_tokenizer(substrate_folder)
    drawn = {split: judge.items(split, round_number) for split in splits}
    make_folder(out)
    examinee = Examinee(substrate_folder, substrate, run, tokenizer, work=out, tell=Pulse("score").tell)
    difficulty = substrate.construction.difficulty
    # All that an engine is told of an item: the question, and nothing that stands beside it.
    prompts = [Prompt.of(item.prompt, difficulty, tokenizer) for items in drawn.values() for item in items]
    log.info("asking %d items of %s", len(prompts), ", ".join(drawn))
    answers = ask(judge.engine, examinee, prompts)
    completions = iter(answers.completions)
    rows = {split: [_row(item, split, next(completions)) for item in items] for split, items in drawn.items()}
    check_fence()  # an older copy of this job, which its scheduler lost sight of, ends here
    write_rows(out / ROWS_FILE, ItemRows.of([row for part in rows.values() for row in part]))
    scores = {split: _split_record(judge, split, drawn[split], rows[split], answers.about) for split in splits}
    record = {
        "schema": "scores/1",
        "round": round_number,
        "splits": scores,
        "engine": {"kind": judge.engine.kind, "about": dict(answers.about), "account": dict(answers.account)},
        "seconds": time.monotonic() - started,
    }
    write_json(out / SCORES_FILE, record)
    log.info("scored in %.1f s", record["seconds"])
    return record


def _row(item: Item, split: str, given: Completion) -> dict[str, Any]:
    return answer_row(item, split, given.text, truncated=given.truncated, num_tokens=given.num_tokens)


def _split_record(
    judge: Judge, split: str, items: Sequence[Item], rows: Sequence[dict[str, Any]], about: Mapping[str, str]
) -> dict[str, Any]:
    weights = family_weights(judge.suite(split), items)
    scores = split_scores(ItemRows.of(rows), weights).to_dict()
    return {**scores, "weights": weights, "comparison_key": comparison_key(judge, split, items, about)}


if __name__ == "__main__":
    sys.exit(main())
