"""The summary: what the campaign is, what it found, what it may claim, and each round on one line."""

from datetime import datetime
from typing import Any

from megatron_evolve.budget import WORDS
from megatron_evolve.campaign import ExternalCsv
from megatron_evolve.explain import told_verdicts
from megatron_evolve.report.charts import beside, final_strip
from megatron_evolve.report.chronicle import Chapter, Chronicle
from megatron_evolve.report.figures import NOTHING, Quotes, accuracy, digest, plain, probability, seconds, size
from megatron_evolve.report.markup import Markup, join, note, section, table, tag
from megatron_evolve.report.wording import (
    change_words,
    effect_words,
    outcome_badge,
    scope_words,
)
from megatron_evolve.reuse import reuse_words

STATES = {
    "preparing": "Substrate, judge and origin are being made; no round has been opened yet.",
    "paused": "The campaign is paused by failures of its machine; figures below are those of the rounds so far.",
    "running": "The campaign is not closed: figures below are those of the rounds so far.",
}


def header(chronicle: Chronicle, quotes: Quotes) -> Markup:
    """Name, state, claim, the finding in one sentence, and the figures that everything else rests on."""
    name, state = quotes.at("campaign") or "A campaign", quotes.at("state")
    claim = quotes.at("claim")
    labels = [tag("span", state, class_=f"badge {state}")]
    labels += [tag("span", f"claim: {claim}", class_="badge claim")] if claim else []
    finding = quotes.at("closing", "finding") or STATES.get(state, "")
    said = f"{finding[:1].upper()}{finding[1:]}"
    return tag(
        "header",
        tag("p", "Campaign report", class_="kicker"),
        tag("h1", name, *(join([" ", label]) for label in labels)),
        tag("p", said, class_="finding"),
        _facts(chronicle, quotes) if chronicle.opened else None,
    )


def _facts(chronicle: Chronicle, quotes: Quotes) -> Markup:
    rules, first, last = chronicle.rules, chronicle.events[0].time, chronicle.events[-1].time
    moment = datetime.fromisoformat
    looks = join(
        [
            quotes.number("looks", "external"),
            " of ",
            quotes.number("looks", "external_budget"),
            " external, ",
            quotes.number("looks", "dev"),
            " dev",
        ]
    )
    entries = [
        ("rounds", f"{len(chronicle.judged)} judged of {rules.rounds}"),
        ("candidates", f"{rules.workers} a round, anchor included"),
        ("human interventions", quotes.number("interventions")),
        ("looks", looks),
        ("cost", join([quotes.number("cpu_seconds", form=seconds), " of CPU"])),
        *(
            (
                f"budget of {WORDS[name]}",
                join([quotes.number("budget", name, "used"), " of ", quotes.number("budget", name, "budget")]),
            )
            for name in quotes.at("budget") or ()
        ),
        ("opened", f"{first[:16].replace('T', ' ')} UTC"),
        ("from first to last event", seconds((moment(last) - moment(first)).total_seconds())),
        ("version", chronicle.opened["version"]),
        ("substrate", digest(quotes.at("substrate"))),
        ("judge", digest(quotes.at("judge"))),
        ("constitution", digest(chronicle.opened["constitution"])),
    ]
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in entries), class_="facts")


# --- limits ---------------------------------------------------------------------------------------------------------


def limits(chronicle: Chronicle, quotes: Quotes) -> Markup:
    """What this campaign may and may not claim, from its own declaration and figures."""
    rules = chronicle.rules
    may = [_claim(chronicle, quotes)]
    if quotes.at("state") != "closed":
        may = ["Nothing yet: the campaign is not closed."]
    external = chronicle.campaign.judge.external
    if external is not None:
        may.append(
            f"That any verdict DECOUPLED or INVERSE is a false alarm has probability {rules.gap.alpha:g} at most, for "
            f"all {rules.rounds} declared rounds together."
        )
    may_not = [
        "A candidate's effect in a round is for acting, not for claiming: the best of several looks better than it is.",
        "UNRESOLVED does not say that dev tracks the target; it says that this campaign could not tell.",
        "One campaign, one substrate, one seed: nothing here speaks of other models, tasks or sizes.",
    ]
    if external is None:
        may_not.append("There is no external target: whether any dev effect means something outside is unknown.")
    elif isinstance(external, ExternalCsv):
        anew = chronicle.opened.get("rounds_anew")
        told = reuse_words(anew, rules.rounds) if anew else ["its rows may return in later rounds: rounds share luck"]
        may_not.append(f"External items come from one file: {'; '.join(told)}.")
    if quotes.at("interventions"):
        may_not.append("People intervened, so the result is not the loop's alone.")
    return section(
        "limits",
        "What this campaign may claim, and what not",
        tag("div", _list("It may say", may, "may"), _list("It may not say", may_not, "may-not"), class_="pair"),
    )


def _list(title: str, entries: list[str], kind: str) -> Markup:
    return tag("div", tag("h3", title), tag("ul", *(tag("li", entry) for entry in entries)), class_=f"box {kind}")


