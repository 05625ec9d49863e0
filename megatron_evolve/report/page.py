"""The page: the report's parts in reading order, written whole as one HTML file that needs nothing else.

First what was found and what it may claim, then how it came about, then the records. No script, no font, no picture is
fetched: the file reads the same on a cluster without internet.
"""

from pathlib import Path

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.launch.rundir import make_folder, write_whole
from megatron_evolve.report.charts import trajectory, transfer
from megatron_evolve.report.chronicle import Chronicle, read_chronicle
from megatron_evolve.report.figures import Quotes
from megatron_evolve.report.heatmap import heatmap
from megatron_evolve.report.lineage import lineage
from megatron_evolve.report.markup import Markup, join, section, tag
from megatron_evolve.report.records import cost, dead_ends, failures, further_figures, ground, looks
from megatron_evolve.report.style import STYLE
from megatron_evolve.report.summary import final_comparison, header, limits, rounds_at_a_glance
from megatron_evolve.report.survey import survey_section
from megatron_evolve.report.tables import rounds

CONTENTS = {
    "limits": "Limits",
    "final": "Against the origin",
    "survey": "Sub-families",
    "course": "Course",
    "transfer": "Dev against external",
    "families": "Families",
    "lineage": "Policies",
    "rounds": "Rounds",
    "failures": "Failures",
    "dead-ends": "Dead ends",
    "looks": "Looks",
    "cost": "Cost",
    "ground": "Frozen ground",
}


def write_report(root: Path, out: Path | None) -> Path:
    """Writes the report of the campaign in `root` to `out` (`root`/report.html if None) and returns its path.

    Raises ValueError in one sentence where `root` holds no campaign, or a file that the ledger does not know.
    """
    path = Path(out) if out is not None else CampaignFolder(root).report
    document = page(read_chronicle(Path(root)))  # before a folder is made
    make_folder(path.parent)
    write_whole(path, document)
    return path


def page(chronicle: Chronicle) -> str:
    """The whole document."""
    quotes = Quotes(chronicle.status)
    top, parts = header(chronicle, quotes), _parts(chronicle, quotes)
    shown = join([top, *parts])
    parts.append(further_figures(quotes, shown))
    main = tag("main", *parts)
    name = chronicle.status["campaign"] or "campaign"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{name}: campaign report"),
        tag("style", Markup(STYLE)),
    )
    body = tag("body", top, _contents(main), main, _footer(chronicle))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _parts(chronicle: Chronicle, quotes: Quotes) -> list[Markup | None]:
    if not chronicle.opened:
        return [section("rounds", "Rounds", tag("p", "No round has been opened yet: run the campaign."))]
    chart, scatter = trajectory(chronicle), transfer(chronicle)
    external = chronicle.campaign.judge.external
    why = "There is no external target." if external is None else "No explorer has both effects yet."
    return [
        limits(chronicle, quotes),
        final_comparison(quotes),
        survey_section(quotes),
        section("course", "Course of the campaign", chart, rounds_at_a_glance(chronicle, quotes)),
        section("transfer", "Dev against external", scatter or tag("p", why, class_="none")),
        heatmap(chronicle),
        lineage(chronicle),
        rounds(chronicle, quotes),
        failures(chronicle),
        dead_ends(chronicle),
        looks(chronicle, quotes),
        cost(chronicle, quotes),
        ground(chronicle, quotes),
    ]


def _contents(main: str) -> Markup:
    entries = [
        tag("li", tag("a", title, href=f"#{name}"))
        for name, title in CONTENTS.items()
        if f'<section id="{name}"' in main
    ]
    return tag("nav", tag("ul", *entries), aria_label="Contents")


def _footer(chronicle: Chronicle) -> Markup:
    last = f" Ledger of {len(chronicle.events):,} events." if chronicle.events else ""
    return tag(
        "footer",
        tag(
            "p",
            f"Written by megatron-evolve from the campaign's folder alone.{last} Numbers that ",
            tag("code", "status --json"),
            " holds carry their path in data-status and their exact value in data-value.",
        ),
    )
