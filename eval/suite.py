"""Suites: where the items of a score come from, and which of them a round may see.

A suite is either *generated* (by the puzzles' generators, so items are free and every round gets fresh ones) or a *CSV*
of prompts and answers that somebody else made. `draw` turns a suite into the items of one split in one round. It is a
pure function of suite, split, round and the judge's secret, so all candidates of a round meet the same items and a
process that holds no secret cannot know them. Splits:

    dev-a, external-a   select: which checkpoint, which candidate
    dev-b, external-b   judge: what a verdict and a report are made of
    open                all of a CSV that is not sealed
    final               the sealed part, read once, at the end

Of a generated suite, dev-a stays the same for the campaign, and so does final; the others are fresh every round. A CSV
is cut once into disjoint pools, one for each split it serves and one for final, in equal proportion of every
sub-family; each round walks on through its pool, and starts again when the pool is used up.
"""

import csv
import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from megatron_evolve.substrate.digest import canonical, digest_file, digest_of
from megatron_evolve.substrate.frozen import Frozen, nearest
from megatron_evolve.substrate.puzzles import families

Split = Literal["dev-a", "dev-b", "external-a", "external-b", "open", "final"]
SPLITS: tuple[str, ...] = get_args(Split)

# The same items in every round: dev-a because selection repeats on it, the last two because they are all there is.
FIXED_SPLITS = ("dev-a", "open", "final")

UNKNOWN_FAMILY = "other"
REQUIRED_COLUMNS = ("id", "prompt", "answer")


class Item(Frozen):
    """One question with its right answer."""

    id: str
    prompt: str = Field(description="the puzzle's text, without instruction or chat template")
    answer: str
    family: str
    subfamily: str


class Share(Frozen):
    """What one family is in a generated suite."""

    weight: float = Field(gt=0, description="weight of the family's accuracy in the score, relative to the others")
    cue_rate: float = Field(default=0.0, ge=0, le=1, description="how often a surface cue gives the rule away")


class GeneratedSuite(Frozen):
    """A suite drawn by the puzzles' generators."""

    kind: Literal["generated"] = "generated"
    difficulty: Literal["nano", "challenge"]
    families: dict[str, Share] = Field(min_length=1, description="the families asked, with weight and cue rate")
    items_per_family: dict[Split, Annotated[int, Field(ge=1)]] = Field(
        min_length=1, description="how many items of every family a split holds in one round"
    )
    seed: int = Field(ge=0, description="seed material: two suites that differ only here have different items")

    @model_validator(mode="after")
    def _known(self) -> "GeneratedSuite":
        for name, share in self.families.items():
            if name not in families.FAMILIES:
                raise ValueError(f"no generator for family {name!r}{nearest(name, list(families.FAMILIES))}")
            if share.cue_rate > 0 and name not in families.CUED_FAMILIES:
                raise ValueError(f"family {name!r} hides no rule that a cue could give away; set its cue_rate to 0")
        if "open" in self.items_per_family:
            raise ValueError("a generated suite has no open part, since it has no end; declare items for other splits")
        return self

    @property
    def digest(self) -> str:
        """Names the suite: sha256 of every setting."""
        return digest_of(self)


class CsvSuite(Frozen):
    """A suite read from a CSV file with the columns id, prompt, answer and, where known, family and subfamily."""

    kind: Literal["csv"] = "csv"
    path: str
    sha256: str = Field(description="of the file's bytes")
    items: dict[Literal["dev-a", "dev-b", "external-a", "external-b"], Annotated[int, Field(ge=1)]] = Field(
        min_length=1, description="how many rows, of all families together, a split holds in one round"
    )
    sealed: float = Field(default=0.5, ge=0, lt=1, description="share of the rows kept for the final split")
    weight: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="weight of each family's accuracy in the score; none: every row counts alike"
    )

    @property
    def digest(self) -> str:
        """Names the suite: sha256 of every setting and of the file's bytes, wherever the file lies."""
        return digest_of(self.model_dump(mode="json", exclude={"path"}))


Suite = Annotated[GeneratedSuite | CsvSuite, Field(discriminator="kind")]


def csv_suite(path: Path, items: dict[str, int], **settings) -> CsvSuite:
    """The suite of a CSV as it lies there, read and checked. Raises ValueError in one sentence."""
    if not Path(path).is_file():
        raise ValueError(f"expected a CSV of prompts and answers at {path}, found no file: check the path")
    fields = {"path": str(Path(path).resolve()), "sha256": digest_file(path), "items": items, **settings}
    suite = CsvSuite.parse(fields, where="external suite")
    for split in suite.items:
        draw(suite, split=split, round_number=0, secret="")
    return suite


