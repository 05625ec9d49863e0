"""The commands that put the judge itself to the test: simulated campaigns, the anchor against itself, false answers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_evolve.cli_bench import refuse

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout")]


def add_judge_commands(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command("simulate")(simulate)
    app.command("compare")(compare)
    app.command("calibrate")(calibrate)
    app.command("verify-eval")(verify_eval)
    app.command("worlds-table")(worlds_table)


def simulate(
    scenarios: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SCENARIO]...", help="by name; otherwise all, and the conditions under which something must hold"
        ),
    ] = None,
    named: Annotated[list[str] | None, typer.Option("--scenario", help="the same as a SCENARIO, repeatable")] = None,
    campaigns: Annotated[
        int | None,
        typer.Option(help="simulated campaigns a row; otherwise 250, of worlds 500", min=2, max=100_000),
    ] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same campaigns", min=0)] = 1,
    noise: Annotated[
        str, typer.Option(help="measured: as nano runs are; specified: as the stated powers assume")
    ] = "measured",
    items: Annotated[
        int | None,
        typer.Option(help="dev-B items of a round, and as many of the target; 500 otherwise", min=10, max=100_000),
    ] = None,
    anchors: Annotated[
        int | None, typer.Option(help="runs of the anchor in every round; 3 otherwise", min=1, max=64)
    ] = None,
    origin: Annotated[
        int | None, typer.Option(help="runs of the origin that were frozen with the judge; 8 otherwise", min=2, max=64)
    ] = None,
    shared: Annotated[
        float | None, typer.Option(help="share of flips common to all explorers; 0 otherwise", min=0, max=1)
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="of a campaign; 4 otherwise", min=1, max=100)] = None,
    cumulative: Annotated[
        bool, typer.Option("--cumulative", help="judge the standing settings against the origin too")
    ] = False,
    worlds: Annotated[
        bool, typer.Option("--worlds", help="the world matrix in place of scenarios, with the demo's 1,200 items")
    ] = False,
    as_json: Json = False,
) -> None:
    """Thousands of campaigns whose truth is known: false alarms, power, time to detect. JSON: one object a line."""
    from megatron_evolve.cli import guarded

    names = [*(scenarios or ()), *(named or ())]

    def answer() -> None:
        from megatron_evolve.simulate import simulate as run
        from megatron_evolve.simulate import table
        from megatron_evolve.simulate.worlds import page, simulate_worlds

        if worlds:
            sized = {"--items": items, "--anchors": anchors, "--origin": origin, "--shared": shared, "--rounds": rounds}
            idle = {"scenario": names, **sized, "--cumulative": cumulative}
            refuse(idle, "no {} with --worlds: its worlds and sizes are fixed; leave one of them out")
            found = simulate_worlds(campaigns or 500, seed, noise)
        else:
            plan = _plan(cumulative, items=items, origin_seeds=origin, anchor_seeds=anchors, rounds=rounds)
            found = run(names, noise, campaigns or 250, seed, plan, shared or 0.0)
        typer.echo("\n".join(json.dumps(one) for one in found) if as_json else (page if worlds else table)(found))

    guarded(answer, as_json)


def _plan(cumulative: bool, **given: int | None) -> Any:
    """The product's plan but for what was given."""
    from megatron_evolve.constitution import Constitution
    from megatron_evolve.simulate import Plan

    named = {name: value for name, value in given.items() if value is not None}
    rules = {name: named.pop(name) for name in ("anchor_seeds", "rounds") if name in named}
    plan = Plan(Constitution(**rules), **named)
    return plan.judging_origin() if cumulative else plan


