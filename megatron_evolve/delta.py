"""A delta: the small declarative change that a worker or a researcher proposes, with its reason and its prediction.

`resolve` turns base settings and a delta into the settings that are hashed and trained. A delta is data: paths and
values checked against the settings' own schema, never code.
"""

import fnmatch
import math
from typing import Any, Literal

from pydantic import Field, model_serializer, model_validator

from megatron_evolve.substrate.frozen import Frozen
from megatron_evolve.substrate.settings import Settings, read, write_all

Direction = Literal["up", "down", "flat"]


class Change(Frozen):
    """One change of one path: exactly one of `set` and `scale`."""

    set: Any = Field(default=None, description="the new value, of the type of the setting that the path names")
    scale: float | None = Field(default=None, gt=0, le=1e6, description="factor on the number that stands there")

    @model_validator(mode="after")
    def _exactly_one(self) -> "Change":
        if len(self.model_fields_set & {"set", "scale"}) != 1:
            given = " and ".join(sorted(self.model_fields_set)) or "neither"
            raise ValueError(f"a change has exactly one of `set` and `scale`, got {given}; give one")
        return self

    @model_serializer
    def _only_the_one(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.model_fields_set}


class Base(Frozen):
    """What the delta changes."""

    substrate: str = Field(default="", description="first digits of the substrate digest; empty takes the campaign's")
    recipe: str = Field(default="default", description="`default`, or `policy/r` for the standing recipe of round r")


class Prediction(Frozen):
    """What the proposer expects, in accuracy differences to the anchor; judged against what comes."""

    dev: tuple[float, float] | None = Field(
        default=None, description="interval of the expected dev gain, e.g. [0.01, 0.03]"
    )
    external: tuple[float, float] | None = Field(default=None, description="interval of the expected external gain")
    domains: dict[str, Direction] = Field(default_factory=dict, description="direction by domain: up, down or flat")

    @model_validator(mode="after")
    def _low_before_high(self) -> "Prediction":
        for name in ("dev", "external"):
            low, high = getattr(self, name) or (0.0, 0.0)
            if low > high:
                raise ValueError(
                    f"{name} is an interval [low, high], got [{low}, {high}]; write the lower number first"
                )
        return self


class Delta(Frozen):
    """A proposed change of data mix and recipe."""

    schema_: Literal["delta/1"] = Field(default="delta/1", alias="schema")
    base: Base = Field(default=Base(), description="what is changed")
    hypothesis: str = Field(
        min_length=1, max_length=2000, description="why this change should help, in a sentence or two"
    )
    predict: Prediction = Field(default=Prediction(), description="expected effect")
    change: dict[str, Change] = Field(min_length=1, max_length=64, description="changes by path, `mix.…` or `recipe.…`")


def resolve(base: Settings, delta: Delta, mutation_space: tuple[str, ...] = ("mix.*", "recipe.*")) -> Settings:
    """The settings after the delta. Mix weights are scaled against the base's and renormalised once, together.

    Raises ValueError for an unknown path (with the nearest), one outside `mutation_space`, a value out of range, a
    `scale` of something that is no number, a number written as text or as true, and a delta that changes nothing.
    """
    values: dict[str, Any] = {}
    for path, change in delta.change.items():
        current = read(base, path)
        if not any(fnmatch.fnmatchcase(path, pattern) for pattern in mutation_space):
            raise ValueError(
                f"{path} is outside the mutation space ({', '.join(mutation_space)}); change another setting"
            )
        values[path] = _changed(path, current, change)
    resolved = write_all(base, values)
    for path, value in values.items():
        _check_numbers(path, value, read(resolved, path))
    if same_settings(resolved, base):
        raise ValueError(
            f"the delta changes nothing: {', '.join(delta.change)} already stand(s) there; propose another value"
        )
    return resolved


def _changed(path: str, current: Any, change: Change) -> Any:
    if change.scale is None:
        return change.set
    if isinstance(current, bool) or not isinstance(current, int | float):
        raise ValueError(f"{path} can't be scaled: expected a number there, got {current!r}; use `set`")
    scaled = current * change.scale
    return max(1, round(scaled)) if isinstance(current, int) else scaled


def _check_numbers(path: str, given: Any, taken: Any) -> None:
    """Raises ValueError where true or "0.001" was taken for a number: whoever wrote that meant something else."""
    if isinstance(taken, dict) and isinstance(given, dict):
        for key in taken.keys() & given.keys():
            _check_numbers(f"{path}.{key}", given[key], taken[key])
    elif isinstance(taken, int | float) and isinstance(given, bool | str):
        raise ValueError(f"{path}: expected a number, got {given!r:.40}; write it as a number, without quotes")


def same_settings(first: Settings, second: Settings) -> bool:
    """Equal up to the rounding of floats: weights that differ in the ninth digit are the same mix."""
    return _same(first.model_dump(), second.model_dump())


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, float) or isinstance(second, float):
        numbers = isinstance(first, int | float) and isinstance(second, int | float)
        return numbers and math.isclose(first, second, rel_tol=1e-8, abs_tol=1e-9)
    return first == second


def canonical_change(base: Settings, resolved: Settings) -> dict[str, dict[str, Any]]:
    """What really changed, by path: `{path: {"from": …, "to": …}}`. Two spellings of one change give one answer."""
    return dict(_differences("", base.model_dump(), resolved.model_dump()))


def _differences(prefix: str, first: Any, second: Any) -> list[tuple[str, dict[str, Any]]]:
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        parts = [(f"{prefix}.{key}" if prefix else key, first[key], second[key]) for key in sorted(first)]
        return [found for path, one, other in parts for found in _differences(path, one, other)]
    return [] if _same(first, second) else [(prefix, {"from": first, "to": second})]
