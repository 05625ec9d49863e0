"""The judge's process: opens a trained run, asks it the items of some splits, writes what it got.

    python -m megatron_evolve.eval.run --judge DIR --substrate DIR --run DIR --round R --splits dev-a,dev-b --out DIR

This is the only process that opens the external target. It leaves `scores.parquet` (one row an item, no right answers)
and, last, `scores.json`. Under one user that is discipline, not a wall: put the judge's folder under another user, or
on a host of its own, where a wall is needed.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_evolve.eval.judge import Judge, comparison_key, load_judge
from megatron_evolve.eval.metric import exact, extract, has_box, verify
from megatron_evolve.eval.score import ItemRows, split_scores, write_rows
from megatron_evolve.eval.suite import Item, family_weights
from megatron_evolve.launch.rundir import RunDirError, make_folder, write_json
from megatron_evolve.substrate.manifest import Substrate, read_manifest
from megatron_evolve.substrate.puzzles.row import question_text
from megatron_evolve.substrate.tokenizer import PieceTokenizer

ROWS_FILE = "scores.parquet"
SCORES_FILE = "scores.json"


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
        print(error, file=sys.stderr)
        return 1
    return 0


def score(
    judge_folder: Path, substrate_folder: Path, run: Path, *, round_number: int, splits: Sequence[str], out: Path
) -> dict[str, Any]:
    """Scores one run on the splits of a round and returns what `scores.json` says."""
    started = time.monotonic()
    judge, substrate = load_judge(judge_folder), read_manifest(substrate_folder)
    tokenizer = PieceTokenizer.from_json((substrate_folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = _open_model(substrate_folder, substrate, run)
    drawn = {split: judge.items(split, round_number) for split in splits}
    everything = [item for items in drawn.values() for item in items]
    texts = iter(_complete(model, tokenizer, substrate, judge, everything))
    rows = {split: [_row(item, split, *next(texts)) for item in items] for split, items in drawn.items()}
    make_folder(out)
    write_rows(out / ROWS_FILE, ItemRows.of([row for part in rows.values() for row in part]))
    scores = {split: _split_record(judge, split, drawn[split], rows[split]) for split in splits}
    record = {"schema": "scores/1", "round": round_number, "splits": scores, "seconds": time.monotonic() - started}
    write_json(out / SCORES_FILE, record)
    return record


def _open_model(substrate_folder: Path, substrate: Substrate, run: Path) -> Any:
    from megatron_evolve.substrate.train.open import open_trained

    return open_trained(substrate_folder, substrate, run)


def _complete(
    model: Any, tokenizer: PieceTokenizer, substrate: Substrate, judge: Judge, items: Sequence[Item]
) -> Iterator[tuple[str, int, bool]]:
    """Completion, its number of tokens and whether it was cut, for each item."""
    from megatron_evolve.eval.generate import generate

    difficulty = substrate.construction.difficulty
    prompts = [tokenizer.encode(question_text(item.prompt, difficulty)) for item in items]
    generations = generate(
        model,
        prompts,
        max_new_tokens=judge.engine.max_new_tokens,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        batch_size=judge.engine.batch_size,
    )
    for generation in generations:
        yield tokenizer.decode(generation.tokens), len(generation.tokens), generation.truncated


def _row(item: Item, split: str, text: str, num_tokens: int, truncated: bool) -> dict[str, Any]:
    prediction = extract(text)
    return {
        "item_id": item.id,
        "family": item.family,
        "subfamily": item.subfamily,
        "split": split,
        "correct": verify(item.answer, prediction),
        "exact": exact(item.answer, prediction),
        "boxed": has_box(text),
        "truncated": truncated,
        "num_tokens": num_tokens,
        "prediction": prediction,
    }


def _split_record(judge: Judge, split: str, items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    weights = family_weights(judge.suite(split), items)
    scores = split_scores(ItemRows.of(rows), weights).to_dict()
    return {**scores, "weights": weights, "comparison_key": comparison_key(judge, split, items)}


if __name__ == "__main__":
    sys.exit(main())
