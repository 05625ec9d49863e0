"""The argument of a round in plain sentences: what was searched, what was found and said, and what followed from it.

Everything told stands in the policy, the evidence and the edits; nothing is computed anew and nothing is judged here.
"""

from typing import Any

from megatron_evolve.evidence import Evidence
from megatron_evolve.policy import Edit, SearchPolicy, struck
from megatron_evolve.reading import authoritative_split, told_effect

CLAIM = ", a gain by Holm over the round's explorers at 5 %"


def explain(policy: SearchPolicy, evidence: Evidence, following: SearchPolicy, edits: tuple[Edit, ...]) -> str:
    """The argument of a round in plain sentences: what was searched, found, said, and done about it."""
    lines = [
        f"Round {policy.round} searched in mode {policy.mode} for the {policy.objective} score, "
        f"from standing settings with {len(policy.pending)} change(s) waiting.",
        *_told_candidates(evidence),
        _told_visible(evidence),
        *_told_verdicts(evidence),
    ]
    reasons: dict[str, list[str]] = {}
    for edit in edits:
        if edit.path != "round" and not edit.path.startswith("domains."):
            reasons.setdefault(edit.reason, []).append(
                f"{edit.path} from {_short(edit.before)} to {_short(edit.after)}"
            )
    lines += [f"Because: {reason} So: {'; '.join(changes)}." for reason, changes in reasons.items()]
    fallen = [text for text in following.premises if text.startswith(struck(""))]
    lines.append(f"Premises: {' '.join(fallen) if fallen else 'none is falsified.'}")
    lines.append(
        f"Round {following.round} searches in mode {following.mode} for the {following.objective} score along "
        f"{', '.join(axis.name for axis in following.open_axes())}."
    )
    return "\n".join(lines)


def _told_candidates(evidence: Evidence) -> list[str]:
    explorers = [one for one in evidence.candidates if one.role == "explorer"]
    told = []
    for one in sorted(explorers, key=lambda one: one.axis):
        splits = [authoritative_split(objective, one.effects) for objective in ("dev", "external")]
        effects = " and ".join(f"{split} by {told_effect(one.effects[split])}" for split in splits if split)
        runs = ", ".join(sorted({run.outcome.replace("_", " ") for run in one.runs}))
        if one.refused:
            told.append(f"{one.axis} had no candidate: {one.refused.rstrip('.')}.")
        elif effects:
            told.append(
                f"{one.axis} moved {effects}{', confirmed by further seeds' * one.confirmed}{CLAIM * one.gain}."
            )
        else:
            told.append(f"{one.axis} has no score ({runs or 'no run'}).")
    return told or ["No explorer ran."]


def _told_visible(evidence: Evidence) -> str:
    """What the effects above are to be held against."""
    sizes = [f"{split} {100 * size:.1f} pt" for split, size in evidence.minimum_detectable_effect.items()]
    if not sizes:
        return "The smallest effect that it could see is unknown: nothing was compared."
    return f"The smallest effect of a candidate that it would see (80 % power, one-sided 5 %): {', '.join(sizes)}."


def _told_verdicts(evidence: Evidence) -> list[str]:
    resolved = [verdict for verdict in evidence.verdicts if verdict["outcome"] != "UNRESOLVED"]
    if not resolved:
        sizes = [size for one in evidence.verdicts if (size := one.get("minimum_detectable_effect")) is not None]
        told = f"; at best {_would_see(min(sizes))}, at worst one of {100 * max(sizes):.1f} pt" if sizes else ""
        return [f"No verdict was resolved{told}."]
    return [_told_verdict(verdict) for verdict in resolved]


def _told_verdict(verdict: dict[str, Any]) -> str:
    about = f"Verdict for the {verdict['estimand']} estimand, {verdict.get('domain') or 'overall'}"
    said = f"{about}: {verdict['outcome']}. {verdict.get('reason', '')}".strip()
    size = verdict.get("minimum_detectable_effect")
    return said if size is None else f"{said} {_would_see(size).capitalize()}."


def _would_see(size: float) -> str:
    """The smallest dev gain of which a verdict would have told, with 80 % power, that nothing arrived outside."""
    return f"it would see a dev gain of {100 * size:.1f} pt of which nothing arrives"


# Of an entry of a policy: what stands in the sentence anyway, or helps a program alone.
UNSAID = ("reason", "evidence", "ground")


def _short(value: object) -> str:
    """A value of the policy in words: what an edit put in place of what."""
    if value is None or value == "" or value == [] or value == {}:
        return "nothing"
    if isinstance(value, dict):
        known = {name: inner for name, inner in value.items() if name not in UNSAID and inner not in (None, "", [], {})}
        return " ".join(f"{name} {_short(inner)}" for name, inner in known.items())
    if isinstance(value, list | tuple):
        return "(" + "; ".join(map(_short, value)) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)
