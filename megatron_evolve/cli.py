"""The command line. Paths in, one answer out; every setting that matters is in a file with a digest.

Commands import what they need when they run, so that `--help` answers at once.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from megatron_evolve.cli_bench import bench_app
from megatron_evolve.cli_external import external_app
from megatron_evolve.cli_judge import add_judge_commands
from megatron_evolve.cli_watch import add_watch_commands

app = typer.Typer(
    name="megatron-evolve",
    help="An autonomous post-training loop for Nemotron mixture-of-experts models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
substrate_app = typer.Typer(help="The frozen ground that every candidate forks.", no_args_is_help=True)
mix_app = typer.Typer(help="Data mixes.", no_args_is_help=True)
app.add_typer(substrate_app, name="substrate")
app.add_typer(mix_app, name="mix")
app.add_typer(bench_app, name="bench")
app.add_typer(external_app, name="external")
add_judge_commands(app)
add_watch_commands(app)

Dir = Annotated[Path, typer.Argument(help="a campaign's folder", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]


def fail(message: object, as_json: bool = False, status: int = 1) -> NoReturn:
    """One sentence on stderr (or as JSON), and the exit status."""
    if as_json:
        typer.echo(json.dumps({"error": str(message)}))
    else:
        typer.secho(f"megatron-evolve: {message}", fg="red", err=True)
    raise typer.Exit(status)


def emit(value: Any) -> None:
    """A JSON document on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2, sort_keys=False))


