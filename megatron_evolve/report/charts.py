"""The charts: how the anchor's scores went, what of each dev effect reached the target, and the final comparison."""

import math
from collections.abc import Sequence
from typing import Any

from megatron_evolve.evidence import CandidateEvidence, EffectValue
from megatron_evolve.report.chronicle import Chapter, Chronicle
from megatron_evolve.report.figures import accuracy, points
from megatron_evolve.report.markup import Markup, join, note, tag
from megatron_evolve.report.svg import Board, Scale, drawing, legend, mark, polyline, spanning, words_at
from megatron_evolve.report.wording import MARKS, OVERALL
from megatron_evolve.stance import ALARMS

NORMAL_95 = 1.96
LABELLED_ROUNDS = 12
LINE_HEIGHT = 15
SPLITS = ("dev", "external")


def beside(chart: Markup, *told: Markup) -> Markup:
    """A chart with its explanation at its side, or below it where there is no room."""
    return tag("figure", chart, tag("figcaption", *told))


# --- trajectory -----------------------------------------------------------------------------------------------------


def trajectory(chronicle: Chronicle) -> Markup | None:
    """The anchor's dev and external accuracy by round, with what A-half selection picked beside it."""
    judged = chronicle.judged
    if not judged:
        return None
    found = [_scores_of(chapter) for chapter in judged]
    ends = [
        score.mean + reach * score.se
        for pair in found
        for one, reaches in zip(pair, ((-NORMAL_95, NORMAL_95), (0.0,)), strict=True)
        for score in _scores(one)
        for reach in reaches
    ]
    if not ends:
        return None
    low, high = spanning(ends, 0.08, 0.05)
    board = Board(Scale(-0.5, len(judged) - 0.2, 56, 690), Scale(max(0, low), min(1, high), 290, 44), 790, 372)
    marks = [board.grid(lambda value: f"{value:.2f}", "accuracy"), _rounds_below(board, judged)]
    for split in SPLITS:
        marks.append(_anchor_line(board, split, [anchor for anchor, _ in found], judged))
    marks.append(_names(board, found[-1][0], len(found) - 1))
    for place, (_, selected) in enumerate(found):
        marks += _selected_marks(board, place, selected, judged[place].number)
    title = "The anchor's accuracy by round"
    told = "; ".join(_told_round(chapter, anchor) for chapter, (anchor, _) in zip(judged, found, strict=True))
    drawn = [split for split in SPLITS if any(getattr(one, split) for pair in found for one in pair if one)]
    entries = [(f"dot {split}", f"anchor, {split}") for split in drawn]
    entries += [(f"ring {split}", f"selected explorer, {split}") for split in drawn]
    return beside(
        drawing("trajectory", title, told, (board.width, board.height), *marks),
        tag("h3", title),
        legend(entries),
        note(
            "Bars are 95\u00a0% intervals of one run's items; seeds come on top. Items differ from round to round, so "
            "a step between rounds holds that luck too: paired effects within a round are in the tables."
        ),
    )


def _scores_of(chapter: Chapter) -> tuple[CandidateEvidence | None, CandidateEvidence | None]:
    by_name = {one.id: one for one in chapter.evidence.candidates}
    return by_name.get(chapter.evidence.anchor), by_name.get(chapter.evidence.selected)


def _scores(one: CandidateEvidence | None) -> list[Any]:
    return [score for score in (one.dev, one.external) if score] if one else []


def _anchor_line(
    board: Board, split: str, anchors: Sequence[CandidateEvidence | None], judged: Sequence[Chapter]
) -> Markup:
    scores = [(place, getattr(one, split)) for place, one in enumerate(anchors) if one and getattr(one, split)]
    if not scores:
        return Markup("")
    line = polyline([(board.x(place), board.y(score.mean)) for place, score in scores], f"line {split}")
    marks = []
    for place, score in scores:
        x, reach = board.x(place), NORMAL_95 * score.se
        told = f"round {judged[place].number}, anchor, {split}: {accuracy(score.mean)} ± {accuracy(score.se)}"
        bar = board.upright(x, score.mean - reach, score.mean + reach, f"bar {split}")
        marks.append(mark(join([bar, tag("circle", cx=x, cy=board.y(score.mean), r=5, class_=f"dot {split}")]), told))
    return tag("g", line, *marks)


