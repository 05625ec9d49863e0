"""The figures of the contest with real training: few campaigns, so Student's t over them, and every campaign in sight.

Methods of one campaign number share world, items and seeds, so what a method is worth against this policy is taken
number by number. Gains are true ones: fresh runs on items that no search saw.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_evolve.contest.protocol import METHODS, PRODUCT
from megatron_evolve.contest.table import VISIBLE, interval_text, markdown, visible

LEVEL = 0.95
Rows = Sequence[dict[str, Any]]


def figures(rows: Rows) -> list[dict[str, Any]]:
    """One entry a method, best first. Accuracy units: 0.01 is one point."""
    names = [name for name in METHODS if any(row["method"] == name for row in rows)]
    product = _by_campaign(rows, PRODUCT, "gain")
    return sorted((_of(rows, name, product) for name in names), key=lambda one: -one["gain"]["mean"])


def _of(rows: Rows, name: str, product: dict[int, float]) -> dict[str, Any]:
    mine = sorted((row for row in rows if row["method"] == name), key=lambda row: row["campaign"])
    gain = _by_campaign(rows, name, "gain")
    both = sorted(gain.keys() & product.keys())
    ratios = {
        cost: [row["gain"] / row[field] for row in mine if row[field]]
        for cost, field in (("gain_per_look", "looks"), ("gain_per_cpu_second", "cpu_seconds"))
    }
    return {
        "method": name,
        "campaigns": len(mine),
        "gain": interval(list(gain.values())),
        "against": None if name == PRODUCT or not both else interval([gain[one] - product[one] for one in both]),
        "dev_gain": interval([row["dev_gain"] for row in mine]),
        **{cost: interval(values) if values else None for cost, values in ratios.items()},
        **{cost: float(np.mean([row[cost] for row in mine])) for cost in ("runs", "failed", "looks", "cpu_seconds")},
        "by_campaign": [
            {
                "campaign": row["campaign"],
                "gain": row["gain"],
                "item_se": row["sealed"]["external"]["item_se"],
                "dev_gain": row["dev_gain"],
                "said": alarms(row["verdicts"]),
            }
            for row in mine
        ],
    }


def _by_campaign(rows: Rows, name: str, field: str) -> dict[int, float]:
    return {row["campaign"]: row[field] for row in rows if row["method"] == name}


def interval(values: Sequence[float]) -> dict[str, float]:
    """A mean over campaigns with Student's interval; without a second campaign it has no bounds."""
    from scipy.special import stdtrit

    middle, half = float(np.mean(values)), math.inf
    if len(values) > 1:
        t = float(stdtrit(len(values) - 1, (1 + LEVEL) / 2))
        half = t * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {"mean": middle, "low": middle - half, "high": middle + half}


def alarms(verdicts: Sequence[dict[str, Any]]) -> list[str]:
    """What a campaign's verdicts said beyond UNRESOLVED, in words, in order of round."""
    return [
        f"round {one['round']}: {one['outcome']} ({one['estimand']}, {one['domain']})"
        for one in verdicts
        if one["outcome"] != "UNRESOLVED"
    ]


# --- page ------------------------------------------------------------------------------------------------------------

HEADER = ("method", "campaigns", "external gain, pt", "against this policy, pt", "smallest visible, pt", "dev gain, pt")
HEADER += ("looks", "pt a look", "CPU-s", "pt per 1,000 CPU-s", "runs", "of them failed")


def page(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: the methods, every campaign of each, and what this policy's verdicts said."""
    numbers = sorted({row["campaign"] for one in found for row in one["by_campaign"]})
    parts = [
        markdown(HEADER, [_row(one) for one in found]),
        markdown(
            ("method", *(f"campaign {number}" for number in numbers)), [_campaigns(one, numbers) for one in found]
        ),
    ]
    spoken = [(one["method"], row) for one in found for row in one["by_campaign"] if row["said"]]
    lines = [f"- {name}, campaign {row['campaign']}: {'; '.join(row['said'])}" for name, row in spoken]
    return "\n\n".join([*parts, VISIBLE, *(["\n".join(lines)] if lines else [])]) + "\n"


def _row(one: dict[str, Any]) -> list[str]:
    return [
        one["method"],
        str(one["campaigns"]),
        interval_text(one["gain"], 100, 1),
        interval_text(one["against"], 100, 1),
        visible(one["against"]),
        interval_text(one["dev_gain"], 100, 1),
        f"{one['looks']:.0f}",
        interval_text(one["gain_per_look"], 100, 2),
        f"{one['cpu_seconds']:.0f}",
        interval_text(one["gain_per_cpu_second"], 1e5, 1),
        f"{one['runs']:.0f}",
        f"{one['failed']:.1f}",
    ]


def _campaigns(one: dict[str, Any], numbers: Sequence[int]) -> list[str]:
    told = {
        row["campaign"]: f"{100 * row['gain']:+.1f} ± {196 * row['item_se']:.1f} (dev {100 * row['dev_gain']:+.1f})"
        for row in one["by_campaign"]
    }
    return [one["method"], *(told.get(number, "-") for number in numbers)]
