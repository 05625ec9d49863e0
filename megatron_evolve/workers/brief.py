"""What a worker is told, and what it answers: the two files of the process seam.

A brief is complete, hashed and one-shot: the substrate as the public may know it, the search policy, one axis, a seed
and what a delta may reach. Nothing of earlier rounds is in it beyond the policy, nothing of other workers, and no path.
The answer is one delta, or `nothing` with the reason.
"""

from functools import cached_property
from typing import Any, Literal

from pydantic import Field, field_serializer, model_validator

from megatron_evolve.constitution import Limits
from megatron_evolve.delta import Delta
from megatron_evolve.policy import Axis, SearchPolicy
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.frozen import Frozen


class Brief(Frozen):
    """One question to one worker."""

    schema_: Literal["brief/1"] = Field(default="brief/1", alias="schema")
    verb: Literal["propose", "repair"] = Field(description="propose a delta, or mend one that was refused or failed")
    substrate: dict[str, Any] = Field(description="public view of the substrate: names, shapes, default settings")
    policy: SearchPolicy
    axis: Axis = Field(description="the one direction of search that this worker is given")
    seed: int = Field(ge=0, description="decides whatever the worker leaves to chance")
    mutation_space: tuple[str, ...] = Field(description="paths that a delta may change; shell-style patterns")
    limits: Limits
    failed: Delta | None = Field(default=None, description="delta to mend; none if the answer before held none")
    ending: str = Field(default="", description="how the failed run ended; empty if the delta was refused before a run")
    reason: str = Field(default="", description="why it was refused or failed, in a sentence")

    @model_validator(mode="after")
    def _repair_has_its_reason(self) -> "Brief":
        if self.verb == "repair" and not self.reason:
            raise ValueError("a repair needs the reason of the refusal or failure")
        if self.verb == "propose" and (self.failed or self.reason or self.ending):
            raise ValueError("a brief to propose holds no failed delta, ending or reason")
        return self

    @field_serializer("failed")
    def _failed(self, delta: Delta | None) -> dict[str, Any] | None:
        return delta_document(delta)

    @cached_property
    def digest(self) -> str:
        """sha256 of the brief: the prompt digest that the ledger keeps."""
        return digest_of(document(self))


class Usage(Frozen):
    """What an answer cost, where the program tells: a language model's name, sampling and tokens."""

    model: str = ""
    sampling: dict[str, Any] = Field(default_factory=dict)
    tokens_in: int | None = Field(default=None, ge=0)
    tokens_out: int | None = Field(default=None, ge=0)
    cost: float | None = Field(default=None, ge=0, description="US dollars")


class Proposal(Frozen):
    """One answer: a delta, or an honest nothing."""

    schema_: Literal["proposal/1"] = Field(default="proposal/1", alias="schema")
    brief: str = Field(description="digest of the brief that is answered")
    delta: Delta | None = None
    nothing: str = Field(
        default="",
        description="why the axis has no move left, which retires it until the standing settings or the objective "
        "move; empty if there is a delta. A program that could not answer exits non-zero instead",
    )
    usage: Usage | None = Field(default=None, description="none from a program that costs only its CPU time")

    @model_validator(mode="after")
    def _delta_or_nothing(self) -> "Proposal":
        if (self.delta is None) != bool(self.nothing):
            raise ValueError("a proposal holds either a delta or, in `nothing`, the reason why not")
        return self

    @field_serializer("delta")
    def _delta(self, delta: Delta | None) -> dict[str, Any] | None:
        return delta_document(delta)

    @property
    def digest(self) -> str:
        """sha256 of the proposal."""
        return digest_of(document(self))


def document(value: Brief | Proposal) -> dict[str, Any]:
    """The JSON document of a brief or a proposal."""
    return value.model_dump(mode="json", by_alias=True)


def delta_document(delta: Delta | None) -> dict[str, Any] | None:
    """The JSON document of a delta, or None for none."""
    return None if delta is None else delta.model_dump(mode="json", by_alias=True)
