"""Training batches: rows drawn by the mix from the operator's pool, as arrays of tokens and loss weights.

A row is a function of (seed, step, position in the global batch) and of the prompts drawn before it, never of the
number of data-parallel ranks: every rank draws the same global batch and encodes it, then takes its own slice. So two
ranks train on what one would, and a resumed run needs only its step number. A third of a
nano batch and two thirds of a challenge batch would be padding; `narrowed` computes the short rows apart, which saves
7 % and 36 % of a step's time, and `packed` lays rows end to end, where the model is told to begin anew at each.

B rows, T tokens.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_evolve.substrate.chat import puzzle_parts
from megatron_evolve.substrate.checkpoint_tokenizer import CheckpointTokenizer
from megatron_evolve.substrate.digest import digest_bytes
from megatron_evolve.substrate.manifest import Construction
from megatron_evolve.substrate.mix import Mix
from megatron_evolve.substrate.puzzles import families
from megatron_evolve.substrate.puzzles.row import ANSWER_STYLE, BOX_OPEN, Row, completion_text, prompt_text
from megatron_evolve.substrate.recipe import Recipe
from megatron_evolve.substrate.tokenizer import PieceTokenizer

MAX_DRAWS = 200  # a family that gives no usable row in so many draws has run dry
MIN_SAVING = 300  # positions; a second pass through the nano model costs 0.010 s, a position 0.00005 s: 200 pay for it
PAD_MULTIPLE = 4  # places of a row, in every layout; those that cut it finer widen the micro-batch (`Layout.padded`)


@dataclass(frozen=True)
class Batch:
    """A global batch, or one rank's slice of it. `weights` is the loss weight of each label, 0 on padding.

    Rows are padded to one width, or lie end to end in a pack (1, T): then `lengths` has the places of each, in order.
    """

    tokens_BT: np.ndarray  # int64
    labels_BT: np.ndarray  # int64, the token that follows
    weights_BT: np.ndarray  # float32
    padding_BT: np.ndarray  # bool, True where there is no token
    weight_sum: float  # of the global batch, also in a slice
    families: tuple[str, ...]
    lengths: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((~self.padding_BT).sum())

    def part(self, rank: int, of: int) -> "Batch":
        """Rank `rank`'s slice of `of`. Raises ValueError where the rows do not divide."""
        rows = len(self.tokens_BT)
        if rows % of:
            raise ValueError(
                f"recipe.batch_size must be a multiple of the {of} data-parallel ranks; got {rows}: change one"
            )
        return self._rows(np.arange(rank * rows // of, (rank + 1) * rows // of), self.tokens_BT.shape[1])

    def narrowed(self, multiple: int) -> list["Batch"]:
        """The same rows as one micro-batch or two, the short ones apart where that saves enough padding to pay.

        Each has a multiple of `multiple` rows. Every rank must cut the global batch, not its slice: then any number of
        ranks sees the same padding, which the experts' load counts.
        """
        lengths = (~self.padding_BT).sum(1)
        order = np.argsort(lengths, kind="stable")
        widths = -(-lengths[order] // PAD_MULTIPLE) * PAD_MULTIPLE
        rows, widest = self.tokens_BT.shape
        costs = {cut: cut * widths[cut - 1] + (rows - cut) * widest for cut in range(multiple, rows, multiple)}
        cut = min(costs, key=costs.__getitem__, default=0)
        if not cut or rows * widest - costs[cut] < MIN_SAVING:
            return [self]
        return [self._rows(np.sort(order[:cut]), int(widths[cut - 1])), self._rows(np.sort(order[cut:]), widest)]

    def rows_at_most(self, rows: int | None) -> list["Batch"]:
        """The same rows in pieces of equal length (but for the last) of at most `rows`; in one piece if None."""
        have, width = self.tokens_BT.shape
        rows = rows or have
        return [self._rows(np.arange(first, min(first + rows, have)), width) for first in range(0, have, rows)]

    def packed(self, places: int | None, at_least: int = 1) -> list["Batch"]:
        """The same rows end to end, in order and none cut, in packs of at most `places`; in one pack if None.

        What no longer fits begins the next pack. A row takes a multiple of PAD_MULTIPLE places wherever it lies, so
        what it computes, and what this padding adds to the experts' load, depends on no other row and no number of
        ranks. Where rows suffice, the packs of most rows are halved until there are `at_least` so many packs.
        """
        widths = (-(-(~self.padding_BT).sum(1) // PAD_MULTIPLE) * PAD_MULTIPLE).tolist()
        packs: list[list[int]] = []
        room = 0
        for row, width in enumerate(widths):
            if width > room:
                packs.append([])
                room = places or sum(widths)
            packs[-1].append(row)
            room -= width
        while len(packs) < min(at_least, len(widths)):
            most = max(range(len(packs)), key=lambda pack: len(packs[pack]))
            half = len(packs[most]) // 2
            packs[most : most + 1] = [packs[most][:half], packs[most][half:]]
        return [self._end_to_end(rows, tuple(widths[row] for row in rows)) for rows in packs]

    def widened(self, width: int) -> "Batch":
        """The same rows with padding to `width` places; a pack's goes to its last row."""
        tail = width - self.tokens_BT.shape[1]
        if not tail:
            return self
        arrays = (
            np.pad(array_BT, ((0, 0), (0, tail)), constant_values=padding)
            for array_BT, padding in zip(self._arrays, (0, 0, 0, True), strict=True)
        )
        lengths = (*self.lengths[:-1], self.lengths[-1] + tail) if self.lengths else ()
        return Batch(*arrays, weight_sum=self.weight_sum, families=self.families, lengths=lengths)

    def mirrored(self, rank: int, of: int) -> "Batch":
        """Context-parallel rank `rank`'s part of every row: of 2 x `of` equal pieces one and its mirror image.

        So every rank has as much of causal attention to do, as Megatron's attention takes for granted.
        """
        pieces = 2 * of

        def part(array_BT: np.ndarray) -> np.ndarray:
            cut = np.split(array_BT, pieces, axis=1)
            return np.concatenate([cut[rank], cut[pieces - 1 - rank]], axis=1)

        return Batch(*map(part, self._arrays), weight_sum=self.weight_sum, families=self.families)

    def _end_to_end(self, rows: list[int], widths: tuple[int, ...]) -> "Batch":
        def laid(array_BT: np.ndarray) -> np.ndarray:
            parts = [array_BT[row, :width] for row, width in zip(rows, widths, strict=True)]
            return np.concatenate(parts)[np.newaxis]

        names = tuple(self.families[row] for row in rows)
        return Batch(*map(laid, self._arrays), weight_sum=self.weight_sum, families=names, lengths=widths)

    def _rows(self, chosen: np.ndarray, width: int) -> "Batch":
        names = tuple(self.families[row] for row in chosen)
        return Batch(*(array[chosen, :width] for array in self._arrays), weight_sum=self.weight_sum, families=names)

    @property
    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.tokens_BT, self.labels_BT, self.weights_BT, self.padding_BT


@dataclass
class Tally:
    """What a run drew so far, for the report. The only thing here that changes."""

    rows: Counter = field(default_factory=Counter)  # by family
    tokens: Counter = field(default_factory=Counter)  # by family, padding not counted
    redrawn: Counter = field(default_factory=Counter)  # over the repetition cap, by family
    dropped: Counter = field(default_factory=Counter)  # in the excluded set, by family

    def as_json(self) -> dict[str, dict[str, int]]:
        return {name: dict(sorted(getattr(self, name).items())) for name in ("rows", "tokens", "redrawn", "dropped")}


@dataclass(frozen=True)
class Packer:
    """Where a run's rows come from. `excluded` holds `instance_hash` of rows that must not be trained on.

    `trace_share` is the share of rows that carry their family's trace whatever the mix says; only the build of a
    substrate sets it. Raises ValueError in one sentence where the mix asks for what the pool does not hold.
    """

    mix: Mix
    construction: Construction
    tokenizer: PieceTokenizer | CheckpointTokenizer
    recipe: Recipe
    seed: int
    excluded: frozenset[str] = frozenset()
    trace_share: float = 0.0

    def __post_init__(self) -> None:
        pool = self.construction
        unknown = sorted(set(self.mix.weight) - set(pool.families))
        if unknown:
            raise ValueError(
                f"mix.weight names {unknown[0]!r}, which the pool does not hold; it holds {', '.join(pool.families)}"
            )
        if self.mix.difficulty != pool.difficulty:
            raise ValueError(
                f"mix.difficulty is {self.mix.difficulty!r}, but the pool's rows are {pool.difficulty!r}; use that"
            )
        for family, style in self.mix.style.items():
            if style != ANSWER_STYLE and style not in pool.styles[family]:
                raise ValueError(f"mix.style.{family} is {style!r}; the pool offers {', '.join(pool.styles[family])}")

    def batches(self, tally: Tally, start: int = 0) -> Iterator[Batch]:
        """The run's global batches from step `start` on. Earlier rows are drawn too, so that prompts count as seen."""
        seen: Counter = Counter()
        for step in range(self.recipe.steps):
            rows = self._draw_step(step, seen, tally)
            batch = self.pack(rows, tally)  # earlier ones too, so that the tally is the same after a resume
            if step >= start:
                yield batch

    def held_out(self, num_rows: int, *, uniform: bool) -> Batch:
        """Rows of the same pool that no step draws, shares as at the end of the run, or equal shares."""
        shares = dict.fromkeys(self.mix.weight, 1.0) if uniform else self.mix.shares_at(1.0)
        chosen = _spread(shares, num_rows, 0.5)
        seen, tally = Counter(), Tally()
        rows = [self._draw_row(family, f"held-out/{self.seed}/{n}", seen, tally) for n, family in enumerate(chosen)]
        return self.pack(rows, tally)

    def pack(self, rows: list[tuple[Row, str]], tally: Tally) -> Batch:
        """Rows with their style as one padded batch. Raises ValueError for a row over the sequence length."""
        encoded = [self._encode(row, style) for row, style in rows]
        longest = max(len(tokens) for tokens, _ in encoded) - 1  # the last token is only a label
        width = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
        tokens_BT = np.full((len(rows), width), self.tokenizer.pad_id, dtype=np.int64)
        labels_BT = tokens_BT.copy()
        weights_BT = np.zeros((len(rows), width), dtype=np.float32)
        padding_BT = np.ones((len(rows), width), dtype=bool)
        for n, ((row, _), (tokens, weights)) in enumerate(zip(rows, encoded, strict=True)):
            length = len(tokens) - 1
            tokens_BT[n, :length] = tokens[:-1]
            labels_BT[n, :length] = tokens[1:]
            weights_BT[n, :length] = weights[1:]
            padding_BT[n, :length] = False
            tally.rows[row.family] += 1
            tally.tokens[row.family] += length
        names = tuple(row.family for row, _ in rows)
        return Batch(tokens_BT, labels_BT, weights_BT, padding_BT, float(weights_BT.sum(dtype=np.float64)), names)

    def _draw_step(self, step: int, seen: Counter, tally: Tally) -> list[tuple[Row, str]]:
        recipe = self.recipe
        shares = self.mix.shares_at(step / max(1, recipe.steps - 1))
        key = f"{self.seed}/{step}"
        chosen = _spread(shares, recipe.batch_size, random.Random(key).random())
        return [self._draw_row(family, f"{key}/{n}", seen, tally) for n, family in enumerate(chosen)]

    def _draw_row(self, family: str, key: str, seen: Counter, tally: Tally) -> tuple[Row, str]:
        rng = random.Random(key)
        cue_rate = self.construction.cue_rate.get(family, 0.0)
        style = self.mix.style[family]
        if self.trace_share and rng.random() < self.trace_share:
            style = next((name for name in self.construction.styles[family] if name != ANSWER_STYLE), ANSWER_STYLE)
        for _ in range(MAX_DRAWS):
            row = families.draw(family, rng, difficulty=self.mix.difficulty, cue_rate=cue_rate)
            if self.excluded and instance_hash(row) in self.excluded:
                tally.dropped[family] += 1
                continue
            prompt = prompt_text(row)
            if seen[prompt] >= self.mix.repetition_cap:
                tally.redrawn[family] += 1
                continue
            seen[prompt] += 1
            return row, style
        raise ValueError(
            f"family {family!r} gave no usable row in {MAX_DRAWS} draws (so far {tally.redrawn[family]} over the "
            f"repetition cap of {self.mix.repetition_cap} and {tally.dropped[family]} excluded); "
            "raise mix.repetition_cap, or lower the family's weight or recipe.steps"
        )

    def _encode(self, row: Row, style: str) -> tuple[list[int], list[float]]:
        """Tokens of prompt, trace, boxed answer and end, with the loss weight of each."""
        recipe = self.recipe
        prompt, trace, answer = map(self.tokenizer.encode, self._texts(row, style))
        answer = [*answer, self.tokenizer.eos_id]
        tokens = prompt + trace + answer
        if len(tokens) > recipe.sequence_length:
            raise ValueError(
                f"a row of family {row.family!r} in style {style!r} has {len(tokens)} tokens, "
                f"recipe.sequence_length is {recipe.sequence_length}; raise it"
            )
        weights = [recipe.prompt_loss_weight] * len(prompt)
        weights += [recipe.answer_loss_weight if style == ANSWER_STYLE else recipe.trace_loss_weight] * len(trace)
        return tokens, weights + [recipe.answer_loss_weight] * len(answer)

    def _texts(self, row: Row, style: str) -> tuple[str, str, str]:
        """Prompt, trace and boxed answer: in the chat format for a checkpoint that knows it, plain for a puzzle scale's
        own tokenizer."""
        if isinstance(self.tokenizer, CheckpointTokenizer):
            return puzzle_parts(row, style)
        completion = completion_text(row, style)
        box = completion.rindex(BOX_OPEN)
        return prompt_text(row), completion[:box], completion[box:]


def _spread(shares: dict[str, float], num_rows: int, offset: float) -> list[str]:
    """`num_rows` families, each within one row of its share: systematic sampling with one random offset in [0, 1).

    Independent draws would let a family's count vary by +-3 of 11 in a batch of 64, noise that says nothing about the
    mix.
    """
    edges = np.cumsum(list(shares.values()))
    points = (np.arange(num_rows) + offset) * (edges[-1] / num_rows)
    names = list(shares)
    return [names[index] for index in np.searchsorted(edges, points, side="right")]


def instance_hash(row: Row) -> str:
    """sha256 of the row's canonical rule instance: the same puzzle in other words has the same one."""
    return digest_bytes(row.instance.encode())


def read_excluded(path: Path) -> frozenset[str]:
    """The set in a file with one `instance_hash` a line. Raises ValueError naming the first line that is none."""
    hashes = path.read_text(encoding="utf-8").split()
    for number, line in enumerate(hashes, 1):
        if len(line) != 64 or set(line) - set("0123456789abcdef"):
            raise ValueError(
                f"{path}:{number}: expected 64 hexadecimal digits, got {line[:20]!r}; write instance_hash of each row"
            )
    return frozenset(hashes)
