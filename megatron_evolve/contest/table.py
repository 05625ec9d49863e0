"""The contest's figures: what each method reached on the sealed half, by look and by CPU-second, with intervals.

A surface is a cluster: its two campaigns are averaged first, and every interval is over surfaces (normal, 95 %). What a
method is worth against this policy is taken surface by surface. `spread` is the standard deviation between the two
campaigns on one surface, which is chance alone.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from megatron_evolve.contest.protocol import METHODS, PRODUCT
from megatron_evolve.contest.surface import KINDS

Z = 1.96
Rows = Sequence[dict[str, Any]]


def figures(rows: Rows) -> list[dict[str, Any]]:
    """One entry a method, best first. Accuracy units: 0.01 is one point."""
    names = [name for name in METHODS if any(row["method"] == name for row in rows)]
    product = [row for row in rows if row["method"] == PRODUCT]
    found = [_of([row for row in rows if row["method"] == name], name, product) for name in names]
    return sorted(found, key=lambda one: -one["gain"]["mean"])


def _of(mine: Rows, name: str, product: Rows) -> dict[str, Any]:
    gain, its_gain = (_by_surface(rows, "gain") for rows in (mine, product))
    shared = sorted(gain.keys() & its_gain.keys())
    against = np.array([gain[place] - its_gain[place] for place in shared])
    return {
        "method": name,
        "campaigns": len(mine),
        "surfaces": len(gain),
        "gain": interval(np.array(list(gain.values()))),
        "against": None if name == PRODUCT or len(shared) < 2 else interval(against),
        "again": interval(np.array(list(_by_surface(mine, "again").values()))),
        "dev_gain": interval(np.array(list(_by_surface(mine, "dev_gain").values()))),
        "spread": _spread(mine),
        "by_kind": {
            kind: interval(np.array(values))
            for kind in KINDS
            if len(values := list(_by_surface([row for row in mine if row["kind"] == kind], "gain").values())) > 1
        },
        "runs": float(np.mean([row["runs"] for row in mine])),
        "looks": float(np.mean([row["looks"] for row in mine])),
        "cpu_seconds": float(np.mean([row["cpu_seconds"] for row in mine])),
        "gain_per_look": _ratio(mine, "looks"),
        "gain_per_cpu_second": _ratio(mine, "cpu_seconds"),
        "rate_against": None if name == PRODUCT else _rate_against(mine, product, shared),
    }


def _by_surface(rows: Rows, field: str) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row["surface"], []).append(row[field])
    return {surface: float(np.mean(values)) for surface, values in found.items()}


def interval(values: np.ndarray) -> dict[str, float]:
    """A mean over surfaces with its normal interval."""
    middle = float(values.mean())
    half = Z * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return {"mean": middle, "low": middle - half, "high": middle + half}


def _spread(mine: Rows) -> float | None:
    """Standard deviation between campaigns of one surface; none where no surface has two."""
    twins: dict[int, list[float]] = {}
    for row in mine:
        twins.setdefault(row["surface"], []).append(row["gain"])
    squares = [(pair[0] - pair[1]) ** 2 / 2 for pair in twins.values() if len(pair) == 2]
    return math.sqrt(float(np.mean(squares))) if squares else None


def _ratio(mine: Rows, cost: str) -> dict[str, float] | None:
    """Gain over cost, both summed over all campaigns, with the delta method's interval over surfaces; none if free."""
    return _with_interval(*_linear(mine, cost, sorted({row["surface"] for row in mine})))


def _rate_against(mine: Rows, product: Rows, shared: Sequence[int]) -> dict[str, float] | None:
    """Gain per CPU-second minus this policy's, surface by surface; none where they share fewer than two."""
    (ours, spread), (theirs, its_spread) = (_linear(rows, "cpu_seconds", shared) for rows in (mine, product))
    return _with_interval(ours - theirs, spread - its_spread)


def _linear(rows: Rows, cost: str, surfaces: Sequence[int]) -> tuple[float, np.ndarray]:
    """Ratio of the sums of gain and cost over these surfaces, and what each surface adds to its error; nan if free."""
    gains, costs = (
        np.array([sum(row[field] for row in rows if row["surface"] == place) for place in surfaces], dtype=float)
        for field in ("gain", cost)
    )
    if not costs.sum():
        return math.nan, np.zeros(len(surfaces))
    ratio = float(gains.sum() / costs.sum())
    return ratio, (gains - ratio * costs) / costs.mean()