@app.command()
def run(
    campaign: Annotated[
        str, typer.Argument(help="a campaign file, or a shipped name such as `demo`", show_default=False)
    ],
    dir: Annotated[
        Path | None, typer.Option("--dir", help="folder of the campaign; it is resumed if it holds this campaign")
    ] = None,
    external: Annotated[Path | None, typer.Option(help="CSV of the external target: id, prompt, answer")] = None,
    site: Annotated[str | None, typer.Option(help="a site file, or a shipped name such as `h100-node`")] = None,
    store: Annotated[Path | None, typer.Option(help="where built substrates and judges are kept")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print every script and what it would use; start and write nothing")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a campaign, or go on with it, to its report."""

    def answer() -> None:
        if dry_run:
            from megatron_evolve.dry_run import dry_run_in_terminal

            dry_run_in_terminal(campaign, dir, external, site, store, as_json)
            return
        from megatron_evolve.terminal import run_in_terminal

        if dir is None:
            raise ValueError("a campaign needs a folder to run in: add --dir DIR, or --dry-run to see what would run")
        run_in_terminal(campaign, dir, external, site, store, as_json)

    guarded(answer, as_json)


@app.command("try")
def try_delta(
    delta: Annotated[Path, typer.Argument(help="a delta file, see `megatron-evolve schema delta`", show_default=False)],
    dir: Annotated[Path, typer.Option("--dir", help="a campaign's folder, whose substrate and judge are used")],
    external: Annotated[bool, typer.Option("--external", help="spend one look at the external target")] = False,
    seeds: Annotated[int, typer.Option(help="runs of the candidate and of the anchor", min=1, max=64)] = 3,
    as_json: Json = False,
) -> None:
    """A researcher's own delta against the anchor, with the paired verdict."""
    from megatron_evolve.trial import run_trial

    guarded(lambda: run_trial(delta, dir, ask_external=external, seeds=seeds, as_json=as_json), as_json)


@app.command()
def status(dir: Dir, as_json: Json = False) -> None:
    """Where a campaign stands."""
    from megatron_evolve.standing import standing
    from megatron_evolve.terminal import show_status

    def answer() -> None:
        found = standing(dir)
        emit(found) if as_json else show_status(found)

    guarded(answer, as_json)


@app.command()
def verify(dir: Dir, as_json: Json = False) -> None:
    """Check every digest, the chain, and every deterministic decision by making it again."""
    from megatron_evolve.audit import verify_campaign

    def answer() -> None:
        found = verify_campaign(dir)
        if as_json:
            emit(found)
        elif found["ok"]:
            typer.echo(f"ok: {found['events']} events, {found['replayed_decisions']} decisions made again")
            for note in found["notes"]:
                typer.echo(f"note: {note}")
        else:
            broken = found["first_broken"]
            if broken["where"] == str(dir):  # the folder could not be read, and `got` is a whole sentence
                fail(broken["got"])
            typer.secho(
                f"broken at {broken['where']}: expected {broken['expected']}, got {broken['got']}", fg="red", err=True
            )
        if not found["ok"]:
            raise typer.Exit(1)

    guarded(answer, as_json)


@app.command()
def report(
    dir: Dir,
    out: Annotated[Path | None, typer.Option(help="file to write; DIR/report.html otherwise")] = None,
    as_json: Json = False,
) -> None:
    """Write the campaign's report: one self-contained HTML file."""
    from megatron_evolve.report import write_report

    def answer() -> None:
        path = write_report(dir, out)
        emit({"report": str(path)}) if as_json else typer.echo(str(path))

    guarded(answer, as_json)


@app.command()
def explain(
    dir: Dir,
    round: Annotated[int, typer.Option("--round", help="number of a closed round", min=1)],
    as_json: Json = False,
) -> None:
    """The argument of a round's verdicts and of the policy that followed, in plain sentences."""
    from megatron_evolve.audit import explain_round

    def answer() -> None:
        text = explain_round(dir, round)
        emit({"round": round, "explanation": text}) if as_json else typer.echo(text)

    guarded(answer, as_json)


@app.command()
def worlds(
    spec: Annotated[Path, typer.Argument(help="a grid of worlds", show_default=False)],
    dir: Annotated[Path, typer.Option("--dir", help="folder of the campaigns; resumed")],
    store: Annotated[Path | None, typer.Option(help="where built substrates and judges are kept")] = None,
    as_json: Json = False,
) -> None:
    """Real nano campaigns over a grid of planted and unplanted worlds, and what they found."""
    from megatron_evolve.worlds.run import run_worlds

    guarded(
        lambda: emit(run_worlds(spec, dir, store)) if as_json else typer.echo(run_worlds(spec, dir, store)["table"]),
        as_json,
    )


@app.command()
def schema(
    of: Annotated[str, typer.Argument(help="delta, policy, constitution, campaign, site or status")] = "delta",
    as_json: Json = False,
) -> None:
    """The schema of a file: every field with its meaning, unit and range."""
    from megatron_evolve.schema import describe, json_schema

    guarded(lambda: emit(json_schema(of)) if as_json else typer.echo(describe(of)), as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What is installed, which path each operation takes, and what to do next."""
    from megatron_evolve.doctor import examine, show

    def answer() -> None:
        found = examine()
        emit(found) if as_json else show(found)

    guarded(answer, as_json)


@mix_app.command("show")
def mix_show(
    delta: Annotated[Path, typer.Argument(help="a delta file", show_default=False)],
    dir: Annotated[Path, typer.Option("--dir", help="the campaign whose substrate it changes")],
    as_json: Json = False,
) -> None:
    """What a delta's mix really contains: shares, rows and forms per family."""
    from megatron_evolve.trial import show_mix

    guarded(lambda: show_mix(delta, dir, as_json), as_json)


@substrate_app.command("build")
def substrate_build(
    preset: Annotated[str, typer.Option(help="nano-cpu or challenge-cpu")] = "nano-cpu",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    store: Annotated[Path | None, typer.Option(help="where built substrates are kept")] = None,
    as_json: Json = False,
) -> None:
    """Train and freeze a preset's substrate, unless it stands in the store."""
    from megatron_evolve.terminal import build_in_terminal

    guarded(lambda: build_in_terminal(preset, seed, store, as_json), as_json)


@substrate_app.command("verify")
def substrate_verify(folder: Annotated[Path, typer.Argument(help="a frozen substrate")], as_json: Json = False) -> None:
    """Hash every byte of a frozen substrate again."""
    from megatron_evolve.substrate.manifest import verify as verify_substrate

    def answer() -> None:
        digest = verify_substrate(folder).digest
        emit({"ok": True, "digest": digest}) if as_json else typer.echo(f"ok: substrate {digest}")

    guarded(answer, as_json)


@substrate_app.command("freeze")
def substrate_freeze(
    folder: Annotated[Path, typer.Argument(help="a frozen substrate whose weights are taken", show_default=False)],
    out: Annotated[Path, typer.Option(help="new folder")],
    cue: Annotated[list[str] | None, typer.Option("--cue-rate", help="FAMILY=RATE of the new pool, repeatable")] = None,
    as_json: Json = False,
) -> None:
    """Freeze a sibling substrate: the same weights over another pool of training rows."""
    from megatron_evolve.substrate.build import refreeze
    from megatron_evolve.substrate.manifest import read_manifest

    def answer() -> None:
        pool = read_manifest(folder).construction.replace(cue_rate=_rates(cue or []))
        digest = refreeze(folder, out, construction=pool).digest
        emit({"digest": digest, "folder": str(out)}) if as_json else typer.echo(f"froze substrate {digest} in {out}")

    guarded(answer, as_json)


@substrate_app.command("import-hf")
def substrate_import(
    source: Annotated[Path, typer.Argument(help="folder of a NemotronH checkpoint in safetensors", show_default=False)],
    out: Annotated[Path, typer.Option(help="new folder of the frozen substrate")],
    name: Annotated[str | None, typer.Option(help="the substrate's name; the folder's otherwise")] = None,
    dt_min: Annotated[
        float | None, typer.Option(help="clamp of the Mamba step; the config's time_step_limit otherwise", min=0)
    ] = None,
    as_json: Json = False,
) -> None:
    """Freeze a Hugging Face checkpoint as a substrate, every tensor accounted for."""
    from megatron_evolve.substrate.exchange import import_hf

    def answer() -> None:
        digest = import_hf(source, out, name=name, dt_min=dt_min).digest
        emit({"digest": digest, "folder": str(out)}) if as_json else typer.echo(f"froze substrate {digest} in {out}")

    guarded(answer, as_json)


@substrate_app.command("export-hf")
def substrate_export(
    folder: Annotated[Path, typer.Argument(help="a frozen substrate", show_default=False)],
    out: Annotated[Path, typer.Option(help="new folder of the checkpoint")],
    run: Annotated[Path | None, typer.Option(help="a run trained from it, whose weights or adapter to take")] = None,
    as_json: Json = False,
) -> None:
    """Write a substrate, or a run trained from it, as a Hugging Face checkpoint."""
    from megatron_evolve.substrate.exchange import export_hf

    def answer() -> None:
        files = export_hf(folder, out, run=run)
        emit({"files": files, "folder": str(out)}) if as_json else typer.echo(
            f"wrote {len(files)} weight files to {out}"
        )

    guarded(answer, as_json)


@substrate_app.command("export-adapter")
def substrate_export_adapter(
    run: Annotated[Path, typer.Argument(help="a trained run whose recipe has an adapter", show_default=False)],
    substrate: Annotated[Path, typer.Option(help="the frozen substrate that it was trained from")],
    out: Annotated[Path, typer.Option(help="new folder of the adapter")],
    experts: Annotated[
        str, typer.Option(help="each: a tensor per expert (vLLM); stacked: transformers 5 with PEFT")
    ] = "each",
    zip_file: Annotated[Path | None, typer.Option("--zip", help="also write the challenge's submission")] = None,
    as_json: Json = False,
) -> None:
    """Write a run's adapter in PEFT's form."""
    from megatron_evolve.substrate.adapter import export_adapter

    def answer() -> None:
        export_adapter(run, substrate, out, layout=experts, zip_file=zip_file)
        written = {"folder": str(out), "zip": str(zip_file) if zip_file else None}
        emit(written) if as_json else typer.echo(
            f"wrote the adapter to {out}" + (f" and {zip_file}" if zip_file else "")
        )

    guarded(answer, as_json)


@substrate_app.command("plan")
def substrate_plan(
    preset: Annotated[str, typer.Option(help="nemotron3-nano, nemotron3-super, nemotron3-ultra or nano-cpu")],
    gpus: Annotated[int, typer.Option(help="GPUs of the job")],
    seq: Annotated[int, typer.Option(help="tokens a row")],
    mode: Annotated[str, typer.Option(help="lora or sft")] = "lora",
    gpu_memory: Annotated[str, typer.Option(help="as on the GPU's label")] = "80GB",
    micro_batch: Annotated[int, typer.Option(help="rows a rank takes at once")] = 1,
    batch_size: Annotated[int, typer.Option(help="rows an optimizer step")] = 128,
    recompute: Annotated[str, typer.Option(help="none, selective or full")] = "none",
    optimizer_state: Annotated[str, typer.Option(help="full, or reduced: half precision")] = "full",
    offload: Annotated[float, typer.Option(help="share of the optimizer's state in host memory")] = 0.0,
    scan: Annotated[str, typer.Option(help="of Mamba layers: mamba-ssm, or pytorch without it")] = "mamba-ssm",
    transformer_engine: Annotated[bool, typer.Option("--te", help="it is there: try context parallelism")] = False,
    layout: Annotated[str | None, typer.Option(help="only this one, as in `tp=2,ep=8`")] = None,
    as_json: Json = False,
) -> None:
    """Memory, arithmetic and traffic of every layout: those that fit, the best first, and why others do not."""
    from megatron_evolve.planning import make_plan, show_plan

    def answer() -> None:
        job = {"mode": mode, "sequence_length": seq, "micro_batch": micro_batch, "batch_size": batch_size}
        job |= {"recompute": recompute, "optimizer_state": optimizer_state, "offload": offload, "scan": scan}
        plan = make_plan(preset, gpus, gpu_memory, job, layout, transformer_engine)
        emit(plan) if as_json else show_plan(plan)
        if not any(row["fits"] for row in plan["layouts"]):
            raise typer.Exit(1)

    guarded(answer, as_json)


def _rates(pairs: list[str]) -> dict[str, float]:
    try:
        return {name: float(rate) for name, rate in (pair.split("=", 1) for pair in pairs)}
    except ValueError:
        raise ValueError(f"--cue-rate takes FAMILY=RATE with a rate from 0 to 1, got {' '.join(pairs)}") from None


def guarded(action: Any, as_json: bool) -> None:
    """Runs a command; what a user can mend becomes one sentence, everything else keeps its traceback."""
    from megatron_evolve.launch.kubernetes_client import KubernetesError
    from megatron_evolve.launch.rundir import RunDirError
    from megatron_evolve.launch.warm import WarmError
    from megatron_evolve.retries import Paused

    try:
        action()
    except (ValueError, RunDirError, WarmError, KubernetesError) as error:
        fail(error, as_json)
    except Paused as pause:
        fail(pause, as_json, pause.status)
    except BrokenPipeError:  # the reader has enough, as `head` does: typer ends without a word
        raise
    except OSError as error:
        fail(
            f"{error.filename or 'a file'}: {error.strerror}; check the path, its permissions and the free space",
            as_json,
        )


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    sys.exit(app())
