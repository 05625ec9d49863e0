"""A candidate's settings, the mix and the recipe together: all that a delta may reach, by dotted path.

Paths start with `mix.` or `recipe.`; `read` looks a path up, `write` gives new settings with one path changed.
"""

from typing import Any

from megatron_evolve.substrate.frozen import Frozen, nearest
from megatron_evolve.substrate.mix import Mix
from megatron_evolve.substrate.recipe import Recipe


class Settings(Frozen):
    """Resolved mix and recipe: every field has its one value."""

    mix: Mix
    recipe: Recipe


def paths(settings: Settings) -> list[str]:
    """Every path that these settings offer, leaves and whole adapters."""
    return sorted(_walk("", settings.model_dump()))


def _walk(prefix: str, value: Any) -> list[str]:
    if not isinstance(value, dict):
        return [prefix]
    inner = [path for key, item in value.items() for path in _walk(f"{prefix}.{key}" if prefix else key, item)]
    return ([prefix] if prefix.endswith("adapter") else []) + inner


def read(settings: Settings, path: str) -> Any:
    """The value at `path`. Raises ValueError naming the nearest real paths."""
    value: Any = settings.model_dump()
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            hint = nearest(path, paths(settings))
            raise ValueError(f"unknown setting {path!r}{hint}")
        value = value[part]
    return value


def write(settings: Settings, path: str, value: Any) -> Settings:
    """New settings with `path` set to `value`; ranges are checked and mix weights renormalised together."""
    return write_all(settings, {path: value})


def write_all(settings: Settings, values: dict[str, Any]) -> Settings:
    """New settings with all `values` (path to value) set at once, so that weights are renormalised only once."""
    tree = settings.model_dump()
    for path in values:
        read(settings, path)
    for path, value in values.items():
        *parents, leaf = path.split(".")
        node = tree
        for part in parents:
            node = node[part]
        node[leaf] = value
    return Settings.parse(tree, where="settings")
