"""What must stand before round 1: a frozen substrate, a frozen judge, the origin's scores. Built once and kept.

    campaign.yaml --build--> substrate/ --freeze--> judge/ --8 seeds of the substrate's own recipe--> origin scores

Building and scoring are jobs like any other. What was built is kept in a store under the digest of what it was built
from, so that the next campaign on the same ground starts at once; each step writes its manifest last, so that an
interrupted one is taken up again.
"""

import itertools
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_evolve import __version__
from megatron_evolve.artefacts import CampaignFolder, save_json
from megatron_evolve.campaign import Campaign, ExternalCsv, JudgeSpec, SubstrateSpec
from megatron_evolve.candidate import candidate, run_seed
from megatron_evolve.desk import STOPPED, Stopped
from megatron_evolve.eval.engines.versions import decoding_packages
from megatron_evolve.eval.freeze import WITHHELD_FILE
from megatron_evolve.eval.judge import Judge, judge_sources, load_judge
from megatron_evolve.jobs import POLL_SECONDS, Ground, Run, StageEnd, drive
from megatron_evolve.launch.job import INFRASTRUCTURE_KINDS, Job, JobOutcome, Launcher, OutcomeKind
from megatron_evolve.launch.rundir import latest_attempt, make_folder, resolved, write_json
from megatron_evolve.origin import ORIGIN_FILE, ORIGIN_ROUND, origin_document
from megatron_evolve.placement import Placement
from megatron_evolve.retries import Retries
from megatron_evolve.site import Site
from megatron_evolve.substrate.build import PRESETS as BUILT
from megatron_evolve.substrate.build import refreeze
from megatron_evolve.substrate.digest import digest_file, digest_of
from megatron_evolve.substrate.manifest import MANIFEST, Substrate, read_manifest, trainer_sources, verify
from megatron_evolve.substrate.model.architecture import PRESETS as SIZES

BUILD_SECONDS = 3600.0
PACKED = "-packed"  # ends the folders of an origin trained on packed rows, and of its judge
IMPORTED = tuple(name for name in SIZES if name not in BUILT)  # their weights come from a checkpoint, never from here
JOB_ENV = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}

Progress = Callable[[str, dict[str, Any]], None]


def default_store() -> Path:
    """Where what was built is kept: MEGATRON_EVOLVE_STORE, or the user's cache folder."""
    named = os.environ.get("MEGATRON_EVOLVE_STORE")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else cache / "megatron-evolve"


@dataclass(frozen=True)
class Prepared:
    """The frozen ground of a campaign."""

    substrate_folder: Path
    substrate: Substrate
    judge_folder: Path
    judge: Judge


def prepare(
    campaign: Campaign,
    site: Site,
    store: Path,
    launcher: Launcher,
    on_progress: Progress,
    stop: Callable[[], bool],
) -> Prepared:
    """Builds, freezes and scores what is missing; verifies every byte of what is there. May raise Stopped."""
    substrate_folder = build_substrate(campaign.substrate, store, launcher, on_progress, stop, site)
    substrate = verify(substrate_folder)
    judge_folder = freeze(campaign.judge, substrate, store, packed=campaign.launch.training.packed)
    if load_judge(judge_folder).origin is None:
        placement = Placement.of(campaign, site)
        score_origin(campaign, placement, substrate_folder, substrate, judge_folder, launcher, on_progress, stop)
    judge_process("--verify", str(judge_folder))
    return Prepared(substrate_folder, substrate, judge_folder, load_judge(judge_folder))


def reopen(substrate_folder: Path, judge_folder: Path) -> Prepared:
    """The ground that a campaign was opened on, every byte verified. What was lost or changed is not built anew."""
    substrate = verify(substrate_folder)
    judge_process("--verify", str(judge_folder))
    return Prepared(substrate_folder, substrate, judge_folder, load_judge(judge_folder))


