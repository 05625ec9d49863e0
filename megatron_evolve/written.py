"""What a campaign wrote of itself: its ledger, and the policies, edits and evidence whose digests the ledger keeps.

Read from the campaign's folder alone. Substrate and judge are not opened, so a copied folder reads the same.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_evolve.artefacts import CampaignFolder, load_json
from megatron_evolve.evidence import Evidence
from megatron_evolve.ledger import History
from megatron_evolve.policy import Edit, SearchPolicy, kept_policy


@dataclass(frozen=True)
class Written:
    """A campaign's folder opened for reading."""

    folder: CampaignFolder
    events: History
    opened: dict[str, Any]

    def data(self, kind: str, key: str = "") -> dict[str, Any] | None:
        """Data of an event, if it happened."""
        event = self.events.find(kind, key)
        return event.data if event else None

    def policy(self, number: int) -> SearchPolicy:
        """A round's policy, digest checked."""
        return kept_policy(self.folder.policy(number), self.data("policy", str(number))["digest"])

    def evidence(self, number: int) -> Evidence:
        """A round's evidence, digest checked."""
        path = self.folder.evidence(number)
        return Evidence.parse(load_json(path, self.data("evidence", str(number))["digest"]), where=str(path))

    def edits(self, number: int) -> tuple[Edit, ...]:
        """The edits that made a round's policy, digest checked."""
        path = self.folder.edits(number)
        written = load_json(path, self.data("policy", str(number))["edits"])
        return tuple(Edit.parse(edit, where=str(path)) for edit in written)

    def axes_of(self, number: int) -> dict[str, tuple[str, ...]]:
        """Every axis on which each of a round's candidates was proposed; evidence keeps the first alone."""
        found: dict[str, list[str]] = {}
        for event in self.events.of_round("proposed", number):
            axes = found.setdefault(event.data["candidate"], [])
            axes += [event.data["axis"]] * (event.data["axis"] not in axes)
        return {name: tuple(axes) for name, axes in found.items() if name}

    def finished(self, key: str) -> bool:
        """Whether a stage ended as finished."""
        ended = self.data("ended", key)
        return ended is not None and ended["end"]["outcome"] == "finished"

    @property
    def rounds(self) -> list[int]:
        """Rounds with evidence."""
        return sorted(map(int, self.events.keys("evidence")))


def open_written(root: Path) -> Written:
    """Opens a campaign folder. Raises ValueError in one sentence when it holds none, or one that was not opened yet."""
    folder = CampaignFolder(Path(root))
    events = History(folder.ledger)
    first = events.find("campaign-opened")
    if first is None:
        raise ValueError(f"the campaign in {root} was not opened yet: run it first")
    return Written(folder, events, first.data)
