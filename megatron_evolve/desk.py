"""The desk: what the steps of an open campaign work with, and the two ways they may have to pause."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_evolve.artefacts import load_json, load_yaml_checked
from megatron_evolve.campaign import Campaign
from megatron_evolve.comparisons import Weights, score_weights
from megatron_evolve.eval.looks import Look, Looks
from megatron_evolve.eval.suite import Split
from megatron_evolve.evidence import Evidence
from megatron_evolve.facts import RoundFacts, round_facts
from megatron_evolve.jobs import Ground, StageEnd
from megatron_evolve.launch.job import Launcher
from megatron_evolve.ledger import Ledger
from megatron_evolve.origin import Origin
from megatron_evolve.policy import SearchPolicy
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.settings import Settings

STOPPED = "stopped as asked: everything finished is kept; run the same command to go on"


class Unavailable(Exception):
    """A proposer that cannot be reached now. The campaign waits; nothing falls back."""


class Awaiting(Exception):
    """External scores must come from outside before the campaign can go on."""


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
        return score_weights(self.suites, self.campaign)

    def record(self, end: StageEnd, ground: Ground) -> None:
        """Enters how a stage ended, with digests of what it left, so that verify finds a byte changed afterwards."""
        facts = {name: getattr(end, name) for name in ("outcome", "reason", "cpu_seconds", "seconds", "attempts")}
        self.ledger.once("ended", f"{end.run.key}/{end.stage}", lambda: {"end": facts, "files": ground.files(end)})
        self.on_progress("ended", {"round": end.run.round, "stage": end.stage, "end": end})

    def pay(self, number: int, name: str, keys: Sequence[str], split: Split) -> None:
        """Enters the look at one candidate's score. Its items are named by what draws them, so none is opened here."""
        told = self.campaign.judge.told_scores if split.startswith("external") else None
        self.looks.pay(
            Look(
                candidates=(name,),
                runs=tuple(keys),
                purpose="select" if split.endswith("-a") else "judge",
                split=split,
                round=number,
                item_set=digest_of({"judge": self.judge_digest, "split": split, "round": number}),
                items=told.items if told else self.suites["items"][split],
            )
        )

    def may_ask(self, number: int, name: str, split: Split) -> bool:
        """Whether the external budget has a look left for this question, or it was paid before."""
        paid = self.looks.paid(candidate=name, round_number=number, split=split) is not None
        return paid or self.looks.spent < self.looks.external_budget

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

    def all_evidence(self) -> list[Evidence]:
        """The evidence of every declared round, once all are closed."""
        return [self.evidence(number) for number in range(1, self.campaign.constitution.rounds + 1)]
