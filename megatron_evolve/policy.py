"""The search policy: the only thing that survives a round, with its registry of dead ends.

A policy says from where to search (the standing settings), along which axes, for which objective, with how many
replicates, and what has been ruled out. Meta writes the next one as typed edits, each pointing into the evidence.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from megatron_evolve.artefacts import load_yaml_checked
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.frozen import Frozen
from megatron_evolve.substrate.settings import Settings

Mode = Literal["stabilise", "stack-and-calibrate", "exploit-proxy", "proxy-aware"]
Objective = Literal["dev", "external"]
OTHER: dict[Objective, Objective] = {"dev": "external", "external": "dev"}
Operator = Literal["headroom", "balance", "style", "lr", "steps", "schedule", "adapter", "stack", "selection"]

# Axes that a finding opens: they get a worker before the generic ones, as long as they are open.
OPENED_BY_EVIDENCE: tuple[Operator, ...] = ("stack", "selection")


class Axis(Frozen):
    """One direction of search, given to one worker a round."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_-]+$",
        description="label in reports and in the paths of edits; equal names would make two workers one",
    )
    operator: Operator = Field(description="what the worker varies")
    magnitude: float = Field(default=1.0, gt=0, le=16, description="size of the step; 1 is the operator's usual step")
    direction: Literal["up", "down"] = Field(default="up", description="which way to go first")
    misses_up: int = Field(
        default=0, ge=0, description="rounds without a gain that were to go up first, since the axis' last gain"
    )
    misses_down: int = Field(default=0, ge=0, description="the same, down first")
    retired: str = Field(default="", description="why no worker gets this axis any more; empty while it is open")

    @property
    def misses(self) -> int:
        """Rounds without a gain since the last one."""
        return self.misses_up + self.misses_down


def check_names(axes: Sequence[Axis]) -> None:
    """Raises ValueError where an edit could not tell axes by their names, those that a finding is yet to open too."""
    names = [axis.name for axis in axes]
    if len(set(names)) != len(names):
        raise ValueError(f"axes need different names, got {', '.join(names)}; rename one")
    for axis in axes:
        if axis.name in OPENED_BY_EVIDENCE and axis.name != axis.operator:
            raise ValueError(
                f"the name {axis.name} is kept for the axis that a finding opens, got one of operator {axis.operator}; "
                "rename it"
            )


class DomainState(Frozen):
    """What is known of one domain when a round opens: the anchor's last accuracies and the weights in each score."""

    dev: float | None = Field(description="anchor's dev accuracy, none before it was scored")
    external: float | None = Field(description="anchor's external accuracy as released, none if unknown")
    dev_weight: float = Field(ge=0, description="weight of the domain in the dev score")
    external_weight: float | None = Field(description="weight in the external score, none if unknown")


class DeadEnd(Frozen):
    """A settings change that was tried and lost, or undoes one that was shown to pay: not tried from that ground."""

    axis: str
    change: dict[str, Any] = Field(description="canonical change: path to {from, to}")
    ground: str = Field(description="digest of the settings that were changed")
    objective: Literal["dev", "external", "any"] = Field(
        description="the score that spoke against it; a run that failed lost on any"
    )
    candidate: str = Field(description="candidate that tried it, or the change that it undoes")
    round: int
    way_back: bool = Field(
        default=False, description="undoes what moved the standing settings here, and rules out any part of itself too"
    )
    reason: str = Field(min_length=1, description="one sentence")
    evidence: tuple[str, ...] = Field(min_length=1, description="JSON pointers into the round's evidence")


class Replicates(Frozen):
    """Runs per candidate."""

    explorer: int = Field(default=1, ge=1, le=64, description="seeds of every explorer")
    confirm_candidates: int = Field(default=2, ge=0, le=64, description="best candidates that get further seeds")
    confirm_seeds: int = Field(default=1, ge=0, le=64, description="further seeds of each of those")


