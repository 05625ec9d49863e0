"""The desk: what the steps of an open campaign work with, and the two ways they may have to pause."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_evolve.artefacts import load_json, load_yaml_checked
from megatron_evolve.campaign import Campaign
from megatron_evolve.eval.looks import Looks
from megatron_evolve.evidence import Evidence
from megatron_evolve.facts import RoundFacts, round_facts
from megatron_evolve.jobs import Ground
from megatron_evolve.launch.job import Launcher
from megatron_evolve.ledger import Ledger
from megatron_evolve.origin import Origin
from megatron_evolve.policy import SearchPolicy
from megatron_evolve.review import Weights
from megatron_evolve.substrate.settings import Settings


class Unavailable(Exception):
    """A proposer that cannot be reached now. The campaign waits; nothing falls back."""


class Stopped(Exception):
    """Asked to stop (stop file or SIGTERM): everything finished is kept, the same command goes on."""


@dataclass(frozen=True)
class Desk:
    """What a round works with: the open campaign."""

    campaign: Campaign
    ground: Ground
    ledger: Ledger
    looks: Looks
    launcher: Launcher
    substrate_view: dict[str, Any]
    substrate_digest: str
    judge_digest: str
    origin: Origin
    origin_settings: Settings
    suites: dict[str, Any]
    on_progress: Callable[[str, dict[str, Any]], None]
    stop: Callable[[], bool]

    @property
    def weights(self) -> Weights:
        """Weight of each family in the dev and in the external score."""
        return Weights(**self.suites["weights"])

    def facts(self, number: int) -> RoundFacts:
        """What a round whose runs have ended left behind."""
        return round_facts(self.ground.folder, self.ledger.events, self.campaign.seed, number)

    def policy(self, number: int) -> SearchPolicy:
        """The policy of a round, checked against the ledger."""
        event = self.ledger.find("policy", str(number))
        assert event is not None, f"round {number} has no policy yet"
        path = self.ground.folder.policy(number)
        return SearchPolicy.parse(load_yaml_checked(path, event.data["digest"]), where=str(path))

    def evidence(self, number: int) -> Evidence:
        """The evidence of a round, checked against the ledger."""
        event = self.ledger.find("evidence", str(number))
        assert event is not None, f"round {number} has no evidence yet"
        path = self.ground.folder.evidence(number)
        return Evidence.parse(load_json(path, event.data["digest"]), where=str(path))
