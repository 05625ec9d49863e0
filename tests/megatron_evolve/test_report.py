"""The report: the numbers of status, well-formed, self-contained, and safe against what a worker writes."""

import json
import os
import re
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.cli import app
from megatron_evolve.report import write_report
from megatron_evolve.report.chronicle import read_chronicle
from megatron_evolve.report.figures import NOTHING, Quotes, points, probability, seconds
from megatron_evolve.report.markup import Markup, tag
from megatron_evolve.report.svg import Scale
from megatron_evolve.report.wording import change_words, cited_words
from megatron_evolve.status import status
from tests.megatron_evolve.campaign_folder import MARKUP, build_campaign, build_empty

VOID = {"meta", "br", "hr", "wbr", "link", "img", "input"}
KINDS = ("closed", "running", "opened", "no-target", "empty")


class Page(HTMLParser):
    """Checks that every element is closed in order, and gathers quoted numbers, addresses and text."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.quoted: list[tuple[str, str]] = []
        self.addresses: list[str] = []
        self.identities: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(document)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        told = dict(attributes)
        self.tags.add(name)
        if name not in VOID:
            self.open.append(name)
        if "data-status" in told:
            self.quoted.append((told["data-status"], told["data-value"]))
        self.identities += [told["id"]] if "id" in told else []
        self.addresses += [told[key] for key in ("href", "src", "xlink:href", "action", "data") if key in told]

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open and self.open[-1] == name, f"</{name}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def campaigns(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("campaigns")
    return {
        "closed": build_campaign(root / "closed"),
        "running": build_campaign(root / "running", judged=2, closed=False),
        "opened": build_campaign(root / "opened", judged=0, closed=False),
        "no-target": build_campaign(root / "no-target", judged=2, external=False),
        "empty": build_empty(root / "empty"),
    }


@pytest.fixture(scope="module")
def documents(campaigns) -> dict[str, str]:
    return {name: write_report(root, None).read_text(encoding="utf-8") for name, root in campaigns.items()}


def numbers_of(path: tuple[Any, ...], value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from numbers_of((*path, key), one)
    elif isinstance(value, list):
        for place, one in enumerate(value):
            yield from numbers_of((*path, place), one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield ".".join(map(str, path)), value


@pytest.mark.parametrize("kind", KINDS)
def test_holds_every_number_of_status_exactly(kind, campaigns, documents) -> None:
    expected = dict(numbers_of((), json.loads(json.dumps(status(campaigns[kind])))))
    quoted = Page(documents[kind]).quoted
    for path, value in quoted:
        assert json.loads(value) == expected[path], path
    assert {path for path, _ in quoted} == set(expected)


def test_no_number_is_left_to_the_further_figures(documents) -> None:
    for document in documents.values():
        assert '<section id="figures"' not in document


@pytest.mark.parametrize("kind", KINDS)
def test_is_well_formed_and_needs_nothing_from_outside(kind, documents) -> None:
    page = Page(documents[kind])
    assert len(page.identities) == len(set(page.identities))
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed"}
    for address in page.addresses:
        assert address.startswith("#") and address[1:] in page.identities
    rest = documents[kind].replace("http://www.w3.org/2000/svg", "")
    assert not re.findall(r"https?:|url\(|@import|//\w+\.", rest)


def test_what_a_worker_wrote_stays_text(documents) -> None:
    assert "<script" not in documents["closed"]
    assert MARKUP in " ".join(Page(documents["closed"]).words)


def test_tells_finding_failures_dead_ends_refusals_and_moves(campaigns, documents) -> None:
    told = " ".join(" ".join(Page(documents["closed"]).words).split())
    closing = status(campaigns["closed"])["closing"]
    assert closing["finding"][1:] in told
    for part in ("diverged at step 37", "out of memory", "timed out", "recipe.lr: expected at most 1.0, got 30.0"):
        assert part in told
    for part in (
        "DECOUPLED",
        "TRACKING",
        "falsified",
        "moved in",
        "proxy-aware",
        "Registry of dead ends",
    ):
        assert part in told


def test_every_cited_pointer_is_shown_with_its_value(documents) -> None:
    assert "does not resolve" not in documents["closed"]
    assert "DECOUPLED, selected, overall" in documents["closed"]


def test_a_running_campaign_claims_nothing(documents) -> None:
    told = " ".join(Page(documents["running"]).words)
    assert "Nothing yet: the campaign is not closed." in told
    assert "round is open" in told
    assert "on sealed items" not in told


def test_an_infrastructure_campaign_claims_no_recipe(documents) -> None:
    told = " ".join(Page(documents["no-target"]).words)
    assert "no figure here claims a better recipe" in told
    assert "There is no external target" in told


def test_charts_have_a_title_and_a_description(documents) -> None:
    page = documents["closed"]
    charts = re.findall(r'<svg .*?aria-labelledby="(\S+) (\S+)".*?</svg>', page, flags=re.DOTALL)
    assert len(charts) == 3
    for name, told in charts:
        assert f'<title id="{name}">' in page and f'<desc id="{told}">' in page


def test_is_written_where_told_and_the_same_twice(campaigns, tmp_path) -> None:
    there = write_report(campaigns["closed"], tmp_path / "deep" / "page.html")
    assert there == tmp_path / "deep" / "page.html"
    assert there.read_bytes() == write_report(campaigns["closed"], None).read_bytes()
    assert CampaignFolder(campaigns["closed"]).report.exists()


def test_a_path_where_no_file_can_be_is_one_sentence(campaigns, tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for out in ("", str(tmp_path), str(tmp_path / "pipe")):
        done = CliRunner().invoke(app, ["report", str(campaigns["closed"]), "--out", out])
        assert done.exit_code == 1 and done.stderr.count("\n") == 1
        assert f"expected to write a file at {Path(out)}, found something else there: name a file" in done.stderr
    assert (tmp_path / "pipe").is_fifo()


def test_a_misspelt_campaign_makes_no_folder(tmp_path) -> None:
    for out in (None, tmp_path / "new" / "page.html"):
        with pytest.raises(ValueError, match="holds no campaign"):
            write_report(tmp_path / "typo", out)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_campaign_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no campaign"):
        write_report(tmp_path, None)


def test_a_changed_file_is_refused(tmp_path) -> None:
    root = build_campaign(tmp_path / "changed", judged=1, closed=False)
    path = CampaignFolder(root).policy(1)
    path.write_text(path.read_text().replace("stabilise", "proxy-aware"))
    with pytest.raises(ValueError, match="is not what the ledger recorded"):
        write_report(root, None)


# --- its parts


def test_markup_escapes_children_and_attributes() -> None:
    made = tag("p", "<b>", Markup("<i></i>"), title='"', data_status="a.b", class_="x", id=None)
    assert made == '<p title="&quot;" data-status="a.b" class="x">&lt;b&gt;<i></i></p>'


def test_quotes_say_where_a_number_stands() -> None:
    quotes = Quotes({"rounds": [{"mde": 0.031}], "no": None})
    assert quotes.number("rounds", 0, "mde") == '<span data-status="rounds.0.mde" data-value="0.031">0.031</span>'
    assert quotes.number("no") is NOTHING
    assert quotes.number("rounds", 1, "mde") is NOTHING
    assert quotes.unquoted("") == [("rounds", 0, "mde")]


def test_numbers_read_well() -> None:
    assert [points(value) for value in (0.0213, -0.004, -0.0001)] == ["+2.1", "\u22120.4", "0.0"]
    assert [probability(value) for value in (0.999, 0.001, 0.75)] == ["> .99", "< .01", ".75"]
    assert [seconds(value) for value in (42.0, 900.0, 72_000.0)] == ["42 s", "15 min", "20.0 h"]


def test_a_scale_maps_ends_to_ends_and_ticks_are_round() -> None:
    scale = Scale(-0.02, 0.1, 0, 600)
    assert (scale(-0.02), scale(0.1)) == (0, 600)
    assert scale.ticks() == [-0.02, 0.0, 0.02, 0.04, 0.06, 0.08, 0.1]


def test_a_change_of_shares_names_those_that_moved_most() -> None:
    shares = {f"mix.weight.f{place}": {"from": 0.2, "to": 0.2 + 0.01 * place} for place in range(1, 5)}
    told = change_words({"recipe.lr": {"from": 0.003, "to": 0.006}, **shares})
    assert "0.003 → <b>0.006</b>" in told and "f4" in told and "2 other shares follow" in told


def test_cited_values_are_told_in_words() -> None:
    effect = {"mean": 0.02, "se": 0.01, "low": -0.001, "high": 0.041, "p_better": 0.97}
    assert cited_words({"a": effect}, "/a") == "+2.0 pt [\u22120.1, +4.1], P(better) .97"
    assert cited_words({"a": {"mean": 0.5, "se": 0.02, "n": 1200}}, "/a") == "0.500 ± 0.020 of 1,200"
    assert cited_words({"a": [1, 2]}, "/a") == "2 entries"
    assert cited_words({}, "/missing") == "does not resolve"


# --- in a browser


def chromium() -> str | None:
    """Path of a headless browser, or None."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.mark.browser
