"""The conditions under which something must hold: what is simulated beside the scenarios as they are.

No harmless scenario may alarm in more than 5 % of campaigns, also where flips are common to all explorers, where the
noise of a seed is known from few runs, and where the standing settings are judged against the origin too. The powers
that were demanded were stated for the specified noise.
"""

from dataclasses import dataclass, replace

from megatron_evolve.simulate.draw import Plan
from megatron_evolve.simulate.scenarios import SCENARIOS, Scenario

HARMLESS = tuple(name for name, one in SCENARIOS.items() if one.harmless)
OF_HARMLESS = "at most .05 of campaigns alarm"
MOST_SHARED = 0.6  # of flips


@dataclass(frozen=True, eq=False)
class Condition:
    """Scenarios under one noise and plan, and what must hold of them beside what must of every harmless one."""

    names: tuple[str, ...]
    noise: str
    plan: Plan
    shared: float = 0.0
    demand: str = ""

    def must(self, one: Scenario) -> str:
        """What must hold of one of the scenarios; empty where nothing must."""
        return self.demand or (OF_HARMLESS if one.harmless else "")


def few_degrees(plan: Plan) -> Plan:
    """Two anchor runs a round and two of the origin: one degree of freedom from it, and three from each round."""
    return replace(plan, rules=plan.rules.replace(anchor_seeds=2), origin_seeds=2)


def demanded() -> tuple[Condition, ...]:
    """Every condition, with the product's plan but for what the condition names."""
    plan = Plan()
    return (
        Condition(HARMLESS, "measured", plan, MOST_SHARED),
        Condition(HARMLESS, "measured", few_degrees(plan)),
        Condition(HARMLESS, "measured", plan.judging_origin()),
        Condition(("decoupled",), "specified", plan, demand="found by round 4 in at least .8 of campaigns"),
        Condition(("one-exploiter",), "specified", plan, demand="found by `selected` in at least .95 of first rounds"),
    )
