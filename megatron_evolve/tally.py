"""The tally: what a ledger's events add up to, kept small however long the campaign is.

Fed event by event, so that a watcher of weeks reads each one once. What it holds does not grow with the number of
rounds, but for one count a kind of ending.

The time left is an estimate: active time so far for each run that was trained, times the runs that are planned and not
yet trained. Active time leaves pauses out: a gap between two events counts at most as long as the longest job so far
took, for while a campaign runs something ends at least that often.
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from megatron_evolve.budget import Spend, of_end
from megatron_evolve.ledger import Event

KEPT_FAILURES = 5
KEPT_VERDICTS = 3  # rounds
# What an operator enters in a campaign that does not run: it goes on being paused.
OPERATOR_KINDS = ("external-submitted", "external-again")


def why_paused(event: Event) -> str | None:
    """Why a controller whose last event this is paused by itself; none: it did not."""
    match event.kind:
        case "paused":
            return event.data["why"]
        case "external-awaited":
            return f"{len(event.data['runs'])} external score(s) are awaited"
        case "final-awaited":
            return "the sealed half awaits an operator's word"
    return None


@dataclass(frozen=True)
class Failure:
    """A stage that did not finish."""

    key: str
    outcome: str
    reason: str
    time: str


@dataclass
class Tally:
    """Counts over the events so far. Runs are counted by their training, in the declared rounds."""

    opened: dict[str, Any] | None = None
    closing: dict[str, Any] | None = None
    num_events: int = 0
    pause: str | None = None  # why, if the last event says that the controller paused by itself
    last_time: datetime | None = None
    round: int = 0  # the latest that was opened
    round_is_closed: bool = True
    rounds_closed: int = 0
    trained: int = 0
    trained_in_round: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)  # of all stages
    used: Spend = field(default_factory=Spend)
    opened_at: float | None = None  # unix seconds
    spent: str | None = None  # why nothing is started any more, once a budget is spent
    active_s: float = 0.0
    longest_s: float = 0.0
    ended_in_round: set[str] = field(default_factory=set)  # keys of stages
    axes: dict[str, str] = field(default_factory=dict)  # candidate to axis, of the latest round
    failures: deque[Failure] = field(default_factory=lambda: deque(maxlen=KEPT_FAILURES))
    judged: deque[int] = field(default_factory=lambda: deque(maxlen=KEPT_VERDICTS))

    @classmethod
    def of(cls, events: Iterable[Event]) -> "Tally":
        """The tally of a whole ledger."""
        found = cls()
        for event in events:
            found.add(event)
        return found

    def add(self, event: Event) -> None:
        """Counts one event more."""
        moment = datetime.fromisoformat(event.time)
        if self.round and self.last_time is not None:
            self.active_s += min((moment - self.last_time).total_seconds(), self.longest_s or float("inf"))
        self.num_events += 1
        self.last_time = moment
        if event.kind not in OPERATOR_KINDS:
            self.pause = why_paused(event)
        step = getattr(self, f"_{event.kind.replace('-', '_')}", None)
        if step is not None:
            step(event)

    def _campaign_opened(self, event: Event) -> None:
        self.opened, self.opened_at = event.data, datetime.fromisoformat(event.time).timestamp()

    def _round_opened(self, event: Event) -> None:
        self.round, self.round_is_closed = int(event.key), False
        self.trained_in_round = 0
        self.ended_in_round, self.axes = set(), {}

    def _proposed(self, event: Event) -> None:
        if event.data["candidate"]:
            self.axes[event.data["candidate"]] = event.data["axis"]

    def _ended(self, event: Event) -> None:
        end, number = event.data["end"], int(event.key.split("/", 1)[0])
        self.outcomes[end["outcome"]] += 1
        self.used += of_end(end)
        self.longest_s = max(self.longest_s, end["seconds"])
        self.ended_in_round.add(event.key)
        if event.key.endswith("/train") and 0 < number <= self.rounds:
            self.trained += 1
            self.trained_in_round += 1
        if end["outcome"] != "finished":
            self.failures.append(Failure(event.key, end["outcome"], end["reason"], event.time))

    def _evidence(self, event: Event) -> None:
        self.judged.append(int(event.key))

    def _round_closed(self, event: Event) -> None:
        self.round_is_closed, self.rounds_closed = True, self.rounds_closed + 1

    def _budget_spent(self, event: Event) -> None:
        self.spent = event.data["why"]

    def _campaign_closed(self, event: Event) -> None:
        self.closing = event.data

    @property
    def rounds(self) -> int:
        """Declared rounds; 0 before the campaign is opened."""
        return self.opened["plan"]["rounds"] if self.opened else 0

    @property
    def runs_left(self) -> int:
        """Trainings that are still planned in the declared rounds: at most, for a repeated candidate is not planned."""
        if self.opened is None or self.closing is not None or self.spent is not None:
            return 0
        a_round = self.opened["plan"]["runs_per_round"]
        unopened = self.rounds - self.round
        here = 0 if self.round_is_closed else max(0, a_round - self.trained_in_round)
        return unopened * a_round + here

    def seconds_left(self, running: float = 0.0) -> float | None:
        """Estimated active time to the end of the last round; `running` is what runs now, in whole runs.

        None before the first run was trained, and once all rounds are closed.
        """
        left = self.runs_left
        if not self.trained or not left:
            return None
        return self.active_s / self.trained * max(0.0, left - running)
