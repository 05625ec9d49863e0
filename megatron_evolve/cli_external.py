"""The commands of an operator who brings external scores: what is awaited, a score, and leave to ask again."""

import json
from pathlib import Path
from typing import Annotated

import typer

external_app = typer.Typer(help="External scores that an operator brings.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]
Dir = Annotated[Path, typer.Option("--dir", help="a campaign's folder")]
Who = Annotated[
    str, typer.Argument(help="a candidate, CANDIDATE/SEED where it has several runs, or a run", show_default=False)
]


@external_app.command("list")
def list_scores(
    dir: Annotated[Path, typer.Argument(help="a campaign's folder", show_default=False)], as_json: Json = False
) -> None:
    """Every run whose external look was paid, what is known of it, and where its weights lie."""
    from megatron_evolve.cli import guarded

    def answer() -> None:
        from megatron_evolve.external import listed

        found = listed(dir)
        if as_json:
            typer.echo(json.dumps(found))
            return
        for one in found:
            score = "" if one["score"] is None else f" {one['score']:.4f}"
            typer.echo(f"{one['state']}{score}  {one['run']}  {one['weights']}")
        if not found:
            typer.echo("no external look was paid yet")

    guarded(answer, as_json)


@external_app.command("submit")
def submit_score(
    candidate: Who,
    score: Annotated[float, typer.Argument(help="share that was right, between 0 and 1", show_default=False)],
    dir: Dir,
    items: Annotated[int | None, typer.Option("--n", help="items it is a mean over, if the target says so")] = None,
    se: Annotated[float | None, typer.Option("--se", help="its standard error, if the target says so")] = None,
    as_json: Json = False,
) -> None:
    """Keep the score of a run that is awaited. Once: it is never changed."""
    from megatron_evolve.cli import guarded

    def answer() -> None:
        from megatron_evolve.external import listed, submit

        found = submit(dir, candidate, score, items, se)
        left = sum(one["state"] == "awaited" for one in listed(dir))
        if as_json:
            typer.echo(json.dumps({**found, "awaited": left}))
        else:
            typer.echo(f"{found['run']} {found['score']:.4f}; {left} still awaited")

    guarded(answer, as_json)


@external_app.command("open-final")
def open_sealed_half(
    dir: Annotated[Path, typer.Argument(help="a campaign's folder", show_default=False)],
    by: Annotated[str, typer.Option(help="who says so; kept in the ledger")] = "operator",
    as_json: Json = False,
) -> None:
    """Let the campaign open its sealed half, once, when it goes on; that closes it."""
    from megatron_evolve.cli import guarded

    def answer() -> None:
        from megatron_evolve.external import open_final

        found = open_final(dir, by)
        before = "" if found["by"] == by else f"{found['by']} said so before, and that word stands: "
        typer.echo(json.dumps(found) if as_json else f"{before}the sealed half is opened when the campaign goes on")

    guarded(answer, as_json)


@external_app.command("again")
def ask_once_more(
    candidate: Who,
    dir: Dir,
    reason: Annotated[str, typer.Option(help="why asking again is no second look; kept in the ledger")],
    as_json: Json = False,
) -> None:
    """Let the program ask once more for a run whose reply was lost."""
    from megatron_evolve.cli import guarded

    def answer() -> None:
        from megatron_evolve.external import ask_again

        found = ask_again(dir, candidate, reason)
        typer.echo(json.dumps(found) if as_json else f"{found['run']} is asked again when the campaign goes on")

    guarded(answer, as_json)