def draw(suite: GeneratedSuite | CsvSuite, *, split: Split, round_number: int, secret: str) -> list[Item]:
    """The items of `split` in round `round_number`, the same for everybody who asks with the judge's `secret`.

    Raises ValueError if the suite does not serve the split, or its CSV is missing, changed or malformed.
    """
    moment = 0 if split in FIXED_SPLITS else round_number
    if isinstance(suite, GeneratedSuite):
        return _generated(suite, split, moment, secret)
    return _from_csv(suite, split, moment, secret)


def item_set_digest(items: Iterable[Item]) -> str:
    """Names a list of items, in order: scores over different lists do not compare."""
    return digest_of([item.model_dump() for item in items])


def family_weights(suite: GeneratedSuite | CsvSuite, items: Sequence[Item]) -> dict[str, float]:
    """Weight of each family's accuracy in the score over `items`; sums to 1."""
    if isinstance(suite, GeneratedSuite):
        weight = {name: share.weight for name, share in suite.families.items()}
    else:
        weight = suite.weight or dict(Counter(item.family for item in items))
    present = {item.family for item in items}
    total = math.fsum(weight[name] for name in present)
    return {name: weight[name] / total for name in sorted(present)}


def _rng(*seed_material: str | int) -> random.Random:
    # Not hash(): it differs from process to process.
    return random.Random(hashlib.sha256(canonical(list(seed_material))).digest())


def _must_serve(split: str, served: Iterable[str]) -> None:
    served = list(served)
    if split not in served:
        raise ValueError(f"expected one of the splits this suite serves ({', '.join(served)}), got {split!r}")


def _generated(suite: GeneratedSuite, split: Split, moment: int, secret: str) -> list[Item]:
    _must_serve(split, suite.items_per_family)
    items = []
    for name, share in sorted(suite.families.items()):
        rng = _rng(suite.digest, split, moment, name, secret)
        for position in range(suite.items_per_family[split]):
            row = families.draw(name, rng, difficulty=suite.difficulty, cue_rate=share.cue_rate)
            identity = digest_of([row.prompt, row.answer, position])[:16]
            items.append(
                Item(id=identity, prompt=row.prompt, answer=row.answer, family=row.family, subfamily=row.subfamily)
            )
    return items


def read_csv(suite: CsvSuite) -> list[Item]:
    """Every row of the suite's file, checked. Raises ValueError with one sentence: expected, got, remedy."""
    path = Path(suite.path)
    if not path.is_file():
        raise ValueError(f"expected the external suite at {path}, found no file: restore it or freeze a new judge")
    if (found := digest_file(path)) != suite.sha256:
        raise ValueError(
            f"expected {path} with sha256 {suite.sha256[:12]}, got {found[:12]}: restore the file or freeze a new judge"
        )
    items = _parse_csv(path)
    if suite.weight is not None:
        present = {item.family for item in items}
        for name in present ^ suite.weight.keys():
            where = "in the file and has no weight" if name in present else "weighted and not in the file"
            raise ValueError(
                f"expected one weight for each family of {path}, family {name!r} is {where}: mend `weight`"
            )
    return items


def _parse_csv(path: Path) -> list[Item]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = reader.fieldnames or []
            missing = [name for name in REQUIRED_COLUMNS if name not in header]
            if missing:
                known = [name for name in header if name in REQUIRED_COLUMNS]  # no other: it may be a row's gold answer
                raise ValueError(
                    f"{path}: expected the columns {', '.join(REQUIRED_COLUMNS)}, got {', '.join(known) or 'none'}: "
                    f"add {', '.join(missing)}"
                )
            rows = [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text, got byte 0x{error.object[error.start]:02x}: save the file as UTF-8"
        ) from None
    except csv.Error as error:
        raise ValueError(
            f"{path}: expected comma-separated rows, got one that does not parse ({error}): mend it"
        ) from None
    if not rows:
        raise ValueError(f"{path}: expected at least one row below the header, got none: add rows")
    first_line: dict[str, int] = {}
    items = []
    for line, row in rows:
        item = _item(path, line, row)
        if item.id in first_line:
            raise ValueError(
                f"{path}: expected every id once, got {item.id!r} on lines {first_line[item.id]} and {line}: "
                "give each row its own id"
            )
        first_line[item.id] = line
        items.append(item)
    return items


