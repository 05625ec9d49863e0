"""The result of a grid: what its campaigns said, held against the truth, as numbers and as a page.

Rates carry Wilson's interval. Differences carry Student's over campaigns, none where there is only one. Everything is
printed, whatever comes out.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Self

from pydantic import Field

from megatron_evolve.eval.paired import wilson
from megatron_evolve.reading import smallest_visible
from megatron_evolve.substrate.frozen import Frozen
from megatron_evolve.verdict import OVERALL
from megatron_evolve.worlds.truth import TRUTH_ALPHA, TrueEffect

EVERYWHERE = "all worlds"


class Alarm(Frozen):
    """A verdict that dev and the external target parted."""

    round: int
    estimand: str
    scope: str
    outcome: str
    attributed_to: tuple[str, ...] = Field(
        default=(), description="families that make up its dev gain, where the target names none; no test of them"
    )


class CampaignResult(Frozen):
    """One closed campaign, what it said and what is true."""

    schema_: str = Field(default="world-result/1", alias="schema")
    world: str
    campaign: str
    seed: int
    decisions: str = Field(description="digest of the code that decided")
    cpu_seconds: float
    alarms: tuple[Alarm, ...]
    truth: tuple[TrueEffect, ...]
    maximiser_round: int = Field(description="round that tried what the maximiser of dev keeps")
    sealed: dict[str, Any] = Field(description="standing settings against the maximiser's")

    @property
    def named(self) -> frozenset[str]:
        """Scopes that some verdict said had parted."""
        return frozenset(alarm.scope for alarm in self.alarms)

    @property
    def apart(self) -> frozenset[str]:
        """Scopes that truly parted."""
        return frozenset(one.scope for one in self.truth if one.apart)

    @property
    def detected_in(self) -> int | None:
        """First round that named a scope which truly parted."""
        return min((alarm.round for alarm in self.alarms if alarm.scope in self.apart), default=None)

    @property
    def difference(self) -> float | None:
        """Sealed score of the standing settings minus the maximiser's."""
        return self.sealed["difference"]["mean"] if self.sealed["difference"] else None


class Rate(Frozen):
    """A share of something counted, with its 95 % interval; no number where there was nothing to count."""

    count: int
    of: int
    low: float | None
    high: float | None

    @classmethod
    def over(cls, outcomes: Iterable[bool]) -> Self:
        seen = list(outcomes)
        if not seen:
            return cls(count=0, of=0, low=None, high=None)
        low, high = wilson(sum(seen) / len(seen), len(seen))
        return cls(count=sum(seen), of=len(seen), low=low, high=high)

    def __str__(self) -> str:
        if not self.of:
            return "none to count"
        return f"{self.count} of {self.of} [{self.low:.2f}, {self.high:.2f}]"


class Mean(Frozen):
    """A mean over campaigns with its 95 % interval by Student's t; no interval for fewer than two."""

    mean: float | None
    low: float | None
    high: float | None
    n: int

    @classmethod
    def over(cls, values: Sequence[float]) -> Self:
        if not values:
            return cls(mean=None, low=None, high=None, n=0)
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean=mean, low=None, high=None, n=1)
        from scipy.special import stdtrit

        half = float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
        return cls(mean=mean, low=mean - half, high=mean + half, n=len(values))

    @property
    def visible(self) -> str:
        """Half the interval's width in points: any smaller mean leaves zero in."""
        return f"{50 * (self.high - self.low):.1f}" if self.low is not None and self.high > self.low else "-"

    def __str__(self) -> str:
        if self.mean is None:
            return "none to count"
        interval = "no interval from one" if self.low is None else f"{100 * self.low:+.1f}, {100 * self.high:+.1f}"
        return f"{100 * self.mean:+.1f} [{interval}]"


