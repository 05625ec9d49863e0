"""The survey's section: the standing settings on every external item kept for the end, sub-family by sub-family."""

from megatron_evolve.report.figures import Quotes, accuracy
from megatron_evolve.report.markup import Markup, join, note, section, table

COLUMNS = ("sub-family", "items", "accuracy", "95\u00a0% interval", "exact text", "cut off", "no box")


def survey_section(quotes: Quotes) -> Markup | None:
    """One row a sub-family; none before the campaign is closed."""
    found = quotes.at("survey")
    if found is None or not found["subfamilies"]:
        return None
    rows = []
    for name in found["subfamilies"]:
        here = ("survey", "subfamilies", name)
        low, high = (quotes.number(*here, key, form=accuracy) for key in ("low", "high"))
        shares = [quotes.number(*here, key, form=accuracy) for key in ("exact", "truncated", "missing_box")]
        counted = (quotes.number(*here, "items"), quotes.number(*here, "accuracy", form=accuracy))
        rows.append((name, *counted, join([low, " to ", high]), *shares))
    return section(
        "survey",
        "What the standing settings can do",
        table("External items kept for the end, by sub-family", COLUMNS, rows, (1, 2, 3, 4, 5, 6)),
        note(
            "Means over ",
            quotes.number("survey", "runs"),
            " runs on ",
            quotes.number("survey", "items"),
            " items. Accuracy is the official metric; exact text counts no tolerance. The interval is of the items.",
        ),
        note("The open rows of the target are not among them: the rounds had spent every external look.")
        if found.get("unasked")
        else None,
    )
