"""Scores: what a run got on a split, as a mean with its standard error and count, and the per-item rows behind it.

The rows come from generation and metric and rest as Parquet; a `SplitScores` is recomputed from them at any time, and
paired differences (`paired.py`) are taken on them, never on the means. No row holds the right answer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from megatron_evolve.eval.metric import exact, extract, has_box, verify
from megatron_evolve.eval.paired import RunItems, wilson
from megatron_evolve.eval.seeds import weight_vector
from megatron_evolve.eval.suite import Item
from megatron_evolve.launch.rundir import read_json, write_whole
from megatron_evolve.substrate.frozen import Frozen

SCORES_FILE = "scores.json"
COLUMNS = {
    "item_id": str,
    "family": str,
    "subfamily": str,
    "split": str,
    "correct": bool,  # by the official metric
    "exact": bool,  # by exact text
    "boxed": bool,
    "truncated": bool,
    "num_tokens": int,
    "prediction": str,
}


@dataclass(frozen=True, eq=False)
class ItemRows:
    """One row per item that a run answered, as columns of equal length; a file may hold several splits."""

    item_id: np.ndarray
    family: np.ndarray
    subfamily: np.ndarray
    split: np.ndarray
    correct: np.ndarray
    exact: np.ndarray
    boxed: np.ndarray
    truncated: np.ndarray
    num_tokens: np.ndarray
    prediction: np.ndarray

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _column(field.name, getattr(self, field.name)))
        if len({len(getattr(self, name)) for name in COLUMNS}) != 1:
            sizes = ", ".join(f"{name} {len(getattr(self, name))}" for name in COLUMNS)
            raise ValueError(f"expected columns of one length, got {sizes}: score the run again")

    def __len__(self) -> int:
        return len(self.item_id)

    @classmethod
    def of(cls, rows: Sequence[Mapping]) -> "ItemRows":
        """From one mapping per item. Raises ValueError for a missing or an unknown column."""
        for row in rows:
            _check_columns(row, "a row")
        return cls(**{name: [row[name] for row in rows] for name in COLUMNS})

    def of_split(self, split: str) -> "ItemRows":
        """The rows of one split, in order."""
        keep = self.split == split
        return ItemRows(**{name: getattr(self, name)[keep] for name in COLUMNS})

    def of_run(self, candidate: str, seed: int, *splits: str, comparison: str = "") -> RunItems:
        """The rows of these splits together, as the paired comparison wants them. An item's id starts with its split.

        Raises ValueError if there are none, and as `RunItems` does.
        """
        keep = np.isin(self.split, splits)
        ids = [f"{split}/{item}" for split, item in zip(self.split[keep], self.item_id[keep], strict=True)]
        return RunItems(candidate, seed, ids, self.family[keep], self.correct[keep], comparison)


def _column(name: str, values: Sequence) -> np.ndarray:
    kind = COLUMNS[name]
    column = np.asarray(values)
    if kind is str:
        # numpy's own strings drop trailing NULs, which a prediction may well have.
        return np.asarray(values, dtype=object) if name == "prediction" else column.astype(str)
    if not len(column):
        return column.astype(kind)
    allowed = "b" if kind is bool else "iu"
    if column.dtype.kind not in allowed:
        raise ValueError(f"expected {kind.__name__} in column {name}, got {column.dtype}: score the run again")
    return column.astype(kind)


def _check_columns(names: Mapping | Sequence[str], where: str) -> None:
    missing, unknown = [name for name in COLUMNS if name not in names], sorted(set(names) - set(COLUMNS))
    if missing or unknown:
        raise ValueError(
            f"expected {where} with the columns {', '.join(COLUMNS)}, got {', '.join(names)} "
            f"(missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}): score the run again"
        )


def answer_row(item: Item, split: str, text: str, *, truncated: bool, num_tokens: int) -> dict[str, Any]:
    """The row of one item and what was answered to it: every score is made of these."""
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


class Score(Frozen):
    """A mean with its standard error and its count; never one without the others."""

    mean: float = Field(ge=0, le=1)
    se: float = Field(
        ge=0, description="of the items' draw alone; 0 where all agree, so read the Wilson interval there"
    )
    n: int = Field(ge=1)


class SplitScores(Frozen):
    """What one run got on one split."""

    split: str
    overall: Score = Field(description="official metric: weighted mean over families of the mean over items")
    interval: tuple[float, float] = Field(description="95 % Wilson interval of `overall`")
    exact: Score = Field(description="the same by exact text")
    families: dict[str, Score] = Field(description="official metric by family")
    subfamilies: dict[str, dict[str, Score]] = Field(description="official metric by family and sub-family")
    truncation_rate: float = Field(ge=0, le=1, description="share of items whose completion hit the token limit")
    missing_box_rate: float = Field(ge=0, le=1, description="share of items answered without a box")
    tokens_per_item: float = Field(ge=0)

    def to_dict(self) -> dict:
        """JSON-able; `SplitScores.parse` reads it back."""
        return self.model_dump(mode="json")


def split_scores(rows: ItemRows, weights: Mapping[str, float]) -> SplitScores:
    """Scores of the rows of one split. Raises ValueError for no rows, several splits or a family without a weight."""
    split = _only_split(rows)
    names, codes = np.unique(rows.family, return_inverse=True)
    counts = np.bincount(codes)
    w = weight_vector(weights, names.tolist())
    overall = _weighted(rows.correct, codes, counts, w)
    # Weights unlike the counts cost precision: the variance is that of this many equally weighted items (Kish 1965).
    effective = float(1 / (w**2 / counts).sum())
    return SplitScores(
        split=split,
        overall=overall,
        interval=wilson(overall.mean, effective),
        exact=_weighted(rows.exact, codes, counts, w),
        families=_by_label(rows.correct, rows.family),
        subfamilies={
            str(name): _by_label(rows.correct[rows.family == name], rows.subfamily[rows.family == name])
            for name in names
        },
        truncation_rate=float(rows.truncated.mean()),
        missing_box_rate=float(1 - rows.boxed.mean()),
        tokens_per_item=float(rows.num_tokens.mean()),
    )


def overall_score(rows: ItemRows, weights: Mapping[str, float]) -> Score:
    """`split_scores(rows, weights).overall` and no more of it."""
    _only_split(rows)
    names, codes = np.unique(rows.family, return_inverse=True)
    return _weighted(rows.correct, codes, np.bincount(codes), weight_vector(weights, names.tolist()))


def _only_split(rows: ItemRows) -> str:
    splits = np.unique(rows.split)
    if len(splits) != 1:
        raise ValueError(f"expected the rows of one split, got {', '.join(splits) or 'none'}: choose one with of_split")
    return str(splits[0])


def _weighted(right: np.ndarray, codes: np.ndarray, counts: np.ndarray, w: np.ndarray) -> Score:
    share = np.bincount(codes, right) / counts
    variance = float((w**2 * share * (1 - share) / counts).sum())
    return Score(mean=min(1.0, float(w @ share)), se=math.sqrt(variance), n=len(right))


def _by_label(right: np.ndarray, labels: np.ndarray) -> dict[str, Score]:
    scores = {}
    for label in np.unique(labels):
        answers = right[labels == label]
        share = float(answers.mean())
        scores[str(label)] = Score(mean=share, se=math.sqrt(share * (1 - share) / len(answers)), n=len(answers))
    return scores


def comparison_of(folder: Path, *splits: str) -> str:
    """The comparison keys that a scoring job wrote for these splits, as one text."""
    told = read_json(Path(folder) / SCORES_FILE)["splits"]
    return " ".join(told[split]["comparison_key"] for split in splits)


def write_rows(path: Path, rows: ItemRows) -> None:
    """Writes the rows as Parquet, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    kinds = {str: pa.string(), bool: pa.bool_(), int: pa.int64()}
    schema = pa.schema([(name, kinds[kind]) for name, kind in COLUMNS.items()])
    table = pa.table({name: getattr(rows, name).tolist() for name in COLUMNS}, schema=schema)
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink)
    write_whole(Path(path), sink.getvalue().to_pybytes())


def read_rows(path: Path) -> ItemRows:
    """Rows as written. Raises ValueError for a missing, truncated or foreign file."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        # One thread and no dataset: a quarter of read_table's processor time on a file of a few thousand rows.
        with parquet.ParquetFile(path) as file:
            table = file.read(use_threads=False)
    except FileNotFoundError:
        raise ValueError(f"expected per-item scores at {path}, found no file: score the run again") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"expected per-item scores at {path}, got no whole Parquet file ({error}): score again"
        ) from None
    _check_columns(table.column_names, f"{path}")
    return ItemRows(**{name: table.column(name).to_pylist() for name in COLUMNS})
