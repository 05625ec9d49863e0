"""A dry run: every script that a campaign would start on a site and what it would use, before anything is.

The scripts are those of the run itself: the same jobs, from the same ground, rendered by the same launcher. Nothing is
started or written, and the weights need not be there, nor a CSV be named; one that is named must be there, and its rows
are counted, so that it is told from which round on they return.
"""

import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.budget import Account
from megatron_evolve.campaign import Campaign, ExternalCsv, find_campaign, with_external
from megatron_evolve.candidate import Candidate, candidate, run_seed
from megatron_evolve.document import load_yaml
from megatron_evolve.estimate import estimate, use_words
from megatron_evolve.eval.engines.command import shown_argv
from megatron_evolve.eval.engines.settings import OpenAISettings
from megatron_evolve.eval.freeze import WITHHELD_FILE
from megatron_evolve.jobs import Run, Stage
from megatron_evolve.launch import kubernetes_manifest, slurm
from megatron_evolve.launch.job import Job
from megatron_evolve.launch.local import LocalLauncher
from megatron_evolve.launch.rundir import resolved
from megatron_evolve.planning import layout_row
from megatron_evolve.preflight import Preflight, check_opening, preflight
from megatron_evolve.prepare import (
    IMPORTED,
    build_job,
    default_store,
    freezing,
    ground_of,
    import_command,
    judge_argv,
    judge_folder,
)
from megatron_evolve.proposals import DEFAULT_WORKER
from megatron_evolve.readiness import first_job, left_open
from megatron_evolve.site import Site, chosen_site, placed
from megatron_evolve.survey import survey_stages
from megatron_evolve.workers.seam import BRIEF, PROPOSAL

RUNS = Path("runs")  # under which a campaign's folder is shown where none is named
UNKNOWN_CANDIDATE, UNKNOWN_JUDGE = "CANDIDATE", "JUDGE"


@dataclass(frozen=True)
class Step:
    """One thing that would be started. `times` is how often, at most; None for what a scoring job starts itself."""

    what: str
    times: int | None
    argv: tuple[str, ...]
    script: str


def dry_run(campaign: Campaign, folder: Path, site: Site, store: Path) -> dict[str, Any]:
    """Everything that would run, as JSON. Raises ValueError in one sentence for what cannot run on the site."""
    campaign = placed(campaign, site)
    found = preflight(campaign, site, store)
    check_opening(campaign)
    use, frozen = estimate(found), found.expected.frozen
    return {
        "campaign": campaign.name,
        "claim": campaign.claim,
        "comparator": campaign.comparator,
        "site": site.model_dump(mode="json", by_alias=True),
        "substrate": {
            "name": found.expected.architecture.name,
            "folder": str(found.expected.folder),
            "digest": frozen.digest if frozen else None,
        },
        "layout": layout_row(found.plan) if found.plan else None,
        "use": use,
        "budget": Account(campaign.constitution.budgets).statement(),
        "steps": [asdict(step) for step in steps(found, CampaignFolder(resolved(folder)), store, use)],
        "notes": notes(found),
    }


def steps(found: Preflight, folder: CampaignFolder, store: Path, use: dict[str, Any]) -> list[Step]:
    """What would be started, in the order in which it first would be."""
    campaign, spec = found.campaign, found.campaign.substrate
    ready = found.expected.frozen is not None
    shown: list[Step] = []
    if not ready and spec.preset in IMPORTED:
        shown.append(_once("import the substrate, by hand", import_command(spec, store)))
    if (first := first_job(campaign, found.site, folder.root)) is not None:
        shown.append(_of_job("ask where jobs run whether the judge's engine can answer", 1, first, found.site))
    if not ready and spec.preset not in IMPORTED:
        shown.append(_of_job("build the substrate", 1, build_job(spec, store, found.site), found.site))
    judge = _judge(found, store)
    shown.append(_once("freeze the judge, by the controller", judge_argv(*freezing(judge))))
    ground = ground_of(campaign, found.site, folder, found.expected.folder, judge)
    if isinstance(campaign.judge.external, ExternalCsv):
        ground = replace(ground, exclude=judge / WITHHELD_FILE)  # which freezing the judge writes
    worker = (*(campaign.worker or DEFAULT_WORKER), BRIEF, PROPOSAL)
    asked = campaign.constitution.rounds * (campaign.constitution.workers - 1) * (campaign.constitution.repairs + 1)
    shown.append(Step("propose, by the controller", asked, worker, shlex.join(worker) + "\n"))
    run = _first_run(found)
    total = use["total"]
    shown.append(_of_job("train", total["training_runs"], ground.job(run, "train"), found.site))
    for stage in _stages(campaign):
        shown.append(_of_job(f"score on {stage}", _asked(stage, campaign, use), ground.job(run, stage), found.site))
    engine = campaign.judge.engine
    if isinstance(engine, OpenAISettings) and engine.server is not None:
        argv = shown_argv(engine)
        shown.append(Step("the judge's engine, started by each scoring job", None, argv, shlex.join(argv) + "\n"))
    return shown