def _with_interval(middle: float, parts: np.ndarray) -> dict[str, float] | None:
    if math.isnan(middle) or len(parts) < 2:
        return None
    half = Z * float(parts.std(ddof=1)) / math.sqrt(len(parts))
    return {"mean": middle, "low": middle - half, "high": middle + half}


# --- pages -----------------------------------------------------------------------------------------------------------

HEADER = ("method", "external gain, pt", "against this policy, pt", "smallest visible, pt", "trained again, pt")
HEADER += ("dev gain, pt", "spread, pt", "runs", "looks", "pt a look", "CPU-s", "pt per 1,000 CPU-s")
HEADER += ("that against this policy",)
VISIBLE = "*Smallest visible* is half the width of the interval against this policy: any smaller one leaves zero in."


def page(found: Sequence[dict[str, Any]]) -> str:
    """Two Markdown tables: all methods, and what each reached on each kind of surface."""
    kinds = [kind for kind in KINDS if any(kind in one["by_kind"] for one in found)]
    first = markdown(HEADER, [_row(one) for one in found])
    by_kind = [[one["method"], *(interval_text(one["by_kind"].get(kind), 100, 1) for kind in kinds)] for one in found]
    widths = [one["by_kind"][kind] for one in found for kind in kinds if kind in one["by_kind"]]
    halves = sorted(50 * (one["high"] - one["low"]) for one in widths)
    of_kinds = f"\nOf a gain on one kind of surface it is {halves[0]:.1f} to {halves[-1]:.1f} pt." if halves else ""
    return f"{first}\n\n{markdown(('method', *kinds), by_kind)}\n\n{VISIBLE}{of_kinds}\n"


def _row(one: dict[str, Any]) -> list[str]:
    return [
        one["method"],
        interval_text(one["gain"], 100, 1),
        interval_text(one["against"], 100, 1),
        visible(one["against"]),
        f"{100 * one['again']['mean']:+.1f}",
        f"{100 * one['dev_gain']['mean']:+.1f}",
        "-" if one["spread"] is None else f"{100 * one['spread']:.1f}",
        f"{one['runs']:.1f}",
        f"{one['looks']:.0f}",
        interval_text(one["gain_per_look"], 100, 2),
        f"{one['cpu_seconds']:.0f}",
        interval_text(one["gain_per_cpu_second"], 1e5, 1),
        interval_text(one["rate_against"], 1e5, 1),
    ]


def interval_text(found: dict[str, float] | None, factor: float, digits: int) -> str:
    """A mean with its bounds, in points or what `factor` makes of them; a dash for none."""
    if found is None:
        return "-"
    mean, low, high = (f"{factor * found[name]:+.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def visible(found: dict[str, float] | None) -> str:
    """Half the width of an interval, in points; a dash where it has no bounds."""
    half = math.inf if found is None else 50 * (found["high"] - found["low"])
    return f"{half:.1f}" if math.isfinite(half) else "-"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(found: Sequence[dict[str, Any]]) -> str:
    """The gains with their intervals as one SVG file."""
    left, width, step, top = 190, 520, 26, 40
    high = max(one["gain"]["high"] for one in found)
    low = min(0.0, *(one["gain"]["low"] for one in found))
    at = lambda value: round(left + width * (value - low) / (high - low), 1)  # noqa: E731
    height = top + step * len(found) + 40
    marks = [
        f'<line x1="{at(tick / 100)}" x2="{at(tick / 100)}" y1="{top - 8}" y2="{height - 36}" stroke="#ddd"/>'
        f'<text x="{at(tick / 100)}" y="{height - 20}" text-anchor="middle">{tick:+d}</text>'
        for tick in range(math.ceil(100 * low / 5) * 5, math.floor(100 * high) + 1, 5)
    ]
    for place, one in enumerate(found):
        y, gain = top + step * place, one["gain"]
        colour = "#76b900" if one["method"] == PRODUCT else "#555"
        marks.append(
            f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(one["method"])}</text>'
            f'<line x1="{at(gain["low"])}" x2="{at(gain["high"])}" y1="{y}" y2="{y}" stroke="{colour}" '
            f'stroke-width="2"/><circle cx="{at(gain["mean"])}" cy="{y}" r="4" fill="{colour}"/>'
        )
    title = "External gain on the sealed half over the origin, points, with 95 % intervals over surfaces"
    body = "\n".join(marks)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 30}" height="{height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13">\n<title>{title}</title>\n'
        f'<rect width="100%" height="100%" fill="white"/>\n<text x="12" y="18">{title}</text>\n{body}\n</svg>\n'
    )
