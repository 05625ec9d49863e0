"""The records: what failed or was refused, dead ends, looks, cost and the frozen rules, as the campaign wrote them."""

from collections import defaultdict
from typing import Any

from megatron_evolve.report.chronicle import Chronicle
from megatron_evolve.report.figures import Quotes, digest, plain, seconds
from megatron_evolve.report.markup import Markup, fold, join, note, section, table, tag
from megatron_evolve.report.wording import change_words, ending_badge, words

STAGES = ("train", "dev", "external-a", "external-b", "final")


def failures(chronicle: Chronicle) -> Markup:
    """Runs that did not finish, and proposals that were refused."""
    axes = {chapter.number: chapter for chapter in chronicle.chapters}
    failed = []
    for event in chronicle.events:
        if event.kind == "ended" and event.data["end"]["outcome"] != "finished":
            number, name, seed, stage = event.key.split("/")
            chapter, end = axes.get(int(number)), event.data["end"]
            axis = chapter.axis_of(name) if chapter else "–"
            failed.append([number, axis, digest(name), seed, stage, ending_badge(end["outcome"]), end["reason"]])
    refused = [
        [chapter.number, one.worker, one.attempt + 1, one.axis, one.refused]
        for chapter in chronicle.chapters
        for one in chapter.proposed
        if one.refused
    ]
    parts = [note("A run that failed has a kind and a reason, never a score.")]
    columns = ("round", "axis", "candidate", "seed", "stage", "ended", "reason")
    parts.append(table("Runs that did not finish", columns, failed) if failed else tag("p", "Every run finished."))
    columns = ("round", "worker", "attempt", "axis", "reason")
    parts.append(table("Refused proposals", columns, refused) if refused else tag("p", "No proposal was refused."))
    return section("failures", "Failures", *parts)


def dead_ends(chronicle: Chronicle) -> Markup:
    """The registry as the last policy holds it."""
    last = chronicle.chapters[-1] if chronicle.chapters else None
    found = (last.following or last.policy).dead_ends if last else ()
    rows = [
        [one.round, one.axis, change_words(one.change), one.objective, digest(one.candidate), one.reason]
        for one in found
    ]
    columns = ("round", "axis", "change", "ruled out on", "candidate", "reason")
    told = table("Registry of dead ends", columns, rows) if rows else tag("p", "Nothing has been ruled out.")
    what = "Tried from the standing settings of their round, and lost; or the way back from a change that paid."
    return section("dead-ends", "Dead ends", note(what), told)


def looks(chronicle: Chronicle, quotes: Quotes) -> Markup:
    """The account of looks: who was asked what, in the order of asking."""
    if not chronicle.looks:
        return section("looks", "Account of looks", tag("p", "No score of the external target was asked."))
    counted: dict[tuple[int, str], list[Any]] = defaultdict(list)
    for look in chronicle.looks:
        counted[look.round, look.split].append(look)
    summary = [
        [number, split, len(found), plain(found[0].items), found[0].purpose]
        for (number, split), found in counted.items()
    ]
    rows = [
        [
            place,
            look.round,
            look.split,
            join(map(digest, look.candidates), " "),
            len(look.runs),
            look.items,
            look.purpose,
        ]
        for place, look in enumerate(chronicle.looks, start=1)
    ]
    spent, budget = (quotes.number("looks", name) for name in ("external", "external_budget"))
    told = (
        "Every question to the external target is entered before its answer is read. ",
        spent,
        " of ",
        budget,
        " spent.",
    )
    return section(
        "looks",
        "Account of looks",
        tag("p", *told),
        table("Looks by round and split", ("round", "split", "looks", "items each", "purpose"), summary, (2, 3)),
        fold(
            f"All {len(rows)} looks, in order",
            table("Looks", ("look", "round", "split", "candidates", "runs", "items", "purpose"), rows, (4, 5)),
        ),
    )


def cost(chronicle: Chronicle, quotes: Quotes) -> Markup:
    """CPU time by round and stage."""
    spent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    numbers = {str(chapter.number) for chapter in chronicle.chapters}
    for event in chronicle.events:
        if event.kind == "ended":
            number, _, _, stage = event.key.split("/")
            place = f"round {number}" if number in numbers else "closing comparison"
            spent[place][stage] += event.data["end"]["cpu_seconds"]
    stages = [stage for stage in STAGES if any(stage in by_stage for by_stage in spent.values())]
    rows = [
        [place, *(seconds(by_stage[stage]) for stage in stages), seconds(sum(by_stage.values()))]
        for place, by_stage in spent.items()
    ]
    totals = [seconds(sum(by_stage[stage] for by_stage in spent.values())) for stage in stages]
    rows.append([tag("b", "all"), *totals, tag("b", quotes.number("cpu_seconds", form=seconds))])
    numbered = range(1, len(stages) + 2)
    told = "Time of the jobs that ended; the substrate and the origin's training are made once and not counted here."
    return section("cost", "Cost", table("CPU time by round", ("", *stages, "total"), rows, numbered), note(told))


def ground(chronicle: Chronicle, quotes: Quotes) -> Markup:
    """The constitution in short, and the digests that pin everything."""
    rules, opened = chronicle.rules, chronicle.opened
    told = [
        ("authority", f"the {rules.authority} score outranks dev"),
        ("promotion", f"{words(rules.promotion)}: weights never cross a round"),
        ("rounds, candidates, anchor seeds", f"{rules.rounds}, {rules.workers}, {rules.anchor_seeds}"),
        ("gap test", f"β₀ {rules.gap.beta0:g}, α {rules.gap.alpha:g} a campaign, window of {rules.gap.window} rounds"),
        ("a change moves in", f"P(better) at least {rules.promote_probability:g}, and a further seed agrees"),
        ("external looks", f"{rules.external_looks:,} at most"),
        ("mutation space", ", ".join(rules.mutation_space)),
        (
            "one run",
            f"at most {rules.limits.max_steps:,} steps, {rules.limits.max_rows:,} rows and "
            f"{seconds(rules.limits.run_seconds)} of wall time",
        ),
        ("repairs", f"{rules.repairs} a worker"),
    ]
    names = ("substrate", "judge", "constitution", "campaign", "decisions")
    digests = [[name, tag("code", opened[name], class_="whole")] for name in names if name in opened]
    return section(
        "ground",
        "Frozen ground",
        table("Constitution, in short", ("rule", "value"), told),
        table("Digests (sha256)", ("of", "digest"), digests),
        note(
            tag("code", "megatron-evolve verify"),
            " checks them, the ledger's chain, and makes every deterministic decision again.",
        ),
    )


def further_figures(quotes: Quotes, page: str) -> Markup | None:
    """Numbers of status that the page has not shown, so that it holds them all."""
    paths = quotes.unquoted(page)
    if not paths:
        return None
    rows = [[".".join(map(str, path)), quotes.number(*path)] for path in paths]
    told = table("Further figures of status", ("figure", "value"), rows, (1,))
    return section(
        "figures", "Further figures", fold(f"{len(paths)} figures of the status document not shown above", told)
    )
