"""Leakage: was an item of the judge trained on?

Two rows are the same question if they have the same canonical rule instance, whatever their wording; the puzzles define
it, from a generated row and from a prompt alike. The comparison is made on sha256 of instances, so the process that
builds training rows can be told what to leave out without being shown an item.
"""

from collections.abc import Iterable, Sequence

from pydantic import Field

from megatron_evolve.eval.suite import Item
from megatron_evolve.substrate.digest import digest_bytes
from megatron_evolve.substrate.frozen import Frozen
from megatron_evolve.substrate.puzzles import families

NANO_EXEMPT = (
    "nano is exempt: its families have tens to hundreds of different questions (under 400 numerals), so every training "
    "run meets most of them and a nano score is accuracy in distribution, not on unseen questions"
)


class Leakage(Frozen):
    """What a check found."""

    rows: int = Field(ge=0, description="training rows compared")
    items: int = Field(ge=0, description="items compared")
    leaked_rows: int = Field(ge=0, description="training rows that are an item of the judge")
    leaked_items: tuple[str, ...] = Field(description="ids of the items that were trained on")
    exempt: str | None = Field(description="why nothing was compared; none: it was")


def instance_of(item: Item) -> str:
    """The canonical rule instance of a challenge item; the whole prompt where the puzzles do not recognise it."""
    try:
        return families.instance_of(item.prompt, item.answer)
    except ValueError:  # not a puzzle that a generator could write
        return item.prompt


def withheld(items: Iterable[Item]) -> frozenset[str]:
    """sha256 of the items' instances: what a data construction must leave out."""
    return frozenset(_hash(instance_of(item)) for item in items)


def check(instances: Iterable[str], items: Sequence[Item], *, difficulty: str) -> Leakage:
    """Training rows' `instances` against the judge's `items`, which are of `difficulty`."""
    rows = list(instances)
    if difficulty == "nano":
        return Leakage(rows=len(rows), items=len(items), leaked_rows=0, leaked_items=(), exempt=NANO_EXEMPT)
    asked = {item.id: _hash(instance_of(item)) for item in items}
    trained = [_hash(instance) for instance in rows]
    unseen, seen = set(asked.values()), set(trained)
    return Leakage(
        rows=len(rows),
        items=len(items),
        leaked_rows=sum(row in unseen for row in trained),
        leaked_items=tuple(sorted(name for name, instance in asked.items() if instance in seen)),
        exempt=None,
    )


def _hash(instance: str) -> str:
    return digest_bytes(instance.encode())
