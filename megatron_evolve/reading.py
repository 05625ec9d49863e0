"""What a round says of one candidate, read on the score that counts: the kind of its result and where it stands.

The authoritative split is the B half of the objective, since the A half selected, and further seeds confirm on the
same half: where a round moves the objective, those that agreed on the score it left say nothing here. A dev gain whose
external effect is clearly negative is no gain: the external score outranks dev.

    gain      P(better) reaches the constitution's bar on the authoritative split, and further seeds alone agree
    promising the same without further seeds: worth trying again
    flat      scored, and neither gain nor loss could be told
    loss      P(worse) reaches the same bar, or the external score vetoes a dev gain
    failed    no run was scored, and the fault was the candidate's own
    refused   the worker ended without a candidate that could run
    unscored  nothing can be said (lost, crashed, or the score was not asked)
"""

from dataclasses import dataclass
from typing import Literal

from megatron_evolve.constitution import Constitution
from megatron_evolve.eval.power import Bound
from megatron_evolve.evidence import CandidateEvidence, EffectValue, Evidence

Kind = Literal["gain", "promising", "flat", "loss", "failed", "refused", "unscored"]

# How a run ends that failed by what was proposed, not by where it ran.
OWN_FAULT = ("diverged", "out_of_memory")


@dataclass(frozen=True)
class Reading:
    """One explorer's result. `pointers` name the evidence it rests on."""

    candidate: CandidateEvidence
    kind: Kind
    effect: EffectValue | None
    selecting: float | None
    sentence: str
    pointers: tuple[str, ...]

    @property
    def rank(self) -> tuple:
        """Sort key, best first: the A half ranks, the B half breaks ties, then names that know no domain."""
        a_half = self.selecting if self.selecting is not None else -1.0
        return -a_half, -(self.effect.mean if self.effect else -1.0), self.candidate.axis, len(self.candidate.change)


def pointer(*parts: str | int) -> str:
    """The RFC 6901 JSON pointer of these keys."""
    return "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in parts)


def points(value: float) -> str:
    """An accuracy difference in points."""
    return f"{100 * value:+.1f} pt"


def told_effect(effect: EffectValue) -> str:
    """An effect with its interval and its probability, for a sentence."""
    return f"{points(effect.mean)} [{points(effect.low)}, {points(effect.high)}], P(better) {effect.p_better:.2f}"


def smallest_visible(low: float, high: float, se: float, level: float) -> float:
    """The true effect that an interval leaves zero out of with 80 % power; `level` is each bound's, one-sided."""
    return Bound((high - low) / 2, se, level).visible()


def authoritative_split(objective: str, effects: dict[str, EffectValue]) -> str | None:
    """The split that judges: the objective's B half; the whole of an external score that has no halves."""
    halves = {"dev": ("dev-b",), "external": ("external-b", "external")}[objective]
    return next((split for split in halves if split in effects), None)


def readings(evidence: Evidence, objective: str, constitution: Constitution) -> tuple[Reading, ...]:
    """The reading of every explorer of the round on `objective`, in the evidence's order."""
    confirmation = "confirmed" if objective == evidence.objective else "confirmed_off_objective"
    return tuple(
        _reading(index, one, objective, constitution, confirmation)
        for index, one in enumerate(evidence.candidates)
        if one.role == "explorer"
    )


def _reading(
    index: int, one: CandidateEvidence, objective: str, constitution: Constitution, confirmation: str
) -> Reading:
    here = pointer("candidates", index)
    split = authoritative_split(objective, one.effects)
    if split is None:
        return _without_score(here, one)
    effect = one.effects[split]
    kind, extra = _kind(one, effect, objective, constitution.promote_probability, getattr(one, confirmation))
    selecting = one.effects.get(split.removesuffix("-b") + "-a")
    sentence = f"{one.axis} moved {split} by {told_effect(effect)}{extra}"
    cited = (f"{here}/effects/{split}", f"{here}/{confirmation}")
    return Reading(one, kind, effect, selecting.mean if selecting else None, sentence, cited + _veto_pointer(here, one))


def _kind(one: CandidateEvidence, effect: EffectValue, objective: str, bar: float, confirmed: bool) -> tuple[Kind, str]:
    veto = external_effect(one) if objective == "dev" else None
    if effect.p_better >= bar and veto is not None and veto.high < 0:
        return "loss", f", but the external score fell by at least {points(-veto.high).lstrip('+')}"
    if effect.p_better >= bar:
        return (
            ("gain", ", and further seeds alone agree")
            if confirmed
            else ("promising", ", which no further seed confirms")
        )
    return ("loss" if effect.p_better <= 1 - bar or effect.high < 0 else "flat"), ""


def external_effect(one: CandidateEvidence) -> EffectValue | None:
    """A candidate's effect on the external score, from as many items as were asked."""
    return one.effects.get("external") or one.effects.get("external-b")


def _veto_pointer(here: str, one: CandidateEvidence) -> tuple[str, ...]:
    split = next((name for name in ("external", "external-b") if name in one.effects), None)
    return (f"{here}/effects/{split}",) if split else ()


def _without_score(here: str, one: CandidateEvidence) -> Reading:
    if one.refused:
        return Reading(one, "refused", None, None, f"{one.axis} had no candidate: {one.refused}", (f"{here}/refused",))
    fault = own_fault(one)
    if fault is not None:
        run = one.runs[fault]
        told = f"{one.axis} {run.outcome.replace('_', ' ')}: {run.reason or 'no reason given'}"
        return Reading(one, "failed", None, None, told, (f"{here}/runs/{fault}/outcome",))
    return Reading(one, "unscored", None, None, f"{one.axis} has no score to judge by", (here,))


def own_fault(one: CandidateEvidence) -> int | None:
    """Index of the run that shows a candidate's own fault; none if a run was scored or the fault was elsewhere."""
    if any(run.scores for run in one.runs):
        return None
    return next((index for index, run in enumerate(one.runs) if run.outcome in OWN_FAULT), None)