def _names(board: Board, last: CandidateEvidence | None, place: int) -> Markup:
    """The splits' names beside the last anchor, moved apart where the lines meet."""
    named = sorted((board.y(getattr(last, split).mean), split) for split in SPLITS if last and getattr(last, split))
    heights = [height for height, _ in named]
    if len(heights) > 1 and (short := LINE_HEIGHT - (heights[1] - heights[0])) > 0:
        heights = [heights[0] - short / 2, heights[1] + short / 2]
    x = board.x(place) + 26
    return tag("g", *(words_at(x, y + 4, name, "series") for y, (_, name) in zip(heights, named, strict=True)))


def _selected_marks(board: Board, place: int, one: CandidateEvidence | None, number: int) -> list[Markup]:
    marks = []
    for split in SPLITS:
        score = getattr(one, split) if one else None
        if score:
            told = f"round {number}, selected ({one.axis}), {split}: {accuracy(score.mean)} ± {accuracy(score.se)}"
            ring = tag("circle", cx=board.x(place) + 15, cy=board.y(score.mean), r=4.5, class_=f"ring {split}")
            marks.append(mark(ring, told))
    return marks


def _rounds_below(board: Board, judged: Sequence[Chapter]) -> Markup:
    """Round numbers, and under them mode, objective and strongest verdict; thinned where many, but for alarms."""
    step, texts = math.ceil(len(judged) / LABELLED_ROUNDS), []
    for place, chapter in enumerate(judged):
        x, outcome = board.x(place), strongest_outcome(chapter)
        if place % step and outcome not in ALARMS:
            continue
        texts.append(words_at(x, 310, f"round {chapter.number}", "tick middle strong"))
        if len(judged) <= LABELLED_ROUNDS / 2:
            texts.append(words_at(x, 328, chapter.policy.mode, "tick middle"))
            texts.append(words_at(x, 344, f"for {chapter.policy.objective}", "tick middle"))
        kind = "alarm" if outcome in ALARMS else "quiet"
        shown = f"{MARKS[outcome]} {outcome}" if len(judged) <= LABELLED_ROUNDS / 2 else MARKS[outcome]
        texts.append(words_at(x, 364, shown, f"tick middle {kind}"))
    return tag("g", *texts)


def strongest_outcome(chapter: Chapter) -> str:
    """The outcome of a round in a word: an alarm anywhere, else what is said overall."""
    verdicts = chapter.evidence.verdicts
    said = [one["outcome"] for one in verdicts if one["outcome"] in ALARMS or one["domain"] == OVERALL]
    order = [*reversed(ALARMS), "TRACKING", "UNRESOLVED"]
    return min(said, key=order.index, default="UNRESOLVED")


def _told_round(chapter: Chapter, anchor: CandidateEvidence | None) -> str:
    scores = [
        f"{split} {accuracy(getattr(anchor, split).mean)}" for split in SPLITS if anchor and getattr(anchor, split)
    ]
    return f"round {chapter.number}: {', '.join(scores) or 'no score'}, {strongest_outcome(chapter).lower()}"


# --- transfer -------------------------------------------------------------------------------------------------------


def transfer(chronicle: Chronicle) -> Markup | None:
    """Each explorer's dev effect against its external effect, with intervals; one colour and one number a round."""
    marked = [
        (chapter, one, *chapter.effects_of(one)) for chapter in chronicle.judged for one in chapter.evidence.candidates
    ]
    marked = [entry for entry in marked if entry[2] and entry[3]]
    if not marked:
        return None
    beta0 = chronicle.rules.gap.beta0
    board = _square([effect for entry in marked for effect in entry[2:]])
    marks = [_wedge(board, beta0), board.grid(points, "external effect, points"), _quadrants(board)]
    marks += [board.columns(points, "dev effect, points"), _slopes(board, beta0)]
    shade = _shades(chronicle.judged)
    for crosses in (True, False):  # every cross lies under every point
        for chapter, one, dev, outside in marked:
            marks.append(_point(board, chapter, one, dev, outside, shade[chapter.number], crosses))
    told = (
        f"{len(marked)} candidates; {sum(_below(dev, out, beta0) for *_, dev, out in marked)} gained on dev with less "
        f"than {beta0:g} of it on the external target."
    )
    title = "What of each dev effect reached the external target"
    return beside(
        drawing("transfer", title, told, (board.width, board.height), *marks),
        tag("h3", title),
        note(
            "One point per explorer against the anchor of its own round, the round's number in it, later rounds "
            "further along the colour; arms are 95\u00a0% intervals."
        ),
        note(
            "On the line of slope 1 all of a dev effect arrived. In the shaded wedge less than "
            f"β₀ = {beta0:g} of a dev gain did, by the point estimate; whether that is more than chance is what the "
            "verdicts say."
        ),
        note("External items that selected in a round are left out of its points."),
    )


