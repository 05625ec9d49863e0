"""The watch: a campaign on one screen, drawn again every few seconds, by somebody who takes no lock.

    state, round, time left | bars: runs, budgets | running jobs, a bar each | last verdicts | last failures

It may be started before the campaign and outlive any number of its controllers. A frame reads what was added to the
ledger and to the account of looks, and the files that `live` names: 3 ms of CPU with a round of eight candidates,
however long the campaign is. It ends when the campaign is closed.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.follow import Follower, LooksCount
from megatron_evolve.launch.rundir import RunDirError, read_json, write_whole
from megatron_evolve.ledger import Event
from megatron_evolve.prometheus import exposition
from megatron_evolve.standing import JobView, Now, now
from megatron_evolve.tally import Failure, Tally
from megatron_evolve.terminal import verdict_words, waiting_for

LEAST_JOBS = 4  # rows of running jobs, however low the terminal is
OTHER_LINES = 16  # that a frame takes beside jobs, verdicts and failures
LOW = 36  # lines of a screen that shows one round's verdicts, one failure and one reason to wait alone
SILENT_S = 120.0  # a job that has said nothing for so long is marked
STATE_STYLES = {"running": "bold green", "preparing": "bold cyan", "closed": "bold", "paused": "bold red"}


class Watcher:
    """One campaign folder, read again at each look."""

    def __init__(self, root: Path) -> None:
        self.folder = CampaignFolder(root)
        self._follower = Follower(self.folder.ledger, self._begin)
        self._looks = LooksCount(self.folder.looks)

    def _begin(self) -> Callable[[Event], None]:
        self.tally = Tally()
        self._rounds: dict[int, dict[str, Any]] = {}
        return self.tally.add

    def look(self) -> Now:
        """Where the campaign stands. Raises ValueError where there is none, or its ledger or account is broken."""
        self._follower.read()
        self._looks.read()
        return now(self.folder, self.tally, self._looks.external)

    def judged(self) -> list[dict[str, Any]]:
        """Number, objective and verdicts of the last rounds that have evidence, where it can be read now."""
        for number in self.tally.judged:
            with contextlib.suppress(RunDirError):  # being copied or restored: the next look finds it
                if number not in self._rounds:
                    found = read_json(self.folder.evidence(number))
                    self._rounds[number] = {name: found[name] for name in ("round", "objective", "verdicts")}
        return [self._rounds[number] for number in self.tally.judged if number in self._rounds]


def watch(root: Path, *, every_s: float, once: bool, prometheus: Path | None, console: Console) -> None:
    """Draws the campaign in `root` until it is closed; with `once`, one frame. May raise ValueError, RunDirError."""
    if not once and prometheus is None and not console.is_terminal:
        raise ValueError("watch draws on a terminal and this is none: add --once for one frame, or --prometheus FILE")
    watcher = Watcher(root)
    if once:
        console.print(_next_frame(watcher, prometheus, console))
        return
    with Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            live.update(_waiting_frame(watcher, prometheus, console), refresh=console.is_terminal)
            if watcher.tally.closing is not None:
                return
            time.sleep(every_s)


def _waiting_frame(watcher: Watcher, prometheus: Path | None, console: Console) -> RenderableType:
    """A frame, or word that there is nothing to draw yet."""
    if not watcher.folder.ledger.exists():
        return Text(f"no campaign in {watcher.folder.root} yet: waiting for its ledger; Ctrl-C ends", style="dim")
    return _next_frame(watcher, prometheus, console)


def _next_frame(watcher: Watcher, prometheus: Path | None, console: Console) -> RenderableType:
    found = watcher.look()
    if prometheus is not None:
        write_whole(prometheus, exposition(found, watcher.tally))
    return frame(found, watcher.tally, watcher.judged(), width=console.width, height=console.height)


# --- the picture ------------------------------------------------------------------------------------------------------


def frame(
    found: Now, tally: Tally, judged: list[dict[str, Any]], *, width: int = 80, height: int = 25
) -> RenderableType:
    """One picture of where a campaign stands, for a screen of `width` columns and `height` lines."""
    parts: list[RenderableType] = [_title(found, tally)]
    if found.state == "paused":
        parts.append(Text(found.paused, style="red"))
    parts.append(_facts(found, tally))
    judged, failures = judged[::-1], list(tally.failures)[::-1]
    reasons = waiting_for(job.waits_for for job in found.jobs.now)
    if height < LOW:
        judged, failures, reasons = judged[:1], failures[:1], reasons[:1]
    if tally.opened is None:
        parts.append(Text("substrate, judge and origin come first; their jobs lie outside this folder"))
    elif found.state != "closed":
        taken = OTHER_LINES + 2 * (len(failures) + len(judged)) + len(reasons)
        parts += [Text(), _jobs(found, max(LEAST_JOBS, height - taken), width)]
        parts += [Text(told, style="yellow", no_wrap=True, overflow="ellipsis") for told in reasons]
    if judged:
        parts += [Text(), _verdicts(judged)]
    if failures:
        parts += [Text(), _failures(failures)]
    if tally.closing is not None:
        parts += [Text(), Text(tally.closing["finding"], style="bold")]
    return Group(*parts)


def _title(found: Now, tally: Tally) -> Text:
    line = Text()
    line.append(tally.opened["name"] if tally.opened else "campaign", style="bold")
    line.append("  ").append(found.state, style=STATE_STYLES.get(found.state, "bold yellow"))
    if found.stop_asked and found.state == "running":
        line.append(", asked to stop", style="yellow")
    if found.state in ("stopped", "paused"):
        line.append(", the same command goes on", style="yellow")
    if found.progress.round:
        line.append(f"   round {found.progress.round} of {found.progress.rounds}")
    if found.state == "running" and tally.opened and tally.rounds_closed == tally.rounds:
        line.append(", closing")
    if (left := found.progress.seconds_left) is not None:
        line.append(f"   about {duration(left)} left", style="cyan")
    return line


def _facts(found: Now, tally: Tally) -> Group:
    bars, rest = _grid(), _grid()
    progress = found.progress
    if progress.runs_planned:
        told = f"{progress.runs_trained:,} of {progress.runs_planned:,} trained"
        bars.add_row("runs", _bar(progress.runs_trained, progress.runs_planned, 24), told)
    for name, spent in found.budget.items():
        words = name.replace("_", " ").replace("cpu", "CPU").replace("gpu", "GPU")
        if spent.budget:
            told = f"{number(spent.used)} of {number(spent.budget)}"
            bars.add_row(words, _bar(spent.used, spent.budget, 24), told)
        elif spent.used and name.endswith("_hours"):
            rest.add_row(words.replace("hours", "time"), duration(3600 * spent.used))
        elif spent.used:
            rest.add_row(words, number(spent.used))
    ended = sorted(found.jobs.outcomes.items(), key=lambda one: (one[0] != "finished", one[0]))
    if ended:
        rest.add_row("stages ended", ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in ended))
    if tally.last_time is not None:
        rest.add_row("last event", f"{tally.last_time:%d %b %H:%M:%S} UTC")
    return Group(bars, rest)


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, width=14)
    grid.add_column()
    grid.add_column()
    return grid


def _bar(done: float, of: float, width: int) -> ProgressBar:
    return ProgressBar(total=of, completed=min(done, of), width=width, complete_style="green", finished_style="green")


def _jobs(found: Now, most: int, width: int) -> RenderableType:
    title = Text(f"{found.jobs.running} running, {found.jobs.waiting} waiting", style="bold")
    if not found.jobs.now:
        return title
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    wide = width >= 100
    table.add_column("candidate", no_wrap=True)
    table.add_column("axis", no_wrap=True, overflow="ellipsis", max_width=24 if wide else 10)
    table.add_column("seed", justify="right", no_wrap=True)
    table.add_column("stage", no_wrap=True)
    table.add_column("done", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("for", justify="right", no_wrap=True)
    for job in found.jobs.now[:most]:
        steps = f"{job.step:,}/{job.steps:,}" if job.steps else ""
        told = _bar_of(job, 24 if wide else 8)
        table.add_row(job.candidate, Text(job.axis), str(job.seed), job.stage, told, steps, _for(job))
    if len(found.jobs.now) > most:
        table.add_row(Text(f"and {len(found.jobs.now) - most} more", style="dim"))
    return Group(title, table)


def _bar_of(job: JobView, width: int) -> RenderableType:
    if job.state != "running" or not job.steps:
        return Text(job.state, style="red" if job.state == "gone" else "dim")
    return _bar(job.step or 0, job.steps, width)


def _for(job: JobView) -> Text:
    if job.state == "running" and job.told_seconds_ago is not None and job.told_seconds_ago > SILENT_S:
        return Text(f"silent {duration(job.told_seconds_ago)}", style="bold red")
    again = f"try {job.attempt}, " if job.attempt > 1 else ""
    return Text(again + (duration(job.running_seconds) if job.running_seconds is not None else ""), style="dim")


def _verdicts(judged: list[dict[str, Any]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row(Text("verdicts", style="bold"))
    for one in judged:
        table.add_row(f"round {one['round']}", Text("; ".join(verdict_words(one["verdicts"])) or "none"))
    return table


def _failures(failures: list[Failure]) -> Group:
    """Two lines each: where and how, then why, cut at the edge of the screen."""
    lines = [Text("failures", style="bold")]
    for one in failures:
        lines.append(Text.assemble(f"{one.key}  ", (one.outcome.replace("_", " "), "red")))
        lines.append(Text(f"  {one.reason}", style="dim", no_wrap=True, overflow="ellipsis"))
    return Group(*lines)


def number(value: float) -> str:
    """A count as people write it: whole where it is whole."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def duration(seconds: float) -> str:
    """A length of time in its two largest units."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
