"""Wording: changes, values, verdicts and cited evidence, each in a few words."""

import json
import math
from typing import Any

from megatron_evolve.evidence import EffectValue
from megatron_evolve.policy import resolve_pointer
from megatron_evolve.report.figures import NOTHING, accuracy, points, probability
from megatron_evolve.report.markup import Markup, join, tag
from megatron_evolve.stance import ALARMS

OVERALL = "overall"
SHARES = "mix.weight."
SHOWN_SHARES = 2
LONGEST = 72

# Outcome to the mark that stands beside the word: none is told by colour alone.
MARKS = {"TRACKING": "✓", "DECOUPLED": "▲", "INVERSE": "▼", "UNRESOLVED": "?"}


def words(name: str) -> str:
    """A name out of the code, as words."""
    return name.replace("_", " ").replace("-", " ")


def shown(value: Any) -> str:
    """A setting's value, short."""
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, dict):
        if named := value.get("name") or value.get("axis"):  # an axis, a dead end, a waiting change
            return str(named)
        return ", ".join(f"{key} {shown(one)}" for key, one in value.items())
    return " + ".join(shown(one) for one in value)


def path_words(path: str) -> Markup:
    """A dotted path that may break after its dots and underscores."""
    parts = path.replace(".", ".\n").replace("_", "_\n").split("\n")
    return tag("span", join(parts, Markup("<wbr>")), class_="path")


def clipped(value: str, longest: int = LONGEST) -> str:
    """Text cut at `longest` characters."""
    return value if len(value) <= longest else value[: longest - 1] + "…"


def change_words(change: dict[str, Any]) -> Markup:
    """A canonical change, setting by setting. Shares of the mix sum to one, so only those that moved most are named."""
    if not change:
        return tag("span", "as it stands", class_="none")
    shares = sorted((path for path in change if path.startswith(SHARES)), key=lambda path: -_moved(change[path]))
    named = [path for path in change if path not in shares] + shares[:SHOWN_SHARES]
    parts = [tag("li", _one_change(path, change[path])) for path in named]
    if rest := shares[SHOWN_SHARES:]:
        whole = "; ".join(f"{path} {shown(change[path]['from'])} to {shown(change[path]['to'])}" for path in rest)
        parts.append(tag("li", f"{len(rest)} other shares follow", title=whole, class_="muted"))
    return tag("ul", *parts, class_="changes")


def _moved(both: dict[str, Any]) -> float:
    before, after = both["from"], both["to"]
    return abs(math.log(after / before)) if before and after else math.inf


def _one_change(path: str, both: dict[str, Any]) -> Markup:
    name = path.removeprefix("mix.").removeprefix("recipe.")
    return join([path_words(name), " ", shown(both["from"]), " → ", tag("b", shown(both["to"]))])


def effect_words(effect: EffectValue | None) -> Markup:
    """An effect in points with its 95 % interval and P(better); bold where the interval leaves zero out."""
    if effect is None:
        return NOTHING
    clear = effect.low > 0 or effect.high < 0
    mean = tag("b" if clear else "span", points(effect.mean))
    reach = tag("span", f" [{points(effect.low)}, {points(effect.high)}]", class_="range")
    return join(
        [
            tag("span", mean, reach, class_="effect"),
            " ",
            tag("span", f"P(better) {probability(effect.p_better)}", class_="count"),
        ]
    )


def outcome_badge(outcome: str) -> Markup:
    """A verdict's outcome with its mark."""
    kind = "alarm" if outcome in ALARMS else outcome.lower()
    return tag("span", f"{MARKS.get(outcome, '·')} {outcome}", class_=f"badge {kind}")


def ending_badge(outcome: str) -> Markup:
    """How a run ended, if not well."""
    return tag("span", f"✕ {words(outcome)}", class_="badge ended")


def scope_words(verdict: dict[str, Any]) -> str:
    """What a verdict is about."""
    where = "overall" if verdict["domain"] == OVERALL else f"in {words(verdict['domain'])}"
    return f"{verdict['estimand']}, {where}"


def cited_words(document: Any, pointer: str) -> str:
    """The value that a pointer into the evidence cites, in a few words."""
    try:
        value = resolve_pointer(document, pointer)
    except ValueError:
        return "does not resolve"
    if not isinstance(value, dict):
        return f"{len(value)} entries" if isinstance(value, list) else clipped(shown(value))
    if "p_better" in value:
        low, high = points(value["low"]), points(value["high"])
        return f"{points(value['mean'])} pt [{low}, {high}], P(better) {probability(value['p_better'])}"
    if "outcome" in value and "estimand" in value:
        return f"{value['outcome']}, {scope_words(value)}"
    if {"mean", "se", "n"} <= value.keys():
        return f"{accuracy(value['mean'])} ± {accuracy(value['se'])} of {value['n']:,}"
    told = {key: one for key, one in value.items() if not isinstance(one, dict | list) and one not in (None, "")}
    return clipped(shown(told) if told else json.dumps(value))
