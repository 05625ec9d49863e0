"""The desk: what the steps of an open campaign work with, and the two ways they may have to pause."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_evolve.budget import Account
from megatron_evolve.campaign import Campaign
from megatron_evolve.comparisons import Weights, score_weights
from megatron_evolve.eval.looks import Look, Looks
from megatron_evolve.eval.suite import Split
from megatron_evolve.evidence import Evidence, kept_evidence
from megatron_evolve.facts import RoundFacts, round_facts
from megatron_evolve.jobs import Ground, Run, Stage, StageEnd, drive
from megatron_evolve.launch.job import Launcher
from megatron_evolve.ledger import Ledger
from megatron_evolve.origin import Origin
from megatron_evolve.policy import SearchPolicy, kept_policy
from megatron_evolve.retries import Retries
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.settings import Settings

ENDED = ("outcome", "reason", "cpu_seconds", "seconds", "gpu_seconds", "attempts")  # of a stage, in the ledger
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
    retries: Retries = field(default_factory=Retries)
    account: Account = field(default_factory=Account)

    @property
    def weights(self) -> Weights:
        """Weight of each family in the dev and in the external score."""
        return score_weights(self.suites, self.campaign)

    def drive(
        self,
        stages: Iterable[tuple[Run, Stage]],
        after: Callable[[StageEnd], Iterable[tuple[Run, Stage]]] = lambda end: (),
        ground: Ground | None = None,
    ) -> Iterator[StageEnd]:
        """Runs stages to their ends, each entered and then yielded. Raises Stopped, Paused.

        Once a budget is spent that is entered too, and from then on nothing is started. Without stages nobody is
        stopped: what a controller before this one left running may be among the next.
        """
        place, asked = ground or self.ground, list(stages)
        for end in drive(place, self.launcher, asked, after, self.stop, self.retries, self.account):
            self.record(end, place)
            yield end
        if self.account.spent is not None:
            self.ledger.once("budget-spent", "", lambda: {"why": self.account.spent, **self.account.statement()})
        if asked and self.stop():
            raise Stopped(STOPPED)

    def record(self, end: StageEnd, ground: Ground) -> None:
        """Enters how a stage ended, with digests of what it left, so that verify finds a byte changed afterwards."""
        facts = {name: getattr(end, name) for name in ENDED}
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
        return round_facts(self.ground.folder, self.ledger, self.campaign.seed, number)

    def policy(self, number: int) -> SearchPolicy:
        """The policy of a round, checked against the ledger."""
        event = self.ledger.find("policy", str(number))
        assert event is not None, f"round {number} has no policy yet"
        return kept_policy(self.ground.folder.policy(number), event.data["digest"])

    def evidence(self, number: int) -> Evidence:
        """The evidence of a round, checked against the ledger."""
        event = self.ledger.find("evidence", str(number))
        assert event is not None, f"round {number} has no evidence yet"
        return kept_evidence(self.ground.folder.evidence(number), event.data["digest"])

    def all_evidence(self) -> Iterator[Evidence]:
        """The evidence of every round that has any, one at a time: all declared ones, unless a budget ended them."""
        return (self.evidence(int(key)) for key in self.ledger.keys("evidence"))