def ground_of(campaign: Campaign, site: Site, folder: CampaignFolder, substrate: Path, judge: Path) -> Ground:
    """Where a campaign's runs lie, which frozen parts they use, and what they take of the site."""
    return Ground(
        folder=folder,
        substrate=substrate,
        judge=judge,
        time_limit_s=campaign.constitution.limits.run_seconds,
        exclude=exclusions(judge),
        placement=Placement.of(campaign, site),
    )


# --- substrate -------------------------------------------------------------------------------------------------------


def substrate_folder(spec: SubstrateSpec, store: Path) -> Path:
    """Where the frozen substrate of a campaign lies, or will."""
    if spec.path is not None:
        return resolved(Path(spec.path))
    if spec.preset in IMPORTED:
        return resolved(store / "imported" / spec.preset)
    return _built_folder(spec, store)


def import_command(spec: SubstrateSpec, store: Path, source: str = "DIR") -> tuple[str, ...]:
    """What an operator runs once for a size that is imported. `source` is the folder of its checkpoint."""
    out = str(substrate_folder(spec, store))
    return ("megatron-evolve", "substrate", "import-hf", source, "--name", spec.preset, "--out", out)


def build_job(spec: SubstrateSpec, store: Path, site: Site | None = None) -> Job:
    """The job that trains and freezes a preset's substrate, without cues. A site says when it hangs, and its grace."""
    site = site or Site()
    folder = _built_folder(spec.replace(cue_rate={}), store)
    argv = (sys.executable, "-m", "megatron_evolve.substrate.build", "--preset", spec.preset)
    argv += ("--out", str(folder), "--seed", str(spec.seed))
    return Job(
        key=f"build/{folder.parent.name}",
        argv=argv,
        run_dir=folder,
        time_limit_s=BUILD_SECONDS,
        done_file=MANIFEST,
        env=JOB_ENV,
        stall_s=site.stall_seconds,
        start_s=site.start_seconds,
        grace_s=site.grace_seconds,
    )


def build_substrate(
    spec: SubstrateSpec,
    store: Path,
    launcher: Launcher,
    say: Progress,
    stop: Callable[[], bool] = lambda: False,
    site: Site | None = None,
) -> Path:
    """The folder of the frozen substrate; its weights are trained by a job unless they stand in the store.

    Substrates that differ only in their pool of training rows share their weights, which are trained without cues.
    """
    if spec.path is not None:
        return resolved(Path(spec.path))
    require_import(spec, store)
    if spec.preset in IMPORTED:
        return substrate_folder(spec, store)
    job = build_job(spec, store, site)
    folder = job.run_dir
    if not (folder / MANIFEST).exists():
        say("building", {"preset": spec.preset, "folder": folder})
        run_one(launcher, job, stop)
    if not spec.cue_rate:
        return folder
    sibling = _built_folder(spec, store)
    if not (sibling / MANIFEST).exists():
        pool = read_manifest(folder).construction.replace(cue_rate=dict(sorted(spec.cue_rate.items())))
        refreeze(folder, sibling, construction=pool)
    return sibling


def require_own_pool(spec: SubstrateSpec) -> None:
    """Raises ValueError where cues are asked of a pool that is not built here."""
    if spec.path is None and spec.preset in IMPORTED and spec.cue_rate:
        raise ValueError(
            f"substrate.cue_rate is for a preset that is built here; {spec.preset} is imported: leave it out, or "
            "freeze a sibling with `megatron-evolve substrate freeze --cue-rate` and name its folder as substrate.path"
        )


def require_import(spec: SubstrateSpec, store: Path) -> None:
    """Raises ValueError with the command to run for a size that an operator has yet to import."""
    folder = substrate_folder(spec, store)
    if spec.path is None and spec.preset in IMPORTED and not (folder / MANIFEST).exists():
        raise ValueError(
            f"substrate {spec.preset} is imported, not built: expected it in {folder}, found no {MANIFEST}; run "
            f"`{shlex.join(import_command(spec, store))}` with the folder of its checkpoint as DIR"
        )


