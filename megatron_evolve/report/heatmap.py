"""The heat map: every candidate's effect by family, on dev and on the external target side by side."""

from megatron_evolve.evidence import CandidateEvidence, DomainEffect, EffectValue
from megatron_evolve.report.chronicle import Chapter, Chronicle
from megatron_evolve.report.figures import points
from megatron_evolve.report.markup import Markup, join, note, scroll, section, tag

# The strongest colour is at most this share of the pole, so that the number on it stays readable.
STRONGEST = 62


def heatmap(chronicle: Chronicle) -> Markup | None:
    """Rows are explorers by round, columns families; each has a dev and, where asked, an external cell."""
    found = [effect for chapter in chronicle.judged for one in chapter.evidence.candidates for effect in _effects(one)]
    if not found:
        return None
    largest = max(abs(effect.mean) for effect in found) or 1.0
    outside = any(part.external_effect for part in _parts(chronicle))
    splits = ("dev", "external") if outside else ("dev",)
    names = chronicle.domains
    bodies = [_body(chapter, names, splits, largest) for chapter in chronicle.judged]
    caption = "Effect by family against the anchor of the same round, in points"
    whole = tag("table", tag("caption", caption), _head(names, splits), *bodies, class_="heat")
    told = (
        "Bold: the 95\u00a0% interval leaves zero out. Families are many and intervals wide, so some bold cells are "
        "chance; what may be said of a family is in the verdicts."
    )
    return section("families", "Effects by family", scroll(caption, whole), join([_key(largest), note(told)]))


def _parts(chronicle: Chronicle) -> list[DomainEffect]:
    return [
        part for chapter in chronicle.judged for one in chapter.evidence.candidates for part in one.domains.values()
    ]


def _effects(one: CandidateEvidence) -> list[EffectValue]:
    found = [effect for part in one.domains.values() for effect in (part.dev_effect, part.external_effect)]
    return [effect for effect in found if effect is not None]


def _head(names: tuple[str, ...], splits: tuple[str, ...]) -> Markup:
    above = [tag("th", name, scope="colgroup", colspan=len(splits), class_="first") for name in names]
    below = [
        tag("th", split, scope="col", class_=None if place else "first")
        for _ in names
        for place, split in enumerate(splits)
    ]
    corner = tag("th", "candidate", scope="col", rowspan=2)
    return tag("thead", tag("tr", corner, *above), tag("tr", *below))


def _body(chapter: Chapter, names: tuple[str, ...], splits: tuple[str, ...], largest: float) -> Markup:
    width = 1 + len(names) * len(splits)
    told = f"round {chapter.number}, for {chapter.policy.objective}"
    rows = [tag("tr", tag("th", told, scope="rowgroup", colspan=width, class_="group"))]
    for one in chapter.evidence.candidates:
        if one.role == "anchor":
            continue
        head = tag("th", one.axis, scope="row", title=one.id)
        if not _effects(one):
            why = one.refused or ", ".join(sorted({run.outcome.replace("_", " ") for run in one.runs})) or "not scored"
            rows.append(tag("tr", head, tag("td", f"no score: {why}", colspan=width - 1, class_="none first")))
            continue
        cells = []
        for name in names:
            part = one.domains.get(name, DomainEffect())
            by_split = {"dev": part.dev_effect, "external": part.external_effect}
            cells += [_cell(by_split[split], largest, first=split == splits[0]) for split in splits]
        rows.append(tag("tr", head, *cells))
    return tag("tbody", *rows)


def _cell(effect: EffectValue | None, largest: float, *, first: bool) -> Markup:
    edge = "first" if first else None
    if effect is None:
        return tag("td", "·", class_=f"none {edge or ''}".strip())
    clear = effect.low > 0 or effect.high < 0
    told = f"{points(effect.mean)} [{points(effect.low)}, {points(effect.high)}] points"
    return tag(
        "td",
        tag("b" if clear else "span", points(effect.mean)),
        title=told,
        class_=edge,
        style=colour(effect.mean, largest),
    )


def colour(value: float, largest: float) -> str:
    """The cell's colour: the page's pole for its sign, in proportion to its size."""
    pole = "--rise" if value > 0 else "--fall"
    return f"background:color-mix(in oklab,var({pole}) {STRONGEST * min(1.0, abs(value) / largest):.0f}%,var(--card))"


def _key(largest: float) -> Markup:
    steps = [tag("span", points(share * largest), style=colour(share, 1.0)) for share in (-1, -0.5, 0, 0.5, 1)]
    return tag("p", "worse ", *steps, " better", class_="key")