def compare(
    dir: Annotated[Path, typer.Option("--dir", help="folder of the attempt; it is resumed")],
    held_out: Annotated[
        bool, typer.Option("--held-out", help="seeds that follow from the code's digest; run once, after tuning")
    ] = False,
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="by name; otherwise all, with --real the four that matter")
    ] = None,
    surfaces: Annotated[
        int | None, typer.Option(help="simulated landscapes, two campaigns on each; 100 otherwise", min=2)
    ] = None,
    real: Annotated[bool, typer.Option("--real", help="really train on a frozen substrate, nothing simulated")] = False,
    campaigns: Annotated[
        int | None, typer.Option(help="with --real: campaigns of each method; 3 otherwise", min=2)
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="with --real: rounds of each campaign; 2 otherwise", min=1)] = None,
    base: Annotated[
        str | None, typer.Option("--campaign", help="with --real: a campaign's file, or a shipped name; demo otherwise")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="with --real: where substrates and judges are kept", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """This policy against other ways to spend the same runs: what each truly gains outside.

    On simulated surfaces, or with --real by training.
    """
    from megatron_evolve.cli import guarded

    phase = "held-out" if held_out else "development"

    def answer() -> None:
        if real:
            refuse({"--surfaces": surfaces}, "no {} with --real: it trains and draws none; leave one of them out")
            sizes = campaigns or 3, rounds or 2
            found, told = _compared_by_training(dir, store, base or "demo", phase, *sizes, methods or ())
        else:
            trained = {"--campaigns": campaigns, "--rounds": rounds, "--campaign": base, "--store": store}
            refuse(trained, "--real with {}: on simulated surfaces nothing is trained; add --real")
            found, told = _compared_on_surfaces(dir, phase, surfaces or 100, methods or ())
        typer.echo("\n".join(json.dumps(one) for one in found) if as_json else told)

    guarded(answer, as_json)


def _compared_on_surfaces(dir: Path, phase: Any, surfaces: int, methods: Sequence[str]) -> tuple[list[Any], str]:
    from megatron_evolve.contest.protocol import run_attempt
    from megatron_evolve.contest.table import figures, page, plot
    from megatron_evolve.launch.rundir import write_whole

    found = figures(run_attempt(dir, phase, surfaces, methods))
    write_whole(dir / "contest.md", page(found))
    write_whole(dir / "contest.svg", plot(found))
    return found, page(found)


def _compared_by_training(
    dir: Path, store: Path | None, base: str, phase: Any, campaigns: int, rounds: int, methods: Sequence[str]
) -> tuple[list[Any], str]:
    from megatron_evolve.campaign import find_campaign, load_campaign
    from megatron_evolve.contest.real import run_real
    from megatron_evolve.contest.real_table import figures, page
    from megatron_evolve.launch.rundir import write_whole
    from megatron_evolve.prepare import default_store

    campaign = load_campaign(find_campaign(base))
    rows = run_real(dir, store or default_store(), campaign, phase, campaigns, rounds, methods)
    found = figures(rows)
    write_whole(dir / "contest.md", page(found))
    return found, page(found)


def calibrate(
    dir: Annotated[Path, typer.Argument(help="a campaign's folder", show_default=False)],
    campaigns: Annotated[
        int, typer.Option(help="simulated campaigns in which nothing differs", min=2, max=100_000)
    ] = 500,
    seed: Annotated[int, typer.Option(help="of the simulated ones", min=0)] = 1,
    as_json: Json = False,
) -> None:
    """The anchor against itself with other seeds: how often the gates accept what is only chance."""
    from megatron_evolve.cli import guarded

    def answer() -> None:
        from megatron_evolve.calibrate import calibrate as run
        from megatron_evolve.calibrate import words

        found = run(dir, campaigns, seed)
        typer.echo(json.dumps(found) if as_json else words(found))

    guarded(answer, as_json)


def verify_eval(
    dir: Annotated[Path, typer.Argument(help="a frozen judge, or a campaign's folder", show_default=False)],
    as_json: Json = False,
) -> None:
    """Answers whose score is known, put before the judge, and its items sought among training rows. 1 if it errs."""
    from megatron_evolve.cli import guarded

    def answer() -> None:
        from megatron_evolve.probing import probe, words

        found = probe(dir)
        typer.echo(json.dumps(found) if as_json else words(found))
        if not found["ok"]:
            raise typer.Exit(1)

    guarded(answer, as_json)


def worlds_table(
    paths: Annotated[list[Path], typer.Argument(help="folders of grids, or their result files", show_default=False)],
    as_json: Json = False,
) -> None:
    """One page over the finished campaigns of several grids of worlds, whichever code ran them."""
    from megatron_evolve.cli import emit, guarded

    def answer() -> None:
        from megatron_evolve.worlds.merge import merged

        found = merged(paths)
        emit(found) if as_json else typer.echo(found["table"])

    guarded(answer, as_json)
