"""The drawing board of the charts: scales, axes and marks as inline SVG that takes its colours from the page's style.

value --Scale--> pixel;  Board = two scales in a frame;  drawing(...) = the <svg> with its title and description
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_evolve.report.markup import Markup, join, scroll, tag

MOST_TICKS = 7
TIP = 4  # half the length of an interval's end mark, pixels


@dataclass(frozen=True)
class Scale:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """The pixel of a value; it may lie outside the frame."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 2)

    def clip(self, value: float) -> float:
        """The value, moved to the nearer end where it lies outside."""
        return min(self.high, max(self.low, value))

    def ticks(self) -> list[float]:
        """Round values inside the scale, at most seven."""
        rough = (self.high - self.low) / MOST_TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(place * step, 10) for place in range(first, last + 1)]


def spanning(values: Sequence[float], margin: float, least: float) -> tuple[float, float]:
    """Ends of a scale that holds the values with a margin (a share of their range), `least` wide."""
    low, high = min(values), max(values)
    room = max(least - (high - low), 2 * margin * (high - low)) / 2
    return low - room, high + room


@dataclass(frozen=True)
class Board:
    """A chart's frame: the two scales and the outer size."""

    x: Scale
    y: Scale
    width: int
    height: int

    def grid(self, form_y: Callable[[float], str], title_y: str) -> Markup:
        """Horizontal lines with their values, and what they measure."""
        left, right = self.x.start, self.x.stop
        lines = []
        for value in self.y.ticks():
            lines.append(tag("line", x1=left, x2=right, y1=self.y(value), y2=self.y(value), class_="grid"))
            lines.append(words_at(left - 8, self.y(value) + 4, form_y(value), "tick end"))
        lines.append(words_at(2, 14, title_y, "axis"))
        return tag("g", *lines)

    def columns(self, form_x: Callable[[float], str], title_x: str) -> Markup:
        """Vertical lines with their values, and what they measure."""
        top, bottom = self.y.stop, self.y.start
        lines = []
        for value in self.x.ticks():
            lines.append(tag("line", x1=self.x(value), x2=self.x(value), y1=top, y2=bottom, class_="grid"))
            lines.append(words_at(self.x(value), bottom + 18, form_x(value), "tick middle"))
        lines.append(words_at(self.x.stop, bottom + 38, title_x, "axis end"))
        return tag("g", *lines)

    def upright(self, x: float, low: float, high: float, kind: str) -> Markup:
        """A vertical interval at pixel `x`, with a tip at each end that lies inside the frame."""
        return _interval(self.y, low, high, kind, lambda along, across: (x + across, along))

    def level(self, y: float, low: float, high: float, kind: str) -> Markup:
        """A horizontal interval at pixel `y`."""
        return _interval(self.x, low, high, kind, lambda along, across: (along, y + across))


def _interval(
    scale: Scale, low: float, high: float, kind: str, place: Callable[[float, float], tuple[float, float]]
) -> Markup:
    first, last = scale(scale.clip(low)), scale(scale.clip(high))
    strokes = [(place(first, 0), place(last, 0))]
    strokes += [(place(scale(end), -TIP), place(scale(end), TIP)) for end in (low, high) if scale.clip(end) == end]
    path = " ".join(f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" for (x1, y1), (x2, y2) in strokes)
    return tag("path", d=path, class_=kind)


def words_at(x: float, y: float, said: Any, kind: str) -> Markup:
    """Text at a pixel."""
    return tag("text", said, x=round(x, 1), y=round(y, 1), class_=kind)


def polyline(points: Sequence[tuple[float, float]], kind: str) -> Markup:
    """A line through pixels."""
    return tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=kind)


def mark(shape: Markup, told: str) -> Markup:
    """A mark with the words that a pointer or a screen reader gets."""
    return tag("g", tag("title", told), shape)


def drawing(identity: str, title: str, told: str, size: tuple[int, int], *marks: Any) -> Markup:
    """The whole chart as a figure that scrolls sideways on narrow screens."""
    width, height = size
    whole = tag(
        "svg",
        tag("title", title, id=f"{identity}-name"),
        tag("desc", told, id=f"{identity}-told"),
        *marks,
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_labelledby=f"{identity}-name {identity}-told",
        xmlns="http://www.w3.org/2000/svg",
    )
    return scroll(title, whole)


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Swatch and name, entry by entry; a swatch is a class of the page's style."""
    items = [tag("li", tag("span", class_=f"swatch {kind}", aria_hidden="true"), name) for kind, name in entries]
    return tag("ul", join(items), class_="legend")