@pytest.mark.skipif(chromium() is None, reason="no Chromium: install Debian's chromium or set CHROMIUM")
def test_renders_in_a_browser_with_every_number_and_no_complaint(campaigns, documents, tmp_path) -> None:
    picture = tmp_path / "page.png"
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
    flags += ("--disable-component-update", "--disable-sync", "--enable-logging=stderr", f"--screenshot={picture}")
    flags += ("--dump-dom", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,4000")
    address = CampaignFolder(campaigns["closed"]).report.as_uri()
    done = subprocess.run([chromium(), *flags, address], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    quoted = dict(re.findall(r'data-status="([^"]*)" data-value="([^"]*)"', done.stdout))
    expected = dict(numbers_of((), status(campaigns["closed"])))
    assert {path: json.loads(value) for path, value in quoted.items()} == expected
    assert not [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert picture.stat().st_size > 50_000


def test_a_familys_smallest_visible_effect_stands_below_its_scores(tmp_path: Path) -> None:
    """The closed form of every verdict, of the bounds that evidence keeps: half the interval and .84 of its error."""
    folder = build_campaign(tmp_path / "campaign", judged=1)
    evidence = read_chronicle(folder).chapters[0].evidence
    name = next(iter(evidence.candidates[0].domains))
    held = [one.domains[name].dev_effect for one in evidence.candidates if one.domains]
    found = [(one.high - one.low) / 2 + 0.8416 * one.se for one in held if one]
    page = write_report(folder, None).read_text()
    [table] = re.findall(r"<caption>Accuracy by family</caption>.*?</table>", page, re.DOTALL)
    last = re.findall(r"<tr>.*?</tr>", table, re.DOTALL)[-2:]
    assert all("smallest visible" in row for row in last) and "dev" in last[0] and "external" in last[1]
    assert f"{100 * statistics.median(found):.1f}" in last[0]