def _built_folder(spec: SubstrateSpec, store: Path) -> Path:
    name = digest_of({"spec": spec, "trainer": trainer_sources()})[:12]
    return resolved(store / "substrates" / f"{spec.preset}-{name}" / "substrate")


def run_one(launcher: Launcher, job: Job, stop: Callable[[], bool]) -> JobOutcome:
    """Runs one job to its end; when `stop` turns true it is cancelled, to go on another time.

    What its machine failed is tried again at once, as often as a candidate's job; what a controller before this one
    called off is no failure. Raises ValueError with the last line of its error output unless it finished, Stopped if it
    was cancelled or is not begun any more.
    """
    make_folder(job.run_dir)
    attempt, failures = latest_attempt(job.run_dir), 0
    runs = False
    if attempt:
        launcher.submit(job, attempt)
        state = launcher.poll([job.key])[job.key]
        if isinstance(state, JobOutcome) and state.kind is OutcomeKind.FINISHED:
            return state
        runs = not isinstance(state, JobOutcome)
    while True:
        if not runs:
            if stop():
                raise Stopped(STOPPED)
            attempt += 1
        state, runs = _end_of(launcher, job, attempt, stop), False
        if state.kind is OutcomeKind.FINISHED:
            return state
        failures += state.kind in INFRASTRUCTURE_KINDS
        again = state.kind in INFRASTRUCTURE_KINDS and failures < Retries().attempts
        if not (again or state.kind is OutcomeKind.CANCELLED):
            raise ValueError(
                f"{job.key} {state.kind.value}: {state.reason}; its output is in {job.run_dir / 'attempts'}"
            )


def _end_of(launcher: Launcher, job: Job, attempt: int, stop: Callable[[], bool]) -> JobOutcome:
    launcher.submit(job, attempt)
    while not isinstance(state := launcher.poll([job.key])[job.key], JobOutcome):
        if stop():
            launcher.cancel(job.key)
        time.sleep(POLL_SECONDS)
    return state


# --- judge -----------------------------------------------------------------------------------------------------------


def freeze(spec: JudgeSpec, substrate: Substrate, store: Path, *, packed: bool = False) -> Path:
    """The folder of the frozen judge for this substrate; frozen by a process of its own unless it stands in the store.

    `packed`: a judge whose origin is trained on packed rows, as the campaign's candidates are (see `Trainer`).
    This process never opens the external target, not even to name it: a CSV is named by its path, size and time here,
    and by its bytes in the judge.
    """
    folder = judge_folder(spec, substrate, store, packed=packed)
    make_folder(folder.parent)
    named = spec.model_dump(mode="json")
    document = {name: named[name] for name in ("dev", "secret")}
    document["external"] = named["external"] if spec.target_suite else None
    document["engine"] = {**named["engine"], "version": __version__}
    spec_file = folder.parent / "spec.json"
    write_json(spec_file, document)
    spec_file.chmod(0o600)  # it holds the secret, as the judge's manifest does
    judge_process(*freezing(folder))
    return folder


def judge_folder(spec: JudgeSpec, substrate: Substrate, store: Path, *, packed: bool) -> Path:
    """Where that judge lies, or will. Raises ValueError where its external target is not there."""
    named = spec.model_dump(mode="json")
    if isinstance(spec.external, ExternalCsv):
        path = require_target(spec.external)
        named["external"] |= {"bytes": path.stat().st_size, "modified_ns": path.stat().st_mtime_ns}
    name = digest_of([named, substrate.digest, judge_sources(), decoding_packages(spec.engine)])[:12]
    return resolved(store / "judges" / f"{name}{PACKED if packed else ''}" / "judge")


def require_target(target: ExternalCsv) -> Path:
    """Where the CSV of an external target lies. Raises ValueError where there is none."""
    path = Path(target.path or "")
    if not path.is_file():
        raise ValueError(f"expected the external target at {path}, found no file: check --external")
    return path