def _square(effects: Sequence[EffectValue]) -> Board:
    """Equal scales on both axes, zero inside; outliers' arms may leave the frame."""
    low = min(0.0, *(one.mean for one in effects)) - 0.02
    high = max(0.0, *(one.mean for one in effects)) + 0.02
    return Board(Scale(low, high, 62, 662), Scale(low, high, 590, 30), 690, 640)


def _wedge(board: Board, beta0: float) -> Markup:
    """Where dev rose and less than beta0 of it arrived."""
    x, y = board.x, board.y
    right = min(x.high, y.high / beta0)
    corners = [(x(0), y(0)), (x(right), y(beta0 * right)), (x.stop, y(min(y.high, beta0 * x.high)))]
    corners += [(x.stop, y.start), (x(0), y.start)]
    return tag("polygon", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in corners), class_="wedge")


def _slopes(board: Board, beta0: float) -> Markup:
    x, y = board.x, board.y
    zero = [
        tag("line", x1=x.start, x2=x.stop, y1=y(0), y2=y(0), class_="zero"),
        tag("line", x1=x(0), x2=x(0), y1=y.start, y2=y.stop, class_="zero"),
    ]
    lines = []
    for slope, kind, name in ((1.0, "slope one", "all arrives"), (beta0, "slope beta", f"β₀ = {beta0:g} arrives")):
        first, last = max(x.low, y.low / slope), min(x.high, y.high / slope)
        lines.append(polyline([(x(first), y(slope * first)), (x(last), y(slope * last))], kind))
        # Equal scales on both axes, so the angle on the page is the slope's own.
        turn = f"translate({x(last):.1f} {y(slope * last):.1f}) rotate({-math.degrees(math.atan(slope)):.1f})"
        lines.append(tag("g", words_at(-12, -7, name, "series end"), transform=turn))
    return tag("g", *zero, *lines)


def _quadrants(board: Board) -> Markup:
    x, y = board.x, board.y
    left, right, top, bottom = x.start + 8, x.stop - 8, y.stop + 16, y.start - 10
    return tag(
        "g",
        words_at(left, top, "dev worse, external better", "quadrant"),
        words_at(right, bottom, "dev better, external worse", "quadrant end"),
        words_at(x(0) - 8, bottom, "both worse", "quadrant end"),
        words_at(x(0) + 8, top, "both better", "quadrant"),
    )


def _shades(judged: Sequence[Chapter]) -> dict[int, str]:
    """A round's place among the rounds as a colour between the ramp's ends."""
    last = max(1, len(judged) - 1)
    return {chapter.number: f"--shade:{100 * place / last:.0f}%" for place, chapter in enumerate(judged)}


def _point(
    board: Board,
    chapter: Chapter,
    one: CandidateEvidence,
    dev: EffectValue,
    outside: EffectValue,
    shade: str,
    cross: bool,
) -> Markup:
    x, y = board.x(dev.mean), board.y(outside.mean)
    if cross:
        arms = [board.level(y, dev.low, dev.high, "arm"), board.upright(x, outside.low, outside.high, "arm")]
        return tag("g", *arms, style=shade)
    told = f"round {chapter.number}, {one.axis}: dev {points(dev.mean)}, external {points(outside.mean)} points"
    dot = tag("circle", cx=x, cy=y, r=8, class_="round")
    number = words_at(x, y + 3.5, chapter.number, "inside")
    return tag("g", tag("title", told), dot, number, style=shade)


def _below(dev: EffectValue, outside: EffectValue, beta0: float) -> bool:
    return dev.mean > 0 and outside.mean < beta0 * dev.mean


# --- final ----------------------------------------------------------------------------------------------------------


def final_strip(gain: dict[str, float]) -> Markup:
    """One interval on a line of points, with zero marked."""
    low, high = spanning([0.0, gain["low"], gain["high"]], 0.15, 0.04)
    board = Board(Scale(low, high, 20, 540), Scale(0, 1, 70, 10), 560, 92)
    y = board.y(0.5)
    marks = [
        board.columns(points, ""),
        tag("line", x1=board.x(0), x2=board.x(0), y1=10, y2=70, class_="zero"),
        board.level(y, gain["low"], gain["high"], "bar final"),
        tag("circle", cx=board.x(gain["mean"]), cy=y, r=6, class_="dot final"),
    ]
    mean, reach = points(gain["mean"]), f"{points(gain['low'])} to {points(gain['high'])}"
    told = f"{mean} points, 95\u00a0% interval {reach}; zero is marked."
    title = "Standing settings minus origin on the sealed items, in points"
    return drawing("final", title, told, (board.width, board.height), *marks)