def notes(found: Preflight) -> list[str]:
    """What the scripts leave open, and what stands between them and a run."""
    said = ["Paths and the interpreter are those of the machine and environment in which this was printed."]
    if found.expected.frozen is None:
        said.append(
            f"{UNKNOWN_CANDIDATE}, --seed 0 and {UNKNOWN_JUDGE} stand for what follows from the substrate's digest."
        )
    else:
        said.append("Training and scoring are shown for the first run of round 1's anchor; others differ in names.")
    target = found.campaign.judge.external
    if isinstance(target, ExternalCsv) and target.path is None:
        said.append("The run itself needs its external target: --external FILE.csv.")
    said += left_open(found.campaign, found.site)
    if found.site.launcher == "slurm":
        said.append("Job names end in a digest of the attempt's folder, by which a submission is found again.")
        if found.site.slurm.throttle is not None:
            said.append("Jobs of one shape submitted together share one script, with --array and their number.")
    if site_section := found.site.kubernetes:
        said.append(
            f"Pods see the claim {site_section.claim} at {site_section.mount}: the run itself needs --dir and the "
            "store in it, and runs where it is mounted."
        )
    return said


def _once(what: str, argv: tuple[str, ...]) -> Step:
    return Step(what, 1, argv, shlex.join(argv) + "\n")


def _of_job(what: str, times: int, job: Job, site: Site) -> Step:
    if site.launcher == "slurm":
        return Step(what, times, job.argv, slurm.render(slurm.inside(job, site.queue), site.queue).text)
    if site.launcher == "kubernetes":
        return Step(what, times, job.argv, kubernetes_manifest.render(job, 1, site.cluster))
    return Step(what, times, job.argv, LocalLauncher(job.resources.cores, job.run_dir).render(job))


def _judge(found: Preflight, store: Path) -> Path:
    """Where the judge lies, or will, as far as that is known: its name follows from the substrate and the target."""
    target, frozen = found.campaign.judge.external, found.expected.frozen
    if frozen is None or (isinstance(target, ExternalCsv) and target.path is None):
        return resolved(store / "judges" / UNKNOWN_JUDGE / "judge")
    packed = found.campaign.launch.training.packed
    return judge_folder(found.campaign.judge, frozen, store, packed=packed)


def _first_run(found: Preflight) -> Run:
    """The first run of round 1's anchor; under a stand-in's name while the substrate's digest is not known."""
    frozen, default = found.expected.frozen, found.expected.default
    if frozen is None:
        return Run(1, Candidate(id=UNKNOWN_CANDIDATE, substrate="", settings=default), seed=0)
    anchor = candidate(frozen.digest, default)
    return Run(1, anchor, run_seed(found.campaign.seed, 1, anchor.id, 0))


def _stages(campaign: Campaign) -> tuple[Stage, ...]:
    """What is asked of a run, in order: dev, the target's halves, and at the end the sealed rest."""
    outside = ("external-a", "external-b", *survey_stages(campaign)) if campaign.judge.target_suite else ()
    return ("dev", *outside)


def _asked(stage: Stage, campaign: Campaign, use: dict[str, Any]) -> int:
    """Scoring jobs of this stage, at most."""
    at_end = {"final": campaign.constitution.anchor_seeds + campaign.judge.origin_seeds}
    if stage in survey_stages(campaign):
        return at_end.get(stage, campaign.constitution.anchor_seeds)
    return sum(row["training_runs"] for row in use["phases"] if row["name"] != "end")


# --- for a person ----------------------------------------------------------------------------------------------------


