"""Evidence: the one artefact of a round that meta reads, in one fixed schema.

Every effect is a paired difference to the same-round anchor on the same items. Failures keep their kind; a run without
a score has none. Of a target that tells scores alone, effects and scores are the released values (Ladder, rounded);
of a CSV whose rows come round again the effects are, and the anchor's accuracies by domain are to one row's worth.
Verdicts and replicates hold exact ones: verdicts are computed on raw values, and later rounds pool the replicates. The
next policy is made from the verdicts' outcomes, and the reasons that its edits cite quote the exact changes; it reads
no other number of theirs.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megatron_evolve.artefacts import load_json
from megatron_evolve.substrate.frozen import Frozen


class ScoreValue(Frozen):
    """A mean with its standard error and its count."""

    mean: float
    se: float = Field(ge=0)
    n: int = Field(ge=1)


class EffectValue(Frozen):
    """A paired difference to the anchor, in accuracy (0.01 is one point)."""

    mean: float
    se: float = Field(ge=0, description="items and seeds together")
    low: float = Field(description="lower end of the 95 % interval")
    high: float = Field(description="upper end of the 95 % interval")
    p_better: float = Field(ge=0, le=1, description="posterior probability that the effect is above zero")


class RunRecord(Frozen):
    """One run: how it ended and what it scored by split."""

    seed: int
    outcome: str = Field(description="finished, diverged, crashed, out_of_memory, timed_out, cancelled, hung or lost")
    reason: str = Field(default="", description="one sentence for anything but finished")
    cpu_seconds: float = Field(default=0.0, ge=0, description="of all attempts, failed ones included")
    gpu_seconds: float = Field(default=0.0, ge=0, description="wall time times GPUs, of the same")
    scores: dict[str, ScoreValue] = Field(default_factory=dict, description="by split; empty for a failed run")


class DomainEffect(Frozen):
    """One domain of one candidate."""

    dev: ScoreValue | None = None
    external: ScoreValue | None = None
    dev_effect: EffectValue | None = None
    external_effect: EffectValue | None = None


class CandidateEvidence(Frozen):
    """What a round learnt about one candidate."""

    id: str
    axis: str = Field(description="axis name, or `anchor`")
    role: Literal["anchor", "explorer"]
    change: dict[str, Any] = Field(description="canonical change from the anchor: path to {from, to}")
    hypothesis: str = ""
    runs: tuple[RunRecord, ...]
    dev: ScoreValue | None = Field(default=None, description="dev-B mean over its finished runs")
    external: ScoreValue | None = None
    effects: dict[str, EffectValue] = Field(
        default_factory=dict, description="by split: dev-a, dev-b, external-a, external-b, external (a and b together)"
    )
    confirmed: bool = Field(
        default=False, description="further seeds alone are above the anchor too, on the B half that was searched for"
    )
    confirmed_off_objective: bool = Field(
        default=False,
        description="the same on the other score's B half, which judges where the round moves the objective; false "
        "where no further seed was scored on it, and in evidence from before it was told",
    )
    gain: bool = Field(
        default=False,
        description="better than the anchor on the half that judges, by Holm over the round's explorers at 5 %: only "
        "this may be called a gain",
    )
    domains: dict[str, DomainEffect] = Field(default_factory=dict)
    refused: str = Field(default="", description="why the worker ended without a candidate that could run")
    nothing: bool = Field(default=False, description="every answer of its worker was that there is no move left")


class Noise(Frozen):
    """How much of what differs is chance."""

    seed_sd_dev: float | None = None
    seed_sd_external: float | None = None
    between_sd_dev: float | None = None
    signal_to_noise: float | None = Field(
        default=None, description="spread between candidates over spread between seeds"
    )
    df: float | None = None


class Evidence(Frozen):
    """What a round leaves to meta, to later verdicts and to people."""

    schema_: Literal["evidence/1"] = Field(default="evidence/1", alias="schema")
    round: int
    substrate: str
    judge: str
    policy: str = Field(description="digest of the policy that was searched under")
    objective: str
    anchor: str = Field(description="anchor's candidate id")
    selected: str | None = Field(
        description="explorer with the best A-half score on the objective; none if none finished"
    )
    candidates: tuple[CandidateEvidence, ...]
    noise: Noise
    minimum_detectable_effect: dict[str, float] = Field(default_factory=dict, description="by split, 80 % power at 5 %")
    verdicts: tuple[dict[str, Any], ...] = Field(description="verdict objects of this round")
    looks: dict[str, int] = Field(default_factory=dict, description="dev and external looks so far, and the budget")
    replicates: tuple[dict[str, Any], ...] = Field(
        default=(), description="candidates run twice or more: what the seed variance of later rounds pools"
    )
    cpu_seconds: float = Field(default=0.0, ge=0, description="of all attempts, failed ones included")
    gpu_seconds: float = Field(default=0.0, ge=0, description="wall time times GPUs, of the same")


@lru_cache(maxsize=66)  # the rounds whose replicates are pooled, which every round asks for again, 10 ms each
def kept_evidence(path: Path, digest: str) -> Evidence:
    """The evidence in a file, refused unless it is the one of this digest. Read once."""
    return Evidence.parse(load_json(path, digest), where=str(path))