class WorldSummary(Frozen):
    """One world's campaigns together."""

    world: str
    campaigns: int
    apart_overall: Rate = Field(description="campaigns in which dev as a whole truly parted")
    named: Rate = Field(description="(campaign, family) pairs that truly parted, and of them those named")
    named_overall: Rate = Field(description="campaigns where the whole truly parted, and of them those that said so")
    wrong_names: Rate = Field(description="campaigns that named a family, or dev as a whole, which did not truly part")
    false_alarms: Rate = Field(description="campaigns in which nothing truly parted, and of them those that alarmed")
    rounds_to_detect: tuple[int | None, ...] = Field(
        description="by campaign in which something truly parted: first round that named such a scope; none: never"
    )
    advantage: Mean = Field(description="sealed score of the standing settings minus the dev-maximiser's")
    price: Mean = Field(description="the maximiser's minus the standing one's, where nothing truly parted")

    @property
    def visible(self) -> str:
        """The smallest advantage that so many campaigns can see."""
        return self.advantage.visible


def summary_of(name: str, results: Sequence[CampaignResult]) -> WorldSummary:
    """The figures of some campaigns."""
    families = [(one, scope) for one in results for scope in sorted(one.apart) if scope != OVERALL]
    unshifted = [one for one in results if not one.apart]
    return WorldSummary(
        world=name,
        campaigns=len(results),
        apart_overall=Rate.over(OVERALL in one.apart for one in results),
        named=Rate.over(scope in one.named for one, scope in families),
        named_overall=Rate.over(OVERALL in one.named for one in results if OVERALL in one.apart),
        wrong_names=Rate.over(bool(one.named - one.apart) for one in results),
        false_alarms=Rate.over(bool(one.alarms) for one in unshifted),
        rounds_to_detect=tuple(one.detected_in for one in results if one.apart),
        advantage=Mean.over([one.difference for one in results if one.difference is not None]),
        price=Mean.over([-one.difference for one in unshifted if one.difference is not None]),
    )


def summaries(names: Sequence[str], results: Sequence[CampaignResult]) -> list[WorldSummary]:
    """Every world that has a finished campaign, in order, then all of them together."""
    by_world = {name: [one for one in results if one.world == name] for name in names}
    found = [summary_of(name, mine) for name, mine in by_world.items() if mine]
    return [*found, summary_of(EVERYWHERE, results)] if len(found) > 1 else found


# --- the page ---------------------------------------------------------------------------------------------------------

HOW_TO_READ = """\
Every row is real training: campaigns of {rounds} rounds on the base campaign `{base}`; {finished} of {planned} are
finished and took {cpu_hours:.1f} CPU-hours, origin and truth not counted. Seeds are hashes of the code ({code}), the
world's name and the campaign's number.

Truth is a fresh scoring, not the planted label: after each campaign all anchor runs and the first run of every explorer
answered about {dev:,} dev and {external:,} external items that no campaign saw. A family, or dev as a whole, *parted*
if for a judged estimand in some round the dev gain is above zero and less than the constitution's share of it arrived
outside, or the two moved against each other, beyond the items' noise at {alpha:.0%} per campaign. Brackets are 95 %
intervals: Wilson's for rates, Student's over campaigns for differences, which are in points.

- *families named*: of the (campaign, family) pairs that parted, those a verdict named.
- *wrong names*: campaigns that named a family, or dev as a whole, which had not parted.
- *false alarms*: of the campaigns in which nothing parted, those that raised any alarm.
- *first named*: round of the first right alarm, by campaign in which something parted.
- *advantage*: on the sealed items, standing settings minus those with the best dev-A score among all that the campaign
  tried, fresh runs on both sides.
- *smallest visible*: half the width of the advantage's brackets, since any smaller one leaves zero in; of a rate it is
  half of its own brackets. A dash: one campaign alone, or the same settings on both sides in all.
- *price*: the same with the other sign, where nothing parted: what it costs to be vigilant for nothing.
"""
COLUMNS = {
    "world": "world",
    "campaigns": "campaigns",
    "apart_overall": "dev as a whole parted",
    "named_overall": "and was named",
    "named": "families named",
    "wrong_names": "wrong names",
    "false_alarms": "false alarms",
    "rounds_to_detect": "first named",
    "advantage": "advantage, pt",
    "visible": "smallest visible, pt",
    "price": "price, pt",
}