def dry_run_in_terminal(
    name: str, folder: Path | None, external: Path | None, site: str | None, store: Path | None, as_json: bool
) -> None:
    """Prints a campaign's dry run."""
    from megatron_evolve.cli import emit

    path = find_campaign(name)
    campaign = Campaign.parse(load_yaml(path), where=str(path))
    if external is not None:
        campaign = with_external(campaign, external)
    folder = folder or RUNS / campaign.name
    place = chosen_site(site, CampaignFolder(folder).site, campaign)
    told = dry_run(campaign, folder, place, store or default_store())
    emit(told) if as_json else show(told)


def show(told: dict[str, Any]) -> None:
    """The account, the notes, and each script under its heading."""
    console = Console(highlight=False, soft_wrap=True)
    against = f" against the {told['comparator']}" if told["comparator"] else ""
    console.print(f"campaign [bold]{told['campaign']}[/], claim {told['claim']}{against}; a dry run")
    substrate, site = told["substrate"], told["site"]
    state = f"substrate {substrate['digest'][:12]} in" if substrate["digest"] else "not frozen yet, to be in"
    console.print(f"{substrate['name']}: {state} {substrate['folder']}")
    gpus = f"{site['gpus_per_node']} GPUs of {site['gpu_memory']} a node" if site["gpus_per_node"] else "no GPUs"
    console.print(f"site: launcher {site['launcher']}, {gpus}")
    if told["layout"]:
        console.print(_layout_words(told["layout"], site))
    console.print()
    console.print(_use_table(told["use"]))
    for line in (*use_words(told["use"], told["budget"]), *_use_words(told["use"], site), *told["notes"]):
        console.print(line, markup=False)
    for number, step in enumerate(told["steps"], start=1):
        times = "" if step["times"] is None else f" ({step['times']}x at most)" if step["times"] > 1 else " (once)"
        typer.echo(f"\n# --- {number}. {step['what']}{times}\n{step['script']}", nl=False)


def _layout_words(row: dict[str, Any], site: dict[str, Any]) -> str:
    sizes = ", ".join(f"{size}={row[size]}" for size in ("tp", "pp", "vp", "ep", "etp", "cp") if row[size] > 1)
    return (
        f"a run on {row['gpus']} GPUs, {sizes or 'no parallel sizes'}, {row['dp']} data-parallel copies: planned are "
        f"{row['memory_gb']:.1f} of {site['gpu_memory']} on the fullest GPU"
    )


def _use_table(use: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("at most", "runs", "scoring jobs", "GPU-h to train, assumed", "GPU-h, limit"):
        table.add_column(column, justify="left" if column == "at most" else "right", no_wrap=True)
    for row in (*use["phases"], {"name": "in all", **use["total"]}):
        hours = [row["training_gpu_hours_assumed"], row["gpu_hours_limit"]]
        shown = ["-" if value is None else f"{value:,.0f}" for value in hours]
        table.add_row(row["name"], str(row["training_runs"]), str(row["scoring_jobs"]), *shown)
    return table


def _use_words(use: dict[str, Any], site: dict[str, Any]) -> list[str]:
    run, scoring = use["run"], use["scoring"]
    lines = [
        f"A run: {run['rows']:,} rows, at most {run['tokens'] / 1e6:,.1f} M tokens, and it is killed after "
        f"{run['hours_limit']:g} h. A delta may ask for {run['longest_rows']:,} rows."
    ]
    if run["gpu_hours_assumed"] is not None:
        lines.append(
            f"Assumed: rows of full length, {run['gflop_a_token']:.1f} GFLOP a token, {site['utilisation']:.0%} of "
            f"{site['peak_tflops']:g} TFLOP/s a GPU; so a run takes {run['hours_assumed']:.1f} h. None of it was "
            "measured on this site. Limit: every job until it is killed."
        )
    items = ", ".join(f"{split} {'?' if n is None else n}" for split, n in scoring["items"].items())
    gpus = f"{scoring['gpus']} GPUs" if scoring["gpus"] else "no GPU of its own (an endpoint's are not counted)"
    lines.append(f"A scoring job: {gpus}, at most {scoring['max_new_tokens']:,} tokens an item; items: {items}.")
    lines.append(f"External looks: {use['looks_a_round']} a round, {use['external_looks']} in the budget.")
    return lines