def _item(path: Path, line: int, row: dict) -> Item:
    if None in row or None in row.values():
        raise ValueError(
            f"{path}: expected as many fields as columns, the row that ends on line {line} differs: quote it"
        )
    for name in REQUIRED_COLUMNS:
        if not row[name].strip():
            raise ValueError(
                f"{path}: expected a value for {name}, the row that ends on line {line} has none: fill it in"
            )
    family, subfamily = row.get("family") or "", row.get("subfamily") or ""
    if not family:
        family, subfamily = _recognise(row["prompt"])
    return Item(
        id=row["id"].strip(),
        prompt=row["prompt"],
        answer=row["answer"].strip(),
        family=family,
        subfamily=subfamily or family,
    )


def _recognise(prompt: str) -> tuple[str, str]:
    """Family and sub-family by the puzzles' parser, which raises ValueError for any text that is not a puzzle."""
    try:
        parsed = families.parse(prompt)
    except ValueError:
        return UNKNOWN_FAMILY, UNKNOWN_FAMILY
    return parsed.family, parsed.subfamily


def _from_csv(suite: CsvSuite, split: Split, moment: int, secret: str) -> list[Item]:
    _must_serve(split, [*suite.items, "open", "final"])
    pools = _pools(suite, read_csv(suite), secret)
    if split == "final":
        return _flat(pools["final"])
    if split == "open":
        return _flat(_merge(pools[name] for name in suite.items))
    pool = pools[split]
    available, wanted = sum(map(len, pool.values())), suite.items[split]
    if wanted > available:
        raise ValueError(
            f"expected at most {available} rows a round for {split} of {suite.path}, got {wanted}: "
            "ask for fewer items or seal a smaller share"
        )
    count = _allot(wanted, {name: len(rows) for name, rows in pool.items()})
    return _flat({name: _walk(rows, moment * count[name], count[name]) for name, rows in pool.items()})


def rounds_without_reuse(suite: CsvSuite, split: Split) -> int:
    """How many rounds of `split` pass before some sub-family's rows come round again; a report states it."""
    pool = _pools(suite, read_csv(suite), secret="")[split]
    count = _allot(suite.items[split], {name: len(rows) for name, rows in pool.items()})
    return min(len(rows) // count[name] for name, rows in pool.items() if count[name])


Strata = dict[str, list[Item]]


def _pools(suite: CsvSuite, items: list[Item], secret: str) -> dict[str, Strata]:
    """Disjoint pools by split, each a shuffled list per sub-family, in equal proportion of every sub-family."""
    rest: Strata = {}
    for item in items:
        rest.setdefault(item.subfamily, []).append(item)
    for name, rows in rest.items():
        _rng(suite.sha256, name, secret).shuffle(rows)
    pools: dict[str, Strata] = {}
    pools["final"], rest = _cut(rest, suite.sealed)
    unclaimed = sum(suite.items.values())
    for split, count in sorted(suite.items.items()):
        pools[split], rest = _cut(rest, count / unclaimed)
        unclaimed -= count
    return pools


def _cut(strata: Strata, share: float) -> tuple[Strata, Strata]:
    sizes = {name: len(rows) for name, rows in strata.items()}
    count = _allot(round(share * sum(sizes.values())), sizes)
    return (
        {name: rows[: count[name]] for name, rows in strata.items()},
        {name: rows[count[name] :] for name, rows in strata.items()},
    )


def _allot(total: int, sizes: dict[str, int]) -> dict[str, int]:
    """`total` shared out in proportion to `sizes` by largest remainder, so never more than a size."""
    everything = sum(sizes.values()) or 1
    count = {name: total * size // everything for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (-(total * sizes[name] % everything), name))
    for name in by_remainder[: total - sum(count.values())]:
        count[name] += 1
    return count


def _walk(rows: list[Item], start: int, count: int) -> list[Item]:
    return [rows[(start + step) % len(rows)] for step in range(count)]


def _merge(parts: Iterable[Strata]) -> Strata:
    merged: Strata = {}
    for part in parts:
        for name, rows in part.items():
            merged.setdefault(name, []).extend(rows)
    return merged


def _flat(strata: Strata) -> list[Item]:
    return sorted((item for rows in strata.values() for item in rows), key=lambda item: item.id)
