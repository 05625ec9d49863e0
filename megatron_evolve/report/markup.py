"""Markup: HTML and SVG made by functions, escaped unless it was made here.

`tag` builds an element from children and attributes. A child that is no `Markup` is text and is escaped, so nothing
that a worker or an operator wrote can become an element.
"""

import html
from collections.abc import Iterable, Sequence
from typing import Any

# Elements that end themselves.
VOID = ("meta", "br", "hr", "wbr", "path", "line", "circle", "rect", "polyline", "polygon")


class Markup(str):
    """Text that is already HTML."""

    __slots__ = ()


def text(value: Any) -> Markup:
    """A value as escaped text; markup stays as it is."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def join(parts: Iterable[Any], between: str = "") -> Markup:
    """Parts one after another; those that are None are left out."""
    return Markup(text(between).join(text(part) for part in parts if part is not None))


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """One element. `class_` is class, `data_x` is data-x; an attribute that is None is left out."""
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID and not children:
        return Markup(f"<{name}{told}>" if name in VOID[:4] else f"<{name}{told}/>")
    return Markup(f"<{name}{told}>{join(children)}</{name}>")


def section(identity: str, title: str, *children: Any) -> Markup:
    """A part of the page under a heading that the contents list links to."""
    heading = tag("h2", title, id=f"{identity}-title")
    return tag("section", heading, *children, id=identity, aria_labelledby=f"{identity}-title")


def note(*children: Any) -> Markup:
    """A paragraph that says how to read what stands beside it."""
    return tag("p", *children, class_="note")


def scroll(label: str, *children: Any) -> Markup:
    """A box that scrolls sideways where the screen is narrower than its content."""
    return tag("div", *children, class_="scroll", tabindex="0", role="region", aria_label=label)


def fold(summary: Any, *children: Any) -> Markup:
    """Detail that opens on demand, and is printed open."""
    return tag("details", tag("summary", summary), *children)


def cell(*children: Any, **attributes: Any) -> Markup:
    """A table's cell."""
    return tag("td", *children, **attributes)


def table(caption: str, columns: Sequence[Any], rows: Iterable[Sequence[Any]], numbers: Sequence[int] = ()) -> Markup:
    """A table whose first column heads its rows; columns named in `numbers` are aligned to the right.

    A row is cells or plain values; a value that is no `Markup` element is put into a cell.
    """
    head = tag(
        "tr", *(tag("th", name, scope="col", class_=_kind(place, numbers)) for place, name in enumerate(columns))
    )
    body = [_row(row, numbers) for row in rows]
    whole = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return scroll(caption, whole)


def _row(row: Sequence[Any], numbers: Sequence[int]) -> Markup:
    first, *rest = row
    cells = [tag("th", first, scope="row", class_=_kind(0, numbers))]
    cells += [_cell(value, _kind(place, numbers)) for place, value in enumerate(rest, start=1)]
    return tag("tr", *cells)


def _cell(value: Any, kind: str | None) -> Markup:
    if isinstance(value, Markup) and value.startswith("<td"):
        return value
    return cell(value, class_=kind)


def _kind(place: int, numbers: Sequence[int]) -> str | None:
    return "number" if place in numbers else None
