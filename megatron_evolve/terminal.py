"""What a person sees while a campaign runs, and the table it ends with.

One line per thing that happened, with the time left as estimated from the runs so far; the round table when a round
closes; at the end one sentence made from the ledger and the report's path.
"""

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.budget import WORDS, amount
from megatron_evolve.campaign import find_campaign, load_campaign, plan_of
from megatron_evolve.estimate import use_words
from megatron_evolve.explain import told_verdicts
from megatron_evolve.site import chosen_site
from megatron_evolve.substrate import logs

AWAITING_STATUS = 66  # EX_NOINPUT: the same command goes on once the scores it names were submitted

MOST_REASONS = 3  # why jobs wait, told apart
STAGE_WORDS = {"train": "trained", "dev": "scored on dev", "external-a": "asked outside", "external-b": "asked outside"}


class Narrator:
    """Prints progress and estimates the time left from the runs that ended."""

    def __init__(self, console: Console, total_runs: int) -> None:
        self.console = console
        self.total_runs = total_runs
        self.trained = 0
        self.started: float | None = None

    def _say(self, text: str) -> None:
        """A line for people; where nobody looks on, as a log line."""
        if self.console.is_terminal:
            self.console.print(text)
        else:
            self.console.print(f"{escape(logs.stamp('controller'))} {text.strip()}", soft_wrap=True)

    def __call__(self, what: str, facts: dict[str, Any]) -> None:
        getattr(self, f"_{what}")(facts)

    def _engine(self, facts: dict[str, Any]) -> None:
        self._say(f"asking where jobs run whether the judge's engine can answer (once; job {facts['key']})")

    def _building(self, facts: dict[str, Any]) -> None:
        self._say(f"building substrate {facts['preset']} (once; about a minute of training) in {facts['folder']}")

    def _origin(self, facts: dict[str, Any]) -> None:
        self._say(f"scoring the origin: {facts['runs']} seeds of the substrate's own recipe (once per judge)")

    def _opened(self, facts: dict[str, Any]) -> None:
        self._say(
            f"campaign [bold]{facts['name']}[/]: {facts['rounds']} rounds x {facts['candidates_per_round']} "
            f"candidates, about {facts['runs']} runs, at most {facts['external_looks']} external looks"
        )

    def _use(self, facts: dict[str, Any]) -> None:
        for line in use_words(facts["use"], facts["budget"]):
            self.console.print(line)

    def _round(self, facts: dict[str, Any]) -> None:
        policy = facts["policy"]
        self.started = self.started or time.monotonic()
        self._say(f"\n[bold]round {policy.round}[/]  {policy.mode}, objective {policy.objective}")

    def _ended(self, facts: dict[str, Any]) -> None:
        end = facts["end"]
        if end.finished and end.stage != "train":
            return
        self.trained += end.stage == "train" and facts["round"] > 0
        word = (
            STAGE_WORDS.get(end.stage, end.stage) if end.finished else f"[red]{end.outcome}[/] ({escape(end.reason)})"
        )
        self._say(f"  {end.run.key:<27} {word} in {end.cpu_seconds:5.1f} CPU-s{self._left()}")

    def _left(self) -> str:
        if not self.started or not self.trained:
            return ""
        seconds = (time.monotonic() - self.started) / self.trained * max(0, self.total_runs - self.trained)
        return f"   about {seconds / 60:.0f} min left" if seconds > 90 else f"   about {seconds:.0f} s left"

    def _closed(self, facts: dict[str, Any]) -> None:
        self.console.print(round_table(facts["evidence"].model_dump(mode="json")))


def run_in_terminal(
    name: str, folder: Path, external: Path | None, site: str | None, store: Path | None, as_json: bool
) -> None:
    """Runs a campaign to its report, with progress on stderr (or on the terminal) and the answer on stdout."""
    from megatron_evolve.cli import emit
    from megatron_evolve.desk import Awaiting, Stopped, Unavailable
    from megatron_evolve.loop import Session, run_campaign
    from megatron_evolve.prepare import default_store
    from megatron_evolve.report import write_report
    from megatron_evolve.standing import standing

    console = Console(stderr=as_json, highlight=False)
    logs.set_up("controller", all_on_stderr=True)
    campaign = load_campaign(find_campaign(name), external=external)
    plan = plan_of(campaign)
    narrator = Narrator(console, plan["runs"])
    asked: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda number, frame: asked.append(number) if not asked else os._exit(130))
    narrator("opened", {"name": campaign.name, **plan})
    place = chosen_site(site, CampaignFolder(folder).site, campaign)
    session = Session(
        folder, store or default_store(), narrator, lambda: bool(asked), place, moved=lambda: signal.SIGTERM in asked
    )
    try:
        closing = run_campaign(session, campaign)
    except (Stopped, Unavailable) as pause:
        console.print(f"[yellow]{pause}[/]")
        sys.exit(75)  # EX_TEMPFAIL: the same command goes on
    except Awaiting as pause:
        console.print(f"[yellow]{pause}[/]")
        sys.exit(AWAITING_STATUS)
    own = time.process_time()
    path = write_report(folder, None)
    found = standing(folder)
    if as_json:
        emit({**found, "report": str(path)})
        return
    show_status(found)
    console.print(f"\n[bold]{closing['finding']}[/]\nreport: {path}")
    if found["cpu_seconds"]:
        share = 100 * own / found["cpu_seconds"]
        console.print(f"the controller itself used {own:.1f} CPU-s, {share:.1f} % of the runs'", style="dim")