def document_of(facts: dict[str, Any], names: Sequence[str], results: Sequence[CampaignResult]) -> dict[str, Any]:
    """The result as numbers, with its page as `table`. `facts` say what was run, `names` the worlds in order."""
    found = summaries(names, results)
    facts = {**facts, "alpha": TRUTH_ALPHA, "cpu_hours": sum(one.cpu_seconds for one in results) / 3600}
    return {
        "schema": "worlds-result/1",
        **facts,
        "worlds": [one.model_dump(mode="json") for one in found],
        "campaigns": [one.model_dump(mode="json", by_alias=True) for one in results],
        "table": page(facts, found, results),
    }


def page(facts: dict[str, Any], found: Sequence[WorldSummary], results: Sequence[CampaignResult]) -> str:
    """The result as Markdown. `facts` fill in how to read it."""
    rows = [[_cell(getattr(one, name)) for name in COLUMNS] for one in found]
    parts = ["# Worlds", HOW_TO_READ.format(**facts), _markdown(list(COLUMNS.values()), rows)]
    parts += ["## Campaigns", CAMPAIGNS_TO_READ]
    parts.append(_markdown(list(CAMPAIGN_COLUMNS), [_campaign_row(one) for one in results]))
    told = [one.campaign for one in results if {effect.scope for effect in one.truth} == {OVERALL}]
    if told:
        parts.append(
            f"The target tells scores alone in {', '.join(told)}: what is said and true there is of dev as a whole; "
            "families beside an alarm are those that made up its dev gain."
        )
    versions = sorted({one.decisions[:8] for one in results})
    if len(versions) > 1:
        parts.append(f"These campaigns were run by {len(versions)} versions of the code: {', '.join(versions)}.")
    return "\n\n".join(part.strip() for part in parts) + "\n"


CAMPAIGNS_TO_READ = """\
*Smallest visible G* is the gap that the scoring of truth would have called a parting with 80 % power, at its share of
the level: of dev as a whole, and of a family (medians over rounds, estimands and families). *±* is the 95 % interval of
the sealed items.
"""
CAMPAIGN_COLUMNS = ("campaign", "seed", "truly parted (G in points)", "smallest visible G, pt", "said", "standing")
CAMPAIGN_COLUMNS += ("maximiser", "advantage, pt")


def _campaign_row(one: CampaignResult) -> list[str]:
    largest: dict[str, TrueEffect] = {}
    for effect in one.truth:
        if effect.apart and (effect.scope not in largest or effect.g.mean > largest[effect.scope].g.mean):
            largest[effect.scope] = effect
    parted = [f"{scope} {100 * effect.g.mean:+.1f}" for scope, effect in sorted(largest.items())]
    said = dict.fromkeys(_said(alarm) for alarm in one.alarms)
    accuracy = one.sealed["accuracy"]
    scores = [f"{accuracy[side]:.3f}" if side in accuracy else "-" for side in ("standing", "maximiser")]
    difference = "-"
    if one.difference is not None:
        difference = f"{100 * one.difference:+.1f} ± {196 * one.sealed['difference']['item_se']:.1f}"
    if one.sealed["same"]:
        difference = "+0.0 (same settings)"
    told = one.sealed["reason"] or difference
    names = [", ".join(parted) or "nothing", _visible(one.truth), ", ".join(said) or "nothing"]
    return [one.campaign, str(one.seed), *names, *scores, told]


def _visible(truth: Sequence[TrueEffect]) -> str:
    """The closed form of every verdict, of the bounds that truth was told by."""
    told = []
    for name, whole in (("overall", True), ("a family", False)):
        gaps = [effect.g for effect in truth if (effect.scope == OVERALL) == whole]
        if gaps:
            size = statistics.median(smallest_visible(gap.low, gap.high, gap.se, gap.level) for gap in gaps)
            told.append(f"{name} {100 * size:.1f}")
    return ", ".join(told) or "-"


def _said(alarm: Alarm) -> str:
    by = f", by {' and '.join(alarm.attributed_to)}" if alarm.attributed_to else ""
    return f"{alarm.scope} ({alarm.outcome}, round {alarm.round}{by})"


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join("never" if one is None else str(one) for one in value) or "-"
    return str(value)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
