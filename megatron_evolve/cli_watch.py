"""The commands that look after a campaign from outside: watch it, mirror its progress, free the space of old runs."""

import json
from pathlib import Path
from typing import Annotated

import typer

Dir = Annotated[Path, typer.Argument(help="a campaign's folder", show_default=False)]


def add_watch_commands(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command("watch")(watch)
    app.command("mirror")(mirror)
    app.command("prune")(prune)


def watch(
    dir: Dir,
    once: Annotated[bool, typer.Option("--once", help="one frame, then end")] = False,
    every: Annotated[float, typer.Option(help="seconds between frames", min=0.2, max=3600)] = 2.0,
    prometheus: Annotated[
        Path | None, typer.Option(help="also write each frame's figures to this .prom file", show_default=False)
    ] = None,
) -> None:
    """A campaign live: rounds, jobs with their progress, time left, budgets, last verdicts and failures. Read only."""
    from megatron_evolve.cli import guarded

    def answer() -> None:
        from rich.console import Console

        from megatron_evolve.watch import watch as run

        if prometheus is not None and prometheus.suffix != ".prom":
            raise ValueError(f"node_exporter reads files that end in .prom alone; got {prometheus}: rename it")
        try:
            run(dir, every_s=every, once=once, prometheus=prometheus, console=Console(highlight=False))
        except KeyboardInterrupt:
            raise typer.Exit(0) from None

    guarded(answer, as_json=False)


def mirror(
    dir: Dir,
    to: Annotated[str, typer.Option(help="wandb or trackio", show_default=False)],
    project: Annotated[str, typer.Option(help="project of the mirror")] = "megatron-evolve",
    every: Annotated[float, typer.Option(help="seconds between looks", min=1, max=86400)] = 30.0,
    once: Annotated[bool, typer.Option("--once", help="send what is new, then end")] = False,
) -> None:
    """Send a campaign's progress to a tracker: counts alone, no score, answer, path or reason. Read only."""
    from megatron_evolve.cli import guarded

    def answer() -> None:
        from megatron_evolve.mirror import mirror as run
        from megatron_evolve.mirror import open_tracker

        try:
            run(dir, lambda name: open_tracker(to, project, name), every_s=every, once=once)
        except KeyboardInterrupt:
            raise typer.Exit(0) from None

    guarded(answer, as_json=False)


def prune(
    dir: Dir,
    keep: Annotated[
        str, typer.Option(help="weights of closed rounds: leading (standing and selected), standing or all")
    ] = "leading",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go and free nothing")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Free the space of what a campaign needs no more. Evidence, scores, logs and digests stay, and verify passes."""
    from megatron_evolve.cli import guarded

    def answer() -> None:
        from megatron_evolve.prune import prune as run
        from megatron_evolve.prune import words

        found = run(dir, keep=keep, dry_run=dry_run)
        typer.echo(json.dumps(found, indent=2) if as_json else words(found))

    guarded(answer, as_json)