def show_status(found: dict[str, Any]) -> None:
    """Where a campaign stands, as tables."""
    console = Console(highlight=False)
    if found["campaign"] is None:
        console.print("the campaign is being prepared: substrate, judge and origin come first")
        return
    looks = found["looks"]
    if found["paused"]:
        console.print(f"[yellow]paused: {found['paused']}; mend that, then run the same command again[/]")
    console.print(
        f"[bold]{found['campaign']}[/]  {found['state']}, claim {found['claim']}, "
        f"{found['interventions']} interventions, {looks['external']} of {looks['external_budget']} external looks, "
        f"{found['cpu_seconds']:.0f} CPU-s"
    )
    for name, one in found["budget"].items():
        if name in WORDS and one["budget"] is not None:
            console.print(f"budget: {amount(one['used'])} of {amount(one['budget'])} {WORDS[name]} used")
    for told in waiting_for(job["waits_for"] for job in found["jobs"]["now"]):
        console.print(f"[yellow]{escape(told)}[/]")
    for one in found["rounds"]:
        console.print(round_table(one))
    if final := (found.get("closing") or {}).get("final"):
        console.print(final_table(final))


def waiting_for(reasons: Iterable[str | None]) -> list[str]:
    """What keeps jobs waiting, by their scheduler's words: a line for each of the three that keep most."""
    counts = Counter(reason for reason in reasons if reason)
    return [f"{count} waiting: {reason}" for reason, count in counts.most_common(MOST_REASONS)]


def round_table(one: dict[str, Any]) -> Table:
    """Candidates of a round: dev and external, then its verdicts."""
    verdicts = "; ".join(verdict_words(one.get("verdicts", [])))
    table = Table(
        title=f"round {one['round']}  (objective {one['objective']}{_visible(one)})",
        caption=verdicts or None,
        title_justify="left",
    )
    for column in ("candidate", "axis", "runs", "dev", "external"):
        table.add_column(column, justify="left" if column in ("candidate", "axis") else "right")
    for found in one["candidates"]:
        ended = [run["outcome"] for run in found["runs"]]
        failed = [outcome for outcome in ended if outcome != "finished"]
        table.add_row(
            found["id"],
            found["axis"],
            f"{len(ended)}" + (f" ({', '.join(failed)})" if failed else ""),
            _score(found["dev"]),
            _score(found["external"]),
        )
    return table


def final_table(final: dict[str, Any]) -> Table | str:
    """The standing settings against the origin on the sealed items; a line where nothing was compared."""
    if "gain" not in final:
        return f"sealed items: {final.get('failed', 'the standing settings are still the origin, nothing to compare')}"
    gain = final["gain"]
    smallest = gain.get("minimum_detectable_effect")
    visible = "unknown" if smallest is None else f"{100 * smallest:.1f} pt"
    mean, low, high = (f"{100 * gain[name]:+.1f}" for name in ("mean", "low", "high"))
    table = Table(
        title=f"sealed items  ({final['items']:,}, asked once; smallest visible difference {visible})",
        caption=f"standing - origin: {mean} pt [{low}, {high}], P(better) {gain['p_better']:.2f}",
        title_justify="left",
    )
    for column in ("settings", "candidate", "runs", "accuracy"):
        table.add_column(column, justify="left" if column in ("settings", "candidate") else "right")
    for name in ("standing", "origin"):
        table.add_row(name, final[name], f"{final['runs'][name]}", f"{final['accuracy'][name]:.3f}")
    return table


def _visible(one: dict[str, Any]) -> str:
    """The smallest dev effect that the round could see: a number in its status, one by split in its evidence."""
    found = one.get("minimum_detectable_effect")
    found = found.get("dev-b") if isinstance(found, dict) else found
    return "" if found is None else f"; smallest visible dev effect {100 * found:.1f} pt"


def _score(value: dict[str, Any] | None) -> str:
    return "-" if value is None else f"{value['mean']:.3f} ± {value['se']:.3f}"


def verdict_words(verdicts: list[dict[str, Any]]) -> list[str]:
    """The verdicts worth a word: every overall one, and the domains that are not unresolved."""
    return [f"{one['outcome']} ({one['estimand']}, {one['domain']})" for one in told_verdicts(verdicts)]


def build_in_terminal(preset: str, seed: int, store: Path | None, as_json: bool) -> None:
    """Builds a preset's substrate unless it stands in the store."""
    from megatron_evolve.campaign import SubstrateSpec
    from megatron_evolve.cli import emit
    from megatron_evolve.launch.local import LocalLauncher
    from megatron_evolve.launch.rundir import make_folder
    from megatron_evolve.preflight import expect
    from megatron_evolve.prepare import build_substrate, default_store, require_import
    from megatron_evolve.substrate.manifest import verify

    place, spec = store or default_store(), SubstrateSpec(preset=preset, seed=seed)
    expect(spec, place)  # before a folder is made
    require_import(spec, place)
    make_folder(place)
    narrator = Narrator(Console(stderr=True, highlight=False), 0)
    with LocalLauncher(1, place.resolve()) as launcher:
        folder = build_substrate(spec, place, launcher, narrator)
    digest = verify(folder).digest
    if as_json:
        emit({"digest": digest, "folder": str(folder)})
    else:
        Console(highlight=False).print(f"substrate {digest}\n{folder}")
