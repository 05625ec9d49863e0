"""The account of looks: every time a score on dev or on the external target is asked for, written before it is read.

Statistics are honest only if all questions are counted, not just those whose answers were liked. So a look is appended
to the account and fsynced first (`pay`), and only then may its items be drawn and its answer be read. The external
target has a budget, and the final split opens once. Paying twice for the same question is no second look: after a crash
the look that was paid for is given back.

Verdicts are computed on what was answered; what selection and the next policy may read of repeated looks at the same
items is less (`megatron_evolve.released`).
"""

import errno
import hashlib
import json
import os
from collections import Counter
from pathlib import Path

from pydantic import Field, model_validator

from megatron_evolve.eval.suite import Split
from megatron_evolve.launch.rundir import RunDirError, make_folder, sync_folder
from megatron_evolve.substrate.digest import canonical
from megatron_evolve.substrate.frozen import Frozen


class BudgetSpent(ValueError):
    """The external target may not be asked again in this campaign."""


class Look(Frozen):
    """One question to the judge: how candidates score on one split in one round, by these runs of theirs."""

    candidates: tuple[str, ...] = Field(min_length=1, description="who: digest; one, but all there are for final")
    runs: tuple[str, ...] = Field(min_length=1, description="who: the runs whose scores are read")
    purpose: str = Field(min_length=1, description="what for, in a word or a sentence")
    split: Split
    round: int = Field(ge=0)
    item_set: str = Field(min_length=1, description="digest of the items asked")
    items: int = Field(ge=1, description="how many items")

    @model_validator(mode="after")
    def _one_candidate(self) -> "Look":
        if self.split != "final" and len(self.candidates) != 1:
            raise ValueError(f"a look at {self.split} is one candidate's; pay one for each")
        return self

    @property
    def key(self) -> tuple:
        """What may be asked once: a candidate on a split in a round; the final split at all."""
        return ("final",) if self.split == "final" else (self.candidates[0], self.round, self.split)


def is_budgeted(split: Split) -> bool:
    """Whether a look at `split` is charged to the external budget; final has a rule of its own."""
    return split in ("external-a", "external-b", "open")


class Looks:
    """The account, a JSONL file with one writer. Opening reads it; a last line cut off by a crash was never paid."""

    def __init__(self, path: Path, *, external_budget: int) -> None:
        """Raises ValueError if a line other than a cut-off last one is no look."""
        self.path = Path(path)
        self.external_budget = external_budget
        self._paid: dict[tuple, bytes] = {}  # the line of each look: as a Look it takes four times the memory
        self._counts = {"dev": 0, "external": 0}
        self._sha = hashlib.sha256()
        self._external_of: Counter[int] = Counter()  # by round
        self._whole_bytes = 0
        self._secured = False  # whether what is in the file, and its name, survive a power cut
        if self.path.exists():
            self._read()

    def pay(self, look: Look) -> Look:
        """Enters `look` and returns it once it is on disk, so that its answer may be read; again: the one paid before.

        Raises BudgetSpent past the external budget, and ValueError if the same candidate, round and split (or the final
        split) was asked before with other runs or items.
        """
        before = self._look(look.key)
        if before is not None:
            _must_be_same(before, look)
            self._secure()  # whoever wrote it may have died before its fsync
            return before
        if is_budgeted(look.split) and self.spent >= self.external_budget:
            raise BudgetSpent(
                f"expected at most {self.external_budget} looks at the external target, all are spent and "
                f"{look.candidates[0]} asks for one more on {look.split}: judge with what is there, or start a "
                "campaign that declares more"
            )
        line = canonical(look)
        self._append(line + b"\n")
        self._enter(look, line)
        return look

    def paid(self, *, candidate: str, round_number: int, split: Split) -> Look | None:
        """The look that covers this question, or None: then nothing may be read."""
        look = self._look(("final",) if split == "final" else (candidate, round_number, split))
        return look if look is not None and candidate in look.candidates else None

    @property
    def entries(self) -> tuple[Look, ...]:
        """Every look, in the order of asking."""
        return tuple(map(Look.model_validate_json, self._paid.values()))

    @property
    def spent(self) -> int:
        """Looks charged to the external budget so far."""
        return self._counts["external"]

    def spent_before(self, round_number: int) -> int:
        """Looks at the external target that earlier rounds paid."""
        return sum(count for one, count in self._external_of.items() if one < round_number)

    def summary(self) -> dict[str, int]:
        """Counts for people and scripts: looks at dev, at the external target, and its budget."""
        return {**self._counts, "external_budget": self.external_budget}

    @property
    def digest(self) -> str:
        """sha256 of every line so far: what a ledger keeps of the account, so that none of it changes afterwards."""
        return self._sha.hexdigest()

    def digests(self) -> list[str]:
        """The digest after no look, after the first, and so on to the last."""
        sha = hashlib.sha256()
        found = [sha.hexdigest()]
        for line in self._paid.values():
            sha.update(line + b"\n")
            found.append(sha.hexdigest())
        return found

    def _look(self, key: tuple) -> Look | None:
        line = self._paid.get(key)
        return None if line is None else Look.model_validate_json(line)

    def _enter(self, look: Look, line: bytes) -> None:
        self._paid[look.key] = line
        self._sha.update(line + b"\n")
        self._counts["dev"] += look.split.startswith("dev")
        self._counts["external"] += is_budgeted(look.split)
        self._external_of[look.round] += look.split.startswith("external")

    def _read(self) -> None:
        data = self.path.read_bytes()
        self._whole_bytes = data.rfind(b"\n") + 1
        for number, line in enumerate(data[: self._whole_bytes].splitlines(), start=1):
            where = f"{self.path}, line {number}"
            try:
                document = json.loads(line)
            except (ValueError, RecursionError):  # not JSON, not UTF-8, or brackets without end
                raise ValueError(f"{where}: expected a look in JSON, got {line[:40]!r}: restore the account") from None
            look = Look.parse(document, where=where)
            if look.key in self._paid:
                raise ValueError(f"{where}: expected every look once, got {look.key} again: restore the account")
            self._enter(look, line)

    def _append(self, line: bytes) -> None:
        make_folder(self.path.parent)
        # Unbuffered: nothing may reach the file later than the truncation that takes a failed line back.
        with open(self.path, "ab", buffering=0) as file:
            file.truncate(self._whole_bytes)
            try:
                written = file.write(line)
                if written != len(line):
                    raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes fit")
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(self._whole_bytes)
                raise RunDirError(
                    f"expected to enter a look in {self.path}, got {error.strerror}: free space on that disk, then run "
                    "the same command again"
                ) from error
        self._whole_bytes += len(line)
        self._secure()

    def _secure(self) -> None:
        if self._secured:
            return
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())
        sync_folder(self.path.parent)
        self._secured = True


def _must_be_same(before: Look, look: Look) -> None:
    for name in ("candidates", "runs", "item_set"):
        old, new = getattr(before, name), getattr(look, name)
        # As sets of characters two digests could agree, so text is compared as text.
        same = old == new if isinstance(old, str) else set(old) == set(new)
        if not same:
            rule = "the final split opens once" if look.split == "final" else "a candidate is asked once a round"
            raise ValueError(
                f"{rule}: expected the look at {look.split} that was paid with {name} {old}, got {new}: read the paid "
                "look, or ask in the next round"
            )


def round_to(value: float, step: float) -> float:
    """`value` to the nearest multiple of `step` > 0, as a leaderboard shows it; its variance grows by step²/12."""
    return round(value / step) * step
