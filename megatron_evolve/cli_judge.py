"""The commands that put the judge itself to the test: simulated campaigns, the anchor against itself, false answers."""

import json
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout")]


def add_judge_commands(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command("simulate")(simulate)


def simulate(
    scenarios: Annotated[
        list[str] | None, typer.Argument(metavar="[SCENARIO]...", help="by name; all of them otherwise")
    ] = None,
    campaigns: Annotated[int, typer.Option(help="simulated campaigns a scenario", min=2)] = 500,
    seed: Annotated[int, typer.Option(help="the same seed gives the same campaigns", min=0)] = 1,
    noise: Annotated[
        str, typer.Option(help="measured: as nano runs are; specified: as the stated powers assume")
    ] = "measured",
    as_json: Json = False,
) -> None:
    """Thousands of campaigns whose truth is known: false alarms, power, time to detect. JSON: one object a line."""
    from megatron_evolve.cli import guarded

    def answer() -> None:
        from megatron_evolve.simulate import simulate as run
        from megatron_evolve.simulate import table

        found = run(scenarios or [], noise, campaigns, seed)
        typer.echo("\n".join(json.dumps(one) for one in found) if as_json else table(found))

    guarded(answer, as_json)
