"""Validation of a delta: schema, mutation space, limits, dead ends, in that order. Returns the settings or the refusal.

A refusal is one sentence that a worker can act on. Nothing is changed here, and nothing is run.
"""

from typing import Any, Protocol

from megatron_evolve.constitution import Limits
from megatron_evolve.dead_ends import dead_end_of
from megatron_evolve.delta import Delta, resolve, same_settings
from megatron_evolve.policy import SearchPolicy
from megatron_evolve.substrate.settings import Settings

DEFAULT_RECIPE = "default"


class Rules(Protocol):
    """What validation needs of a constitution; a brief quotes the same two."""

    @property
    def mutation_space(self) -> tuple[str, ...]: ...

    @property
    def limits(self) -> Limits: ...


def validate(
    delta: Delta | dict[str, Any], policy: SearchPolicy, rules: Rules, substrate: dict[str, Any]
) -> Settings | str:
    """The resolved settings of `delta`, or why it is refused, in one sentence.

    `rules` is the constitution or a brief; `substrate` is the public view (`substrate.manifest.public_view`).
    """
    try:
        parsed = delta if isinstance(delta, Delta) else Delta.parse(delta, where="delta")
        resolved = resolve(base_settings(parsed, policy, substrate), parsed, rules.mutation_space)
        _check_is_new(resolved, policy)
        check_styles(resolved, substrate)
        _check_limits(resolved, rules.limits)
        _check_is_open(resolved, policy)
    except ValueError as error:
        return str(error)
    return resolved


def base_settings(delta: Delta, policy: SearchPolicy, substrate: dict[str, Any]) -> Settings:
    """The settings that a delta changes: the round's standing ones, or the substrate's own. Raises ValueError."""
    base = delta.base
    if not substrate["digest"].startswith(base.substrate):
        raise ValueError(
            f"base.substrate: the delta is for {base.substrate[:12]}, this campaign's substrate is "
            f"{substrate['digest'][:12]}; write the delta for this one"
        )
    standing = standing_name(policy)
    if base.recipe == standing:
        return policy.standing
    if base.recipe == DEFAULT_RECIPE:
        return Settings.parse(substrate["default"], where="substrate's default settings")
    raise ValueError(f"base.recipe: expected {standing!r} or {DEFAULT_RECIPE!r}, got {base.recipe!r}")


def standing_name(policy: SearchPolicy) -> str:
    """What a delta calls the standing settings of this round."""
    return f"policy/{policy.round}"


def _check_is_new(resolved: Settings, policy: SearchPolicy) -> None:
    if same_settings(resolved, policy.standing):
        raise ValueError("the delta gives the standing settings, which the anchor runs already; propose another value")


def check_styles(resolved: Settings, substrate: dict[str, Any]) -> None:
    """Raises ValueError for a form of completions that the substrate (its public view) has not for a family."""
    for family, style in resolved.mix.style.items():
        offered = substrate["construction"]["styles"].get(family, ())
        if style not in offered:
            raise ValueError(
                f"mix.style.{family}: expected one of {', '.join(offered)}, got {style!r}; set one of these"
            )


def _check_limits(resolved: Settings, limits: Limits) -> None:
    recipe = resolved.recipe
    if recipe.steps > limits.max_steps:
        raise ValueError(f"recipe.steps: at most {limits.max_steps} are allowed, got {recipe.steps}; propose fewer")
    rows = recipe.steps * recipe.batch_size
    if rows > limits.max_rows:
        raise ValueError(
            f"recipe: at most {limits.max_rows} training rows are allowed, got {recipe.steps} steps x "
            f"{recipe.batch_size} rows = {rows}; propose fewer steps or a smaller batch"
        )


def _check_is_open(resolved: Settings, policy: SearchPolicy) -> None:
    known = dead_end_of(policy, resolved)
    if known is not None:
        raise ValueError(f"a dead end since round {known.round} ({known.reason.rstrip('.')}); propose another change")
