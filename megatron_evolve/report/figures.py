"""Figures: how numbers are shown, and where each stands in `status --json`.

A number that status holds is quoted by its path, never copied: the element carries the path in `data-status` and the
exact value in `data-value`, so that a script or a test can compare the page with the JSON.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from megatron_evolve.budget import amount
from megatron_evolve.report.markup import Markup, join, tag

Form = Callable[[Any], str]

NOTHING = Markup('<span class="none" title="no value">–</span>')
MINUS = "\u2212"


def plain(value: Any) -> str:
    """A number as people write it."""
    return (f"{value:,}" if isinstance(value, int) else amount(value)).replace("-", MINUS)


def label(value: Any) -> str:
    """A number that is a name, such as a seed."""
    return str(value)


def accuracy(value: float) -> str:
    """An accuracy, 0 to 1."""
    return f"{value:.3f}"


def points(value: float) -> str:
    """An accuracy difference in points, with its sign."""
    shown = f"{100 * value:+.1f}"
    return ("0.0" if float(shown) == 0 else shown).replace("-", MINUS)


def size(value: float) -> str:
    """A size in points, without a sign."""
    return f"{100 * value:.1f}"


def ratio(value: float) -> str:
    """A ratio to two digits."""
    return f"{value:.2f}".replace("-", MINUS)


def seconds(value: float) -> str:
    """CPU time: seconds, and minutes or hours where that reads better."""
    if value < 600:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 36_000 else f"{value / 3600:.1f} h"


def probability(value: float) -> str:
    """A probability to two digits; never a bare 0 or 1."""
    return "> .99" if value > 0.995 else "< .01" if value < 0.005 else f"{value:.2f}".lstrip("0") or "0"


def digest(value: str) -> Markup:
    """The first digits of a digest; the whole of it stands in its title."""
    return tag("code", value[:12], title=value)


class Quotes:
    """The status document, quoted number by number."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document

    def at(self, *path: Any) -> Any:
        """The value at a path; None where any step of it is missing."""
        value: Any = self._document
        for step in path:
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def marks(self, *path: Any) -> dict[str, str]:
        """Attributes that tie an element to a number of status."""
        return {"data_status": ".".join(map(str, path)), "data_value": json.dumps(self.at(*path))}

    def number(self, *path: Any, form: Form = plain) -> Markup:
        """A number of status, shown; a dash where status has none."""
        value = self.at(*path)
        return NOTHING if value is None else tag("span", form(value), **self.marks(*path))

    def score(self, *path: Any) -> Markup:
        """A mean with its standard error and, smaller, its count."""
        if self.at(*path) is None:
            return NOTHING
        mean, error, count = (
            self.number(*path, name, form=form) for name, form in (("mean", accuracy), ("se", accuracy), ("n", plain))
        )
        return join([tag("span", mean, " ± ", error, class_="score"), " ", tag("span", "of ", count, class_="count")])

    def interval(self, *path: Any) -> Markup:
        """An effect in points with the ends of its interval."""
        if self.at(*path) is None:
            return NOTHING
        mean, low, high = (self.number(*path, name, form=points) for name in ("mean", "low", "high"))
        return tag("span", mean, tag("span", " [", low, ", ", high, "]", class_="range"), class_="effect")

    def unquoted(self, page: str) -> list[tuple[Any, ...]]:
        """Paths of the numbers that a page does not quote."""
        quoted = set(re.findall(r'data-status="([^"]*)"', page))
        return [path for path in _numbers((), self._document) if ".".join(map(str, path)) not in quoted]


def _numbers(path: tuple[Any, ...], value: Any) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers((*path, key), item)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield path
