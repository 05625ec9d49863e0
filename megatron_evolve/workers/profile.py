"""The objective's profile: how much each family weighs in the score that is searched for, and how much is still wrong.

Under the external objective external numbers count where they are known. A weight that is unknown is the dev score's
while that score is still taken for a picture of the target, and equal for all once it is not. A domain whose dev gains
are known not to carry over has no headroom that rows could win.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_evolve.policy import DomainState
from megatron_evolve.workers.brief import Brief


@dataclass(frozen=True)
class Domain:
    """A family as the objective sees it. `accuracy` is none before anything was scored."""

    weight: float
    accuracy: float | None
    carries_over: bool

    @property
    def wrong(self) -> float:
        """Share of its items still wrong; all of them where nothing is known."""
        return 1.0 - (self.accuracy or 0.0)


@dataclass(frozen=True)
class Profile:
    """All families of the mix, in the mix's order."""

    domains: dict[str, Domain]
    target_shares: dict[str, float] | None

    def headroom_shares(self) -> dict[str, float] | None:
        """Shares of rows in proportion to weight times what is wrong; none if nothing is left to win."""
        return _normalised({name: one.weight * one.wrong * one.carries_over for name, one in self.domains.items()})

    def weakness_shares(self) -> dict[str, float]:
        """Shares in proportion to what is wrong, whatever it weighs."""
        wrong = {name: one.wrong * one.carries_over for name, one in self.domains.items()}
        return _normalised(wrong) or {name: 1 / len(wrong) for name in wrong}

    def balanced_shares(self) -> tuple[dict[str, float], str]:
        """The shares of rebalancing and their name: the external score's where they are searched for and known."""
        if self.target_shares is not None:
            return self.target_shares, "the external score's"
        return {name: 1 / len(self.domains) for name in self.domains}, "equal"

    def usable(self, up: bool) -> list[str]:
        """Families whose rows may be raised (those that carry over) or lowered (those that do not, if any)."""
        held = [name for name, one in self.domains.items() if one.carries_over]
        fallen = [name for name in self.domains if name not in held]
        return held if up else fallen or held

    def told(self, name: str) -> str:
        """A family's numbers for a sentence."""
        one = self.domains[name]
        accuracy = "accuracy unknown" if one.accuracy is None else f"accuracy {one.accuracy:.2f}"
        return f"weight {one.weight:.2f}, {accuracy}"

    def told_weakest(self) -> str:
        """The weakest family with its numbers."""
        name = max(self.domains, key=lambda name: self.domains[name].wrong)
        return f"{name} is weakest, {self.told(name)}"

    def told_left_out(self) -> str:
        """Which domains have no headroom because their dev gains do not carry over."""
        names = [name for name, one in self.domains.items() if not one.carries_over]
        return (
            f" Dev gains in {', '.join(names)} are known not to carry over, so nothing is to be won there."
            if names
            else ""
        )


def profile_of(brief: Brief) -> Profile:
    """The profile of the families that the brief's standing mix has."""
    policy = brief.policy
    families = list(policy.standing.mix.weight)
    states = [policy.domains.get(name) for name in families]
    external = policy.objective == "external"
    weights = _weights(states, external, policy.carries_over())
    domains = {
        name: Domain(weight, _accuracy(state, external), not external or policy.carries_over(name))
        for name, state, weight in zip(families, states, weights, strict=True)
    }
    known = external and all(state is not None and state.external_weight is not None for state in states)
    target = _normalised(dict(zip(families, weights, strict=True))) if known else None
    return Profile(domains, target)


def _weights(states: Sequence[DomainState | None], external: bool, dev_holds: bool) -> list[float]:
    if external and all(state is not None and state.external_weight is not None for state in states):
        return [state.external_weight or 0.0 for state in states if state is not None]
    dev = [state.dev_weight if state is not None else 0.0 for state in states]
    if (external and not dev_holds) or not any(dev):
        return [1 / len(states)] * len(states)
    return dev


def _accuracy(state: DomainState | None, external: bool) -> float | None:
    if state is None:
        return None
    return state.external if external and state.external is not None else state.dev


def _normalised(values: dict[str, float]) -> dict[str, float] | None:
    total = math.fsum(values.values())
    return {name: value / total for name, value in values.items()} if total > 0 else None
