"""The tables of a round: its candidates with every effect, its verdicts with every figure, its runs and families."""

import statistics
from typing import Any

from megatron_evolve.comparisons import INTERVAL_ALPHA
from megatron_evolve.evidence import CandidateEvidence
from megatron_evolve.explain import told_verdicts
from megatron_evolve.reading import smallest_visible
from megatron_evolve.report.chronicle import Chapter, Chronicle
from megatron_evolve.report.figures import NOTHING, Quotes, digest, label, ratio, seconds, size
from megatron_evolve.report.markup import Markup, cell, fold, join, note, section, table, tag
from megatron_evolve.report.wording import (
    change_words,
    effect_words,
    ending_badge,
    outcome_badge,
    scope_words,
)

SCORED_SPLITS = ("dev-a", "dev-b", "external-a", "external-b")
SIDES = ("dev", "external")
BOUNDS = ("d_dev", "d_external", "gap")


def rounds(chronicle: Chronicle, quotes: Quotes) -> Markup:
    """Every round in full."""
    told = [_round(chapter, quotes, _again(chronicle, chapter.number)) for chapter in chronicle.chapters]
    if not told:
        return section("rounds", "Rounds", tag("p", "No round has been opened yet."))
    how = (
        "Effects are paired differences to the same round's anchor on the same items, in points, with 95\u00a0% "
        "intervals, bold where they leave zero out. The standard error beside a score is that of one run's items."
    )
    what = (
        "Verdicts judge the explorer that the A half selected, the mean of all explorers with an external score, or "
        "the standing settings against the origin (cumulative)."
    )
    return section("rounds", "Rounds", note(how, " ", what), *told)


def _again(chronicle: Chronicle, number: int) -> Markup | None:
    """Which halves of a CSV target asked rows of an earlier round in this one."""
    again = [split for split, anew in chronicle.opened.get("rounds_anew", {}).items() if number > anew]
    if not again:
        return None
    return note(f"Rows of {' and '.join(again)} were asked in an earlier round: their luck is shared with it.")


def _round(chapter: Chapter, quotes: Quotes, again: Markup | None) -> Markup:
    policy, here = chapter.policy, ("rounds", chapter.place)
    parts = [
        tag("h3", "Round ", chapter.number, " ", tag("span", policy.mode, class_="badge mode")),
        _opening(chapter, quotes, here),
        again,
        _candidates(chapter, quotes, here),
    ]
    if chapter.evidence:
        parts += [_verdict_lines(quotes, here), _all_verdicts(quotes, here), _families(chapter, quotes, here)]
    parts += [_runs(chapter, quotes, here), _hypotheses(chapter)]
    return tag("article", *parts, id=f"round-{chapter.number}")


def _opening(chapter: Chapter, quotes: Quotes, here: tuple[Any, ...]) -> Markup:
    smallest = quotes.at(*here, "minimum_detectable_effect")
    visible: list[Any] = ["The round is open: no evidence yet."]
    if chapter.evidence:
        visible = ["The smallest visible effect is unknown: nothing was scored twice."]
    if smallest is not None:
        figure = quotes.number(*here, "minimum_detectable_effect", form=size)
        visible = [
            "Smallest effect it would have seen on dev: ",
            figure,
            " points (80\u00a0% power, one-sided 5\u00a0%).",
        ]
    policy = chapter.policy
    return tag(
        "p",
        f"Searched for the {policy.objective} score under policy ",
        digest(quotes.at(*here, "policy")),
        f" along {', '.join(axis.name for axis in policy.open_axes())}. ",
        *visible,
    )


# --- candidates -----------------------------------------------------------------------------------------------------


def _candidates(chapter: Chapter, quotes: Quotes, here: tuple[Any, ...]) -> Markup:
    rows = []
    by_name = {one.id: one for one in chapter.evidence.candidates} if chapter.evidence else {}
    for place, one in enumerate(quotes.at(*here, "candidates")):
        found = by_name.get(one["id"])
        there = (*here, "candidates", place)
        dev, outside = chapter.effects_of(found) if found else (None, None)
        rows.append(
            [
                _name(chapter, one, found),
                change_words(_change(chapter, one["id"], found)),
                _endings(one["runs"], found.refused if found else ""),
                quotes.score(*there, "dev"),
                quotes.score(*there, "external"),
                effect_words(dev),
                effect_words(outside),
            ]
        )
    if not rows:
        return note("No run has ended yet.")
    columns = ("candidate", "change", "runs", "dev ± se", "external ± se", "dev effect", "external effect")
    told = "External selected in this round, so external effects are on the half that did not select."
    halved = note(told) if chapter.policy.objective == "external" else None
    return join([table(f"Candidates of round {chapter.number}", columns, rows), halved])


def _name(chapter: Chapter, one: dict[str, Any], found: CandidateEvidence | None) -> Markup:
    labels = []
    if chapter.evidence and chapter.evidence.selected == one["id"]:
        labels.append(tag("span", "selected", class_="badge small"))
    if chapter.promoted and chapter.promoted.id == one["id"]:
        labels.append(tag("span", "moved in", class_="badge small good"))
    if found and found.gain:
        labels.append(tag("span", "gain (Holm, 5\u00a0%)", class_="badge small good"))
    if found and found.confirmed:
        labels.append(tag("span", "a further seed agrees", class_="badge small"))
    return join([tag("b", one["axis"]), tag("br"), digest(one["id"]), *(join([" ", one]) for one in labels)])


def _change(chapter: Chapter, name: str, found: CandidateEvidence | None) -> dict[str, Any]:
    if found is not None:
        return found.change
    return next((one.change for one in chapter.proposed if one.candidate == name), {})


