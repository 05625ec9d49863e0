"""A picture of the benchmark's rows: for each layer what each provider took, forward and backward, as bars in one SVG.

    megatron-evolve bench plot docs/results/kernels-h100.jsonl --out docs/results/kernels-h100.svg

Only measured times are drawn; a provider without one is left out. Standard library alone: the file opens in any browser
and in a page on GitHub.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

PASSES = ("forward", "backward")
COLOURS = {
    "triton": ("#1b6ca8", "#7fb3d9"),
    "unfused": ("#7a7a7a", "#bdbdbd"),
    "te-grouped-mlp": ("#4f8a10", "#a9cf80"),
    "sequential-mlp": ("#2a7f78", "#8cc4bf"),
    "scattermoe": ("#8a3ab9", "#c79be0"),
    "quack": ("#b3203a", "#e094a1"),
}
OTHERS = ("#a8641b", "#dcb285")
LEFT, WIDTH, BAR, GAP, TOP, LINE = 250, 460, 15, 16, 62, 16


class Bar(NamedTuple):
    """One provider on one layer, milliseconds by pass."""

    provider: str
    ms: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.ms.values())


class Group(NamedTuple):
    title: str
    bars: list[Bar]


def groups(rows: Iterable[dict]) -> list[Group]:
    """Layers in the order of the rows, each with the providers that have both times. ValueError for half a row."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for number, row in enumerate(rows, start=1):
        if row.get("op") != "experts" or not row.get("median_ms"):
            continue
        try:
            if row["pass"] in PASSES:
                by_provider = found.setdefault(title_of(row["shape"]), {})
                by_provider.setdefault(row["provider"], {})[row["pass"]] = float(row["median_ms"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(
                f"row {number}: expected a layer's pass, provider, median_ms and shape as a bench writes them, got "
                f"something else under {', '.join(row)}; run the bench again"
            ) from None
    return [
        Group(title, [Bar(name, ms) for name, ms in by_provider.items() if len(ms) == len(PASSES)])
        for title, by_provider in found.items()
    ]


def title_of(shape: dict) -> str:
    trained = {"frozen": "frozen", "full": "all trained", "lora": f"adapters r{shape['rank']}"}[shape["mode"]]
    skew = f", MaxVio {shape['max_vio']:g}" if shape["max_vio"] else ""
    return f"{shape['model']} {shape['tokens']:,} EP{shape['ep']}, {trained}{skew}"


def svg(rows: Sequence[dict], title: str) -> str:
    """The whole file. Raises ValueError where no row has a time to draw."""
    drawn = [group for group in groups(rows) if group.bars]
    if not drawn:
        raise ValueError("a picture needs rows of op experts with forward and backward times; got none: run the bench")
    longest = max(bar.total for group in drawn for bar in group.bars)
    providers = list(dict.fromkeys(bar.provider for group in drawn for bar in group.bars))
    legend, below = _legend(providers)
    parts, y = [_text(12, 22, title, size=15, weight="600"), *legend], TOP + below
    for group in drawn:
        middle = y + len(group.bars) * BAR / 2 + 4
        parts.append(_text(LEFT - 10, middle, group.title, anchor="end"))
        for bar in group.bars:
            parts += _bar(bar, y, WIDTH / longest)
            y += BAR
        y += GAP
    size = f'viewBox="0 0 {LEFT + WIDTH + 70} {y}" width="{LEFT + WIDTH + 70}" height="{y}"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="system-ui, sans-serif">\n'
        f"<title>{escape(title)}</title>\n"
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _colours(provider: str) -> tuple[str, str]:
    return COLOURS.get(provider, OTHERS)


def _bar(bar: Bar, y: float, scale: float) -> list[str]:
    parts, x = [], float(LEFT)
    for name, colour in zip(PASSES, _colours(bar.provider), strict=True):
        width = bar.ms[name] * scale
        told = escape(f"{bar.provider}, {name}: {bar.ms[name]:.3f} ms")
        place = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR - 2}"'
        parts.append(f'<rect {place} fill="{colour}"><title>{told}</title></rect>')
        x += width
    return [*parts, _text(x + 6, y + BAR - 5, f"{bar.total:.2f} ms", size=11)]


def _legend(providers: Sequence[str]) -> tuple[list[str], int]:
    """Two providers a line, and the height of the lines after the first."""
    parts, x, y = [], LEFT, 34
    for n, provider in enumerate(providers):
        if n and n % 2 == 0:
            x, y = LEFT, y + LINE
        for name, colour in zip(PASSES, _colours(provider), strict=True):
            said = f"{provider} {name}"
            parts.append(f'<rect x="{x}" y="{y}" width="11" height="11" fill="{colour}"/>')
            parts.append(_text(x + 15, y + 10, said, size=11))
            x += 28 + 6 * len(said)
    return parts, y - 34


def _text(x: float, y: float, said: str, *, size: int = 12, anchor: str = "start", weight: str = "400") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text {place} fill="#222">{escape(said)}</text>'