def freezing(folder: Path) -> tuple[str, ...]:
    """Arguments of the judge's own process when it freezes the judge of `folder`."""
    return ("--spec", str(folder.parent / "spec.json"), "--out", str(folder))


def judge_argv(*arguments: str) -> tuple[str, ...]:
    """The judge's own process."""
    return (sys.executable, "-m", "megatron_evolve.eval.freeze", *arguments)


def judge_process(*arguments: str) -> None:
    """Runs the judge's own process. Raises ValueError with its one sentence."""
    told_by(judge_argv(*arguments))


def told_by(argv: Sequence[str], said: str = "") -> str:
    """What a process of the judge's side prints, `said` on its stdin. Raises ValueError with its one sentence."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False, input=said)
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the judge's process failed")
    return done.stdout


def score_origin(
    campaign: Campaign,
    placement: Placement,
    substrate_folder: Path,
    substrate: Substrate,
    judge_folder: Path,
    launcher: Launcher,
    say: Progress,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Trains the substrate's own recipe under each origin seed, scores it, and attaches the scores to the judge.

    Training depends on the substrate alone, so that judges of one substrate share the trained runs.
    """
    limit = campaign.constitution.limits.run_seconds
    ground = origin_ground(substrate_folder, judge_folder, limit, placement=placement)
    origin = candidate(substrate.digest, substrate.default)
    save_json(ground.folder.candidate(ORIGIN_ROUND, origin.id) / "candidate.json", origin)
    seeds = [run_seed(0, ORIGIN_ROUND, origin.id, index) for index in range(campaign.judge.origin_seeds)]
    runs = [Run(ORIGIN_ROUND, origin, seed) for seed in seeds]
    stages = ("train", "dev", *(("external-a", "external-b") if campaign.judge.target_suite else ()))
    following = dict(itertools.pairwise(stages))
    say("origin", {"runs": len(runs)})
    first = [(run, "train") for run in runs]
    after = lambda end: [(end.run, following[end.stage])] if _goes_on(end, following) else []  # noqa: E731
    for end in drive(ground, launcher, first, after, stop):
        if not end.finished:
            raise ValueError(f"the origin's run {end.run.seed} {end.outcome} in {end.stage}: {end.reason}; start again")
        say("ended", {"round": ORIGIN_ROUND, "stage": end.stage, "end": end})
    if stop():
        raise Stopped(STOPPED)
    save_json(judge_folder / ORIGIN_FILE, origin_document(ground, runs, bool(campaign.judge.target_suite)))
    judge_process("--attach", str(judge_folder), "--origin", ORIGIN_FILE)  # it reads the target's bytes again


def _goes_on(end: StageEnd, following: dict[str, str]) -> bool:
    return end.finished and end.stage in following


def origin_ground(
    substrate_folder: Path,
    judge_folder: Path,
    time_limit_s: float,
    scores: Path | None = None,
    placement: Placement | None = None,
) -> Ground:
    """Where the origin's runs lie: trained beside the substrate, scored beside the judge (or in `scores`)."""
    withheld = exclusions(judge_folder)
    name = "origin" if withheld is None else f"origin-without-{digest_file(withheld)[:8]}"
    name += PACKED if judge_folder.parent.name.endswith(PACKED) else ""
    return Ground(
        folder=CampaignFolder(substrate_folder.parent / name),
        substrate=substrate_folder,
        judge=judge_folder,
        time_limit_s=time_limit_s,
        exclude=withheld,
        scores=scores or judge_folder.parent / "origin",
        placement=placement or Placement(),
    )


def exclusions(judge_folder: Path) -> Path | None:
    """The file of instances that no training row may equal, if the judge keeps one: hashes, not rows."""
    path = judge_folder / WITHHELD_FILE
    return path if path.exists() else None