def _claim(chronicle: Chronicle, quotes: Quotes) -> str:
    if quotes.at("claim") != "performance":
        return "That the loop closed on its own: it declared infrastructure, so no figure here claims a better recipe."
    gain = quotes.at("closing", "final", "gain")
    if gain is None:
        return "It declared performance against the origin, and there is no measured difference, so nothing is claimed."
    held = (
        "zero lies in its 95\u00a0% interval, so no difference is shown"
        if gain["low"] <= 0 <= gain["high"]
        else ("zero lies outside its 95\u00a0% interval; this one comparison was declared before the first round")
    )
    return f"It declared performance against the origin, measured once on sealed items with fresh seeds: {held}."


# --- final comparison -----------------------------------------------------------------------------------------------


def final_comparison(quotes: Quotes) -> Markup | None:
    """The standing settings against the origin on the sealed items."""
    final = quotes.at("closing", "final")
    if final is None:
        return None
    here = ("closing", "final")
    if "gain" not in final:
        told = (
            "The standing settings are still the origin's: there is nothing to compare."
            if final.get("same")
            else (f"There is no comparison: {final.get('failed', 'no score')}.")
        )
        return section("final", "Standing settings against the origin", tag("p", told))
    rows = [
        (
            name,
            digest(final[name]),
            quotes.number(*here, "runs", name),
            quotes.number(*here, "accuracy", name, form=accuracy),
        )
        for name in ("standing", "origin")
    ]
    told = join(
        [
            "Difference ",
            quotes.interval(*here, "gain"),
            " points (95\u00a0% interval; standard error ",
            quotes.number(*here, "gain", "se", form=lambda value: f"{100 * value:.2f}"),
            "), P(better) ",
            quotes.number(*here, "gain", "p_better", form=probability),
            ", on ",
            quotes.number(*here, "items"),
            " items of the external target that no round had asked. ",
            *_visible(quotes, *here, "gain", "minimum_detectable_effect"),
        ]
    )
    return section(
        "final",
        "Standing settings against the origin",
        tag("p", told, class_="lead"),
        beside(
            final_strip(final["gain"]),
            table("Sealed items, asked once at the end", ("settings", "candidate", "runs", "accuracy"), rows, (2, 3)),
        ),
    )


def _visible(quotes: Quotes, *path: Any) -> tuple[Any, ...]:
    if quotes.at(*path) is None:
        return ("The smallest visible difference is unknown.",)
    return (
        "Smallest difference it would have seen: ",
        quotes.number(*path, form=size),
        " points (80\u00a0% power, zero outside the interval).",
    )


# --- rounds on one line each ----------------------------------------------------------------------------------------


def rounds_at_a_glance(chronicle: Chronicle, quotes: Quotes) -> Markup:
    """One line a round: what was searched for, where the anchor stood, what was said, what moved."""
    columns = ("round", "searched", "anchor, dev", "anchor, external", "verdicts", "moved into the standing settings")
    columns += ("on dev, points", "on external, points")
    rows = [_glance(chapter, quotes) for chapter in chronicle.chapters]
    return join(
        [
            table("Rounds at a glance", columns, rows),
            note(
                "The anchor of a round is the standing settings, unchanged. A change moves in when its probability of "
                f"being better reaches {chronicle.rules.promote_probability:g} and a further seed agrees; its effects "
                "are those against the anchor of its own round. Bold: the 95\u00a0% interval leaves zero out."
            ),
        ]
    )


def _objective(chapter: Chapter) -> Markup:
    return tag("span", f"for {chapter.policy.objective}", class_="muted")


def _glance(chapter: Chapter, quotes: Quotes) -> list[Any]:
    here = ("rounds", chapter.place)
    candidates = quotes.at(*here, "candidates") or []
    anchor = next((place for place, one in enumerate(candidates) if one["role"] == "anchor"), None)
    scores = [quotes.score(*here, "candidates", anchor, split) for split in ("dev", "external")]
    told = told_verdicts(quotes.at(*here, "verdicts"))
    verdicts = [tag("li", outcome_badge(one["outcome"]), " ", scope_words(one)) for one in told]
    dev, outside = chapter.effects_of(chapter.promoted) if chapter.promoted else (None, None)
    if chapter.evidence is None:
        moved: Any = tag("span", "round is open", class_="none")
    elif chapter.promoted:
        moved = join([tag("b", chapter.promoted.axis), change_words(chapter.moved)])
    else:
        moved = change_words(chapter.moved) if chapter.moved else tag("span", "nothing", class_="none")
    return [
        quotes.number(*here, "round", form=plain),
        join([tag("span", chapter.policy.mode, class_="score"), tag("br"), _objective(chapter)]),
        *scores,
        tag("ul", *verdicts, class_="plain") if verdicts else NOTHING,
        moved,
        effect_words(dev),
        effect_words(outside),
    ]
