"""The argument of a round in plain sentences: what was searched, what was found and said, and what followed from it.

Everything told stands in the policy, the evidence and the edits; nothing is computed anew and nothing is judged here.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from megatron_evolve.evidence import CandidateEvidence, Evidence
from megatron_evolve.policy import Edit, SearchPolicy, struck
from megatron_evolve.reading import authoritative_split, external_effect, points, told_effect
from megatron_evolve.stance import OVERALL


def explain(
    policy: SearchPolicy,
    evidence: Evidence,
    following: SearchPolicy,
    edits: tuple[Edit, ...],
    axes: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> str:
    """The argument of a round in plain sentences: what was searched, found, said, and done about it.

    `axes` names the axes of candidates that several workers proposed; the evidence keeps the first one's.
    """
    waiting = len(policy.pending)
    lines = [
        f"Round {policy.round} searched in mode {policy.mode} for the {policy.objective} score, "
        f"from standing settings with {waiting or 'no'} change{'s' * (waiting > 1)} waiting.",
        *_told_candidates(evidence, axes),
        _told_visible(evidence),
        *_told_verdicts(evidence),
    ]
    reasons: dict[str, list[str]] = {}
    for edit in edits:
        if edit.path != "round" and not edit.path.startswith("domains."):
            reasons.setdefault(edit.reason, []).append(_told_edit(edit))
    lines += [f"Because: {_sentence(reason)} So: {'; '.join(changes)}." for reason, changes in reasons.items()]
    fallen = [text for text in following.premises if text.startswith(struck(""))]
    lines.append(f"Premises: {' '.join(fallen) if fallen else 'none is falsified.'}")
    lines.append(
        f"Round {following.round} searches in mode {following.mode} for the {following.objective} score along "
        f"{', '.join(axis.name for axis in following.open_axes())}."
    )
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return f"{text.rstrip('.')}."


# --- candidates ------------------------------------------------------------------------------------------------------


def _told_candidates(evidence: Evidence, axes: Mapping[str, Sequence[str]]) -> list[str]:
    explorers = [one for one in evidence.candidates if one.role == "explorer"]
    told = []
    for one in sorted(explorers, key=lambda one: one.axis):
        names = axes.get(one.id, (one.axis,))
        name = " and ".join(names) + " (one candidate)" * (len(names) > 1)
        if one.refused:
            told.append(_sentence(f"{name} had no candidate: {one.refused}"))
        elif effects := _told_effects(one, evidence.objective):
            told.append(f"{name} moved {effects}.")
        else:
            runs = ", ".join(sorted({run.outcome.replace("_", " ") for run in one.runs}))
            told.append(f"{name} has no score ({runs or 'no run'}).")
    return told or ["No explorer ran."]


def _told_effects(one: CandidateEvidence, objective: str) -> str:
    """The effect on each score, on the half that judges, and behind the objective's what may be claimed of it."""
    told, claims = [], ""
    for score in ("dev", "external"):
        split = authoritative_split(score, one.effects)
        if split is not None:
            joint = (", and " if claims else " and ") if told else ""
            claims = _claims(one, objective) if score == objective else ""
            told.append(f"{joint}{split} by {told_effect(one.effects[split])}{claims}")
    return "".join(told)


def _claims(one: CandidateEvidence, objective: str) -> str:
    gain = f", a gain on {objective} by Holm over the round's explorers at 5 %" * one.gain
    return ", confirmed by further seeds" * one.confirmed + gain + _veto(one, objective)


def _veto(one: CandidateEvidence, objective: str) -> str:
    """That the external score, by all its items that were asked, outranks a gain on dev (`reading.py`)."""
    outside, split = external_effect(one), authoritative_split(objective, one.effects)
    if objective != "dev" or outside is None or outside.high >= 0 or one.effects[split].mean <= 0:
        return ""
    fall = f"({points(outside.mean)} [{points(outside.low)}, {points(outside.high)}])"
    if one.gain:
        return f", which the whole external score {fall} vetoes"
    return f", while the whole external score fell {fall}"


def _told_visible(evidence: Evidence) -> str:
    """What the effects above are to be held against."""
    sizes = [f"{split} {100 * size:.1f} pt" for split, size in evidence.minimum_detectable_effect.items()]
    if not sizes:
        return "The smallest effect that it could see is unknown: nothing was compared."
    return f"The smallest effect of a candidate that it would see (80 % power, one-sided 5 %): {', '.join(sizes)}."


# --- verdicts --------------------------------------------------------------------------------------------------------


def told_verdicts(verdicts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The verdicts worth a line: every overall one, and every domain that is not unresolved."""
    return [one for one in verdicts if one["domain"] == OVERALL or one["outcome"] != "UNRESOLVED"]


def _told_verdicts(evidence: Evidence) -> list[str]:
    """A line for each that is worth one, with its reason, and one for all the others together."""
    shown = told_verdicts(evidence.verdicts)
    lines = [_told_verdict(verdict) for verdict in shown]
    others = [verdict for verdict in evidence.verdicts if verdict not in shown]
    if others:
        sizes = [size for one in others if (size := one.get("minimum_detectable_effect")) is not None]
        told = f"; at best one {_would_see(min(sizes))}, at worst {100 * max(sizes):.1f} pt" if sizes else ""
        lines.append(f"Verdicts for single domains that stayed UNRESOLVED: {len(others)}{told}.")
    return lines or ["No verdict was asked for."]


def _told_verdict(verdict: dict[str, Any]) -> str:
    about = f"Verdict for the {verdict['estimand']} estimand, {verdict['domain']}"
    said = f"{about}: {verdict['outcome']}. {verdict.get('reason', '')}".strip()
    size = verdict.get("minimum_detectable_effect")
    return said if size is None else f"{said} It {_would_see(size)}."


def _would_see(size: float) -> str:
    """The smallest dev gain of which a verdict would have told, with 80 % power, that nothing arrived outside."""
    return f"would see a dev gain of {100 * size:.1f} pt of which nothing arrives"


# --- edits -----------------------------------------------------------------------------------------------------------

# Of an entry of a policy: what stands in the sentence anyway, or helps a program alone.
UNSAID = ("reason", "evidence", "ground")


def _told_edit(edit: Edit) -> str:
    """What an edit put in place of what; a value that is a sentence itself is quoted, without its full stop."""
    before, after = _quoted(edit.before), _quoted(edit.after)
    if after:
        return f"{edit.path}{f', which read {before},' if before else ''} now reads {after}"
    if before:
        return f"{edit.path} no longer reads {before}"
    if edit.before is None and isinstance(edit.after, dict):
        return f"{edit.path} is new {_short(edit.after)}"
    return f"{edit.path} goes from {_short(edit.before)} to {_short(edit.after)}"


def _quoted(value: object) -> str:
    return f'"{value.rstrip(".")}"' if isinstance(value, str) and " " in value and value.endswith(".") else ""


def _is_void(value: object) -> bool:
    return value is None or value is False or value == "" or value == [] or value == {}


def _short(value: object) -> str:
    """A value of the policy in words."""
    if _is_void(value):
        return "nothing"
    if isinstance(value, dict):
        if value.keys() == {"from", "to"}:
            return f"from {_short(value['from'])} to {_short(value['to'])}"
        told = [name for name, inner in value.items() if name not in UNSAID and not _is_void(inner)]
        return f"({', '.join(f'{name} {_short(value[name])}' for name in told)})"
    if isinstance(value, list | tuple):
        return " and ".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