class SearchPolicy(Frozen):
    """What the workers of one round are given."""

    schema_: Literal["policy/1"] = Field(default="policy/1", alias="schema")
    round: int = Field(ge=0, description="round that this policy serves")
    mode: Mode = Field(default="stabilise", description="what the search is after")
    objective: Objective = Field(default="dev", description="the score that candidates are selected by")
    objective_since: int = Field(
        default=0,
        ge=0,
        description="first round that a verdict may pool: since the objective moved, or a further premise fell",
    )
    standing: Settings = Field(description="accumulated winning settings: the anchor of the round")
    axes: tuple[Axis, ...] = Field(min_length=1)
    pending: tuple[dict[str, Any], ...] = Field(
        default=(), description="changes that helped but are not in the standing settings: material for a stack"
    )
    domains: dict[str, DomainState] = Field(default_factory=dict)
    replicates: Replicates = Field(default=Replicates())
    ask_external: Literal["all", "best", "none"] = Field(
        default="all",
        description="whose external score is asked: every candidate's, the selected one's and the anchor's, nobody's",
    )
    premises: tuple[str, ...] = Field(
        default=(), description="what the search takes for granted; a falsified premise is struck and says so"
    )
    dead_ends: tuple[DeadEnd, ...] = Field(default=(), description="grows to a bound, never shrinks")

    @field_validator("axes")
    @classmethod
    def _one_name_per_axis(cls, axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
        check_names(axes)
        return axes

    def open_axes(self) -> tuple[Axis, ...]:
        """Axes that still get a worker, in order."""
        return tuple(axis for axis in self.axes if not axis.retired)

    def axes_for(self, workers: int) -> tuple[Axis, ...]:
        """One axis for each of `workers` explorers: first what evidence opened, then the least missed, in order.

        With fewer open axes than workers some axis is given out again; its workers have different seeds.
        """
        ranked = sorted(self.open_axes(), key=lambda axis: (axis.operator not in OPENED_BY_EVIDENCE, axis.misses))
        return tuple(ranked[worker % len(ranked)] for worker in range(workers)) if ranked else ()

    def carries_over(self, domain: str | None = None) -> bool:
        """Whether a dev gain (in `domain`, or overall) is still taken to reach the external score."""
        return struck(premise(domain)) not in self.premises


class Edit(Frozen):
    """One change of the policy, with the evidence it rests on."""

    path: str = Field(description="dotted path within the policy")
    before: Any = Field(alias="from")
    after: Any = Field(alias="to")
    reason: str = Field(min_length=1, description="one sentence that names the evidence")
    evidence: tuple[str, ...] = Field(
        min_length=1, description="JSON pointers into the round's evidence, each resolvable"
    )


def premise(domain: str | None = None) -> str:
    """What the search takes for granted of a domain, or overall."""
    return f"A dev gain{f' in {domain}' if domain else ''} carries over to the external score."


def struck(text: str) -> str:
    """A premise that evidence has falsified."""
    return f"Falsified: {text}"


def policy_digest(policy: SearchPolicy) -> str:
    """sha256 of the policy."""
    return digest_of(policy.model_dump(mode="json", by_alias=True))


@lru_cache(maxsize=8)  # a window of rounds: a round asks for its own policy some ten times, 25 ms of YAML each
def kept_policy(path: Path, digest: str) -> SearchPolicy:
    """The policy in a file, refused unless it is the one of this digest. Read once."""
    return SearchPolicy.parse(load_yaml_checked(path, digest), where=str(path))


def resolve_pointer(document: Any, pointer: str) -> Any:
    """The value at an RFC 6901 JSON pointer; the whole document at "". Raises ValueError when it does not resolve."""
    if pointer and not pointer.startswith("/"):
        raise ValueError(
            f'pointer {pointer!r} does not resolve: expected "" or a text that starts with /; add the slash'
        )
    value = document
    for part in pointer.split("/")[1:]:
        try:
            value = value[_place(part)] if isinstance(value, list) else value[_key(part)]
        except (KeyError, IndexError, ValueError, TypeError):
            raise ValueError(
                f"pointer {pointer!r} does not resolve at {part!r}: cite a value that the evidence holds"
            ) from None
    return value


def _place(part: str) -> int:
    """An index as RFC 6901 spells it, where Python's `int` takes signs, blanks, leading zeros and other digits too."""
    if re.fullmatch("0|[1-9][0-9]*", part) is None:
        raise ValueError(part)
    return int(part)


def _key(part: str) -> str:
    if re.search("~(?![01])", part):
        raise ValueError(part)
    return part.replace("~1", "/").replace("~0", "~")
