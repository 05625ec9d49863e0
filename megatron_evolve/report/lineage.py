"""The lineage of policies: each as a card, and each step as its typed edits with reasons and the evidence they cite."""

from collections.abc import Sequence
from typing import Any

from megatron_evolve.delta import canonical_change
from megatron_evolve.policy import Edit, SearchPolicy, struck
from megatron_evolve.report.chronicle import Chapter, Chronicle
from megatron_evolve.report.markup import Markup, fold, note, section, table, tag
from megatron_evolve.report.wording import change_words, cited_words, clipped, path_words, shown

# Edits that only carry the round's outcome over: what the anchor scored, which round is next.
BOOKKEEPING = ("domains.", "round")
SHOWN_POINTERS = 4


def lineage(chronicle: Chronicle) -> Markup | None:
    """All policies in order, and what led from each to the next."""
    if not chronicle.chapters:
        return None
    policies = [chapter.policy for chapter in chronicle.chapters]
    if last := chronicle.chapters[-1].following:
        policies.append(last)
    before: list[SearchPolicy | None] = [None, *policies]
    cards = [_card(one, earlier) for one, earlier in zip(policies, before, strict=False)]
    steps = [_step(chapter) for chapter in chronicle.chapters if chapter.following is not None]
    total = canonical_change(policies[0].standing, policies[-1].standing)
    return section(
        "lineage",
        "Lineage of policies",
        note("Between rounds only the search policy survives, with its dead ends. Marked: what changed on the way."),
        tag("ol", *cards, class_="chain"),
        tag("h3", "Standing settings, first to last"),
        change_words(total) if total else tag("p", "The standing settings have not moved.", class_="none"),
        *steps,
    )


def _card(policy: SearchPolicy, before: SearchPolicy | None) -> Markup:
    def line(name: str, value: Any, old: Any) -> Markup:
        changed = before is not None and value != old
        kind = "changed" if changed else None
        return tag("li", f"{name} ", tag("mark" if changed else "b", value), class_=kind)

    fallen = sum(text.startswith(struck("")) for text in policy.premises)
    known = sum(text.startswith(struck("")) for text in before.premises) if before else 0
    moved = len(canonical_change(before.standing, policy.standing)) if before else 0
    lines = [
        line("mode", policy.mode, before and before.mode),
        line("objective", policy.objective, before and before.objective),
        line("open axes", len(policy.open_axes()), before and len(before.open_axes())),
        line("waiting changes", len(policy.pending), before and len(before.pending)),
        line("premises struck", fallen, known),
        line("dead ends", len(policy.dead_ends), before and len(before.dead_ends)),
        tag("li", tag("mark", f"{moved} setting{'s' * (moved > 1)} moved")) if moved else None,
    ]
    return tag("li", tag("h4", f"Policy {policy.round}"), tag("ul", *lines, class_="plain"))


def _step(chapter: Chapter) -> Markup:
    document = chapter.evidence.model_dump(mode="json", by_alias=True) if chapter.evidence else {}
    plain = [edit for edit in chapter.edits if not edit.path.startswith(BOOKKEEPING)]
    rest = [edit for edit in chapter.edits if edit.path.startswith(BOOKKEEPING)]
    parts = [tag("h3", f"Policy {chapter.number} → {chapter.following.round}"), _premises(chapter)]
    if plain:
        parts.append(_edits("Edits, grouped by their reason", plain, document))
    else:
        parts.append(note("Nothing but bookkeeping changed."))
    if rest:
        parts.append(fold(f"{len(rest)} bookkeeping edits", _edits("Bookkeeping", rest, document)))
    return tag("article", *parts)


def _premises(chapter: Chapter) -> Markup | None:
    before, after = set(chapter.policy.premises), set(chapter.following.premises)
    told = [
        tag("li", tag("s", text.removeprefix(struck(""))), " ", tag("span", "▲ falsified", class_="badge alarm"))
        if text.startswith(struck(""))
        else tag("li", text, " ", tag("span", "✓ holds again", class_="badge tracking"))
        for text in chapter.following.premises
        if text in after - before
    ]
    return tag("ul", *told, class_="premises") if told else None


def _edits(caption: str, edits: Sequence[Edit], document: dict[str, Any]) -> Markup:
    """One row for each reason: meta often changes several fields on one finding."""
    grouped: dict[tuple[str, tuple[str, ...]], list[Edit]] = {}
    for edit in edits:
        grouped.setdefault((edit.reason, edit.evidence), []).append(edit)
    rows = [
        [tag("ul", *(_change(edit) for edit in group), class_="changes"), reason, _evidence(cited, document)]
        for (reason, cited), group in grouped.items()
    ]
    return table(caption, ("change", "reason", "evidence"), rows)


def _change(edit: Edit) -> Markup:
    before, after = (clipped(shown(value)) for value in (edit.before, edit.after))
    kind = "turn" if edit.path in ("mode", "objective") else None
    return tag("li", path_words(edit.path), f" {before} → ", tag("b", after), class_=kind)


def _evidence(cited: Sequence[str], document: dict[str, Any]) -> Markup:
    lines = [tag("li", tag("code", pointer), " ", cited_words(document, pointer)) for pointer in cited[:SHOWN_POINTERS]]
    if more := cited[SHOWN_POINTERS:]:
        lines.append(tag("li", f"and {len(more)} more", title=", ".join(more), class_="muted"))
    return tag("ul", *lines, class_="plain cited")
