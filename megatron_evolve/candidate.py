"""A candidate: substrate, resolved mix and resolved recipe, named by their digest. A run adds a seed.

The seed is not in the name: replicates of one candidate are runs of it. Two workers that propose the same settings have
proposed the same candidate.
"""

from typing import Any, Literal

from pydantic import Field

from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.frozen import Frozen
from megatron_evolve.substrate.settings import Settings

ID_DIGITS = 12


class Candidate(Frozen):
    """What is trained. Immutable once the first score of one of its runs exists."""

    schema_: Literal["candidate/1"] = Field(default="candidate/1", alias="schema")
    id: str = Field(description="first 12 hexadecimal digits of the digest of substrate and settings")
    substrate: str = Field(description="substrate digest")
    settings: Settings


def candidate(substrate_digest: str, settings: Settings) -> Candidate:
    """The candidate of these settings on this substrate."""
    return Candidate(id=candidate_id(substrate_digest, settings), substrate=substrate_digest, settings=settings)


def candidate_id(substrate_digest: str, settings: Settings) -> str:
    """The candidate's name; equal settings on equal substrates have equal names."""
    return digest_of({"substrate": substrate_digest, "settings": settings})[:ID_DIGITS]


def run_seed(campaign_seed: int, round_number: int, candidate_name: str, replicate: int) -> int:
    """Seed of one run, 31 bits: the same campaign gives the same seeds, different rounds give different ones."""
    material: dict[str, Any] = {"seed": campaign_seed, "round": round_number, "candidate": candidate_name}
    return int(digest_of({**material, "replicate": replicate})[:8], 16) & 0x7FFFFFFF
