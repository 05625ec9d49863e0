"""Verdicts over invented effects: outcomes follow from the bounds as the gap test says, the rest is made up."""

import math
import statistics
from collections.abc import Sequence

from megatron_evolve.evidence import CandidateEvidence
from megatron_evolve.verdict import Bounds, Verdict

LEVEL, QUANTILE, BETA0 = 0.0031, 2.75, 0.5

MeanAndError = tuple[float, float]


def verdicts_of(
    selected: CandidateEvidence, explorers: Sequence[CandidateEvidence], families: Sequence[str]
) -> list[Verdict]:
    """Two overall verdicts and one for each family."""
    told = [
        _verdict("selected", "overall", _pair([selected], None)),
        _verdict("mean", "overall", _pair(explorers, None)),
    ]
    return told + [_verdict("selected", family, _pair([selected], family)) for family in families]


def _pair(some: Sequence[CandidateEvidence], family: str | None) -> tuple[MeanAndError, MeanAndError] | None:
    dev = [one.domains[family].dev_effect if family else one.effects["dev-b"] for one in some]
    outside = [one.domains[family].external_effect if family else one.effects.get("external") for one in some]
    if None in outside:
        return None
    return tuple((statistics.fmean(one.mean for one in side), side[0].se / len(some) ** 0.5) for side in (dev, outside))


def _verdict(estimand: str, domain: str, pair: tuple[MeanAndError, MeanAndError] | None) -> Verdict:
    said = {"estimand": estimand, "domain": domain, "ranking_usable": False}
    if pair is None:
        return Verdict(**said, outcome="UNRESOLVED", alpha_spent=0.0, reason="No external target was asked.")
    d, t = pair
    g = (BETA0 * d[0] - t[0], math.hypot(BETA0 * d[1], t[1]))
    dev, outside, gap = (
        Bounds(mean=mean, se=se, low=mean - QUANTILE * se, high=mean + QUANTILE * se, level=LEVEL)
        for mean, se in (d, t, g)
    )
    outcome = "UNRESOLVED"
    if dev.low > 0:
        outcome = "DECOUPLED" if gap.low > 0 else "TRACKING" if gap.high < 0 else outcome
        outcome = "INVERSE" if outside.high < 0 else outcome
    return Verdict(
        **said,
        outcome=outcome,
        d_dev=dev,
        d_external=outside,
        gap=gap,
        transfer_slope=t[0] / d[0] if dev.low > 0 else None,
        df=21.5,
        alpha_spent=LEVEL,
        minimum_detectable_effect=0.052,
        reason=f"Dev changed by {100 * d[0]:+.1f} pt and the external target by {100 * t[0]:+.1f} pt.",
    )