def _endings(runs: list[dict[str, Any]], refused: str) -> Markup:
    if refused:
        return join([ending_badge("refused"), " ", refused])
    failed = [ending_badge(run["outcome"]) for run in runs if run["outcome"] != "finished"]
    finished = len(runs) - len(failed)
    told = tag("span", f"{finished} finished", class_="score") if finished else None
    return join([told, *failed], " ")


def _hypotheses(chapter: Chapter) -> Markup | None:
    rows = [
        [one.axis, digest(one.candidate), one.hypothesis, change_words(one.change)]
        for one in chapter.proposed
        if one.candidate
    ]
    if not rows:
        return None
    return fold(
        "Hypotheses, in the workers' words", table("Proposals", ("axis", "candidate", "hypothesis", "change"), rows)
    )


# --- verdicts -------------------------------------------------------------------------------------------------------


def _verdict_lines(quotes: Quotes, here: tuple[Any, ...]) -> Markup:
    lines = [
        tag("li", outcome_badge(one["outcome"]), " ", tag("b", scope_words(one)), ". ", one["reason"])
        for one in told_verdicts(quotes.at(*here, "verdicts"))
    ]
    if not lines:
        return note("No verdict was asked for.")
    return tag("ul", *lines, class_="verdicts")


def _all_verdicts(quotes: Quotes, here: tuple[Any, ...]) -> Markup | None:
    verdicts = quotes.at(*here, "verdicts")
    if not verdicts:
        return None
    columns = ("about", "outcome", "dev gain D", "external gain T", "gap G", "slope T/D", "df", "level spent")
    columns += ("smallest visible", "ranking usable", "reason")
    rows = []
    for place, one in enumerate(verdicts):
        there = (*here, "verdicts", place)
        rows.append(
            [
                scope_words(one),
                outcome_badge(one["outcome"]),
                *(_bounds(quotes, *there, name) for name in BOUNDS),
                quotes.number(*there, "transfer_slope", form=ratio),
                quotes.number(*there, "df", form=lambda value: f"{value:.0f}"),
                quotes.number(*there, "alpha_spent"),
                quotes.number(*there, "minimum_detectable_effect", form=size),
                "yes" if one["ranking_usable"] else "no",
                tag("div", one["reason"], class_="prose"),
            ]
        )
    return fold(
        f"All {len(verdicts)} verdicts with their figures",
        table("Verdicts, in points; each bound at its share of the campaign's level", columns, rows, (5, 6, 7, 8)),
    )


def _bounds(quotes: Quotes, *path: Any) -> Markup:
    if quotes.at(*path) is None:
        return NOTHING
    error, level = quotes.number(*path, "se", form=size), quotes.number(*path, "level")
    return join([quotes.interval(*path), tag("br"), tag("span", "se ", error, ", at ", level, class_="count")])


# --- runs and families ----------------------------------------------------------------------------------------------


def _runs(chapter: Chapter, quotes: Quotes, here: tuple[Any, ...]) -> Markup | None:
    rows = []
    by_name = {one.id: one for one in chapter.evidence.candidates} if chapter.evidence else {}
    for place, one in enumerate(quotes.at(*here, "candidates")):
        records = by_name[one["id"]].runs if one["id"] in by_name else ()
        for index, run in enumerate(one["runs"]):
            record = records[index] if index < len(records) else None
            scores = [record.scores.get(split) if record else None for split in SCORED_SPLITS]
            rows.append(
                [
                    one["axis"],
                    quotes.number(*here, "candidates", place, "runs", index, "seed", form=label),
                    "finished" if run["outcome"] == "finished" else ending_badge(run["outcome"]),
                    *(f"{score.mean:.3f}" if score else NOTHING for score in scores),
                    seconds(record.cpu_seconds) if record else NOTHING,
                ]
            )
    if not rows:
        return None
    columns = ("candidate", "seed", "ended", *SCORED_SPLITS, "CPU")
    return fold(f"All {len(rows)} runs, by seed", table("Runs", columns, rows, (1, 3, 4, 5, 6, 7)))


def _families(chapter: Chapter, quotes: Quotes, here: tuple[Any, ...]) -> Markup | None:
    candidates = quotes.at(*here, "candidates")
    names = list(dict.fromkeys(name for one in candidates for name in one["domains"]))
    if not names:
        return None
    rows = []
    for place, one in enumerate(candidates):
        for split in SIDES:
            scores = [quotes.score(*here, "candidates", place, "domains", name, split) for name in names]
            if any(score is not NOTHING for score in scores):
                rows.append([one["axis"], split, *(cell(score) for score in scores)])
    told = "What a family's difference to the anchor must truly be to be seen, in points (80\u00a0% power, two-sided "
    told += "5\u00a0%; the median over explorers), stands in the last lines."
    for split in SIDES:
        sizes = [_visible(chapter, name, split) for name in names]
        if any(one is not NOTHING for one in sizes):
            rows.append(["smallest visible", split, *sizes])
    columns = ("candidate", "on", *names)
    return fold("Accuracy by family", join([table("Accuracy by family", columns, rows), note(told)]))


def _visible(chapter: Chapter, family: str, split: str) -> str | Markup:
    """Smallest true effect of a typical explorer in one family that its interval leaves zero out of, in points."""
    held = [one.domains[family] for one in chapter.evidence.candidates if family in one.domains]
    found = [effect for one in held if (effect := one.dev_effect if split == "dev" else one.external_effect)]
    if not found:
        return NOTHING
    return size(statistics.median(smallest_visible(one.low, one.high, one.se, INTERVAL_ALPHA) for one in found))
