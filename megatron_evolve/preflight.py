"""Preflight: whether a campaign can run on a site, told before a folder is made or a process started.

Known without the weights: the shapes of the model and the recipe that the search starts from, so the plan of memory,
the arithmetic of a run and the reach of a delta can be held against the site's GPUs and time limits.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_evolve.budget import WORDS, amount, figures, limits_of, most_within
from megatron_evolve.campaign import Campaign, ExternalCsv, SubstrateSpec, looks_a_round
from megatron_evolve.doctor import gpu_names
from megatron_evolve.eval.engines.settings import CommandServer, OpenAISettings, VllmServer, check_clamp
from megatron_evolve.eval.suite import GeneratedSuite
from megatron_evolve.launch import slurm, slurm_queue
from megatron_evolve.launch.job import Job as LaunchJob
from megatron_evolve.placement import Placement, cores_here
from megatron_evolve.prepare import IMPORTED, require_import, require_own_pool, require_target, substrate_folder
from megatron_evolve.readiness import check_fits, check_ready, pattern_of
from megatron_evolve.rows import check_rows
from megatron_evolve.site import Site, kubernetes_launcher
from megatron_evolve.substrate.build import PRESETS as BUILT
from megatron_evolve.substrate.exchange import imported_default
from megatron_evolve.substrate.frozen import nearest
from megatron_evolve.substrate.manifest import MANIFEST, Substrate, read_manifest
from megatron_evolve.substrate.model.architecture import Architecture, architecture
from megatron_evolve.substrate.operations import machine, mamba_scan
from megatron_evolve.substrate.plan.flops import token_flops
from megatron_evolve.substrate.plan.job import GIB, Job, memory_bytes
from megatron_evolve.substrate.plan.ranking import Candidate, assess
from megatron_evolve.substrate.settings import Settings

# What the plan of memory is made for; a delta that changed one of these could outgrow the GPUs.
PLANNED = (
    "recipe.sequence_length",
    "recipe.batch_size",
    "recipe.adapter",
    "recipe.adapter.rank",
    "recipe.adapter.targets",
)
# Fields of an architecture that a checkpoint may have its own value of and still be the size of that name.
ITS_OWN = {"name", "dt_min", "init_std", "max_sequence_length", "mtp_pattern", "mtp_depths"}


@dataclass(frozen=True)
class Expected:
    """The substrate of a campaign, as far as it is known. `frozen` is None while it does not stand."""

    folder: Path
    frozen: Substrate | None
    architecture: Architecture
    default: Settings


@dataclass(frozen=True)
class Preflight:
    """A campaign that can run on a site. `plan` and `job` are None where ranks compute on cores."""

    campaign: Campaign
    site: Site
    expected: Expected
    placement: Placement
    plan: Candidate | None
    job: Job | None

    @property
    def opening_rows(self) -> int:
        """Rows of a run by the recipe that the search starts from."""
        recipe = self.expected.default.recipe
        return recipe.steps * recipe.batch_size

    @property
    def most_rows(self) -> int:
        """Rows of the longest run that a delta may ask for, and at least those of the opening recipe."""
        limits = self.campaign.constitution.limits
        allowed = min(limits.max_rows, limits.max_steps * self.expected.default.recipe.batch_size)
        return max(self.opening_rows, allowed)

    def gpu_hours(self, rows: int) -> float | None:
        """GPU-hours of a run on so many rows of full length, at the assumed share of the peak."""
        if self.job is None:
            return None
        tokens = rows * self.job.sequence_length
        operations = tokens * token_flops(self.expected.architecture, self.job).executed
        return operations / (self.site.peak_tflops * 1e12 * self.site.utilisation) / 3600


def preflight(campaign: Campaign, site: Site, store: Path) -> Preflight:
    """Raises ValueError in one sentence for a campaign that cannot run on the site as both are written."""
    _check_target(campaign)
    _check_splits(campaign)
    expected = expect(campaign.substrate, store)
    check_clamp(campaign.judge.engine, expected.architecture.dt_min)
    placement = Placement.of(campaign, site)
    hours = campaign.constitution.limits.run_seconds / 3600
    # Slurm puts a job back into the queue at the end of its allocation, and it goes on there.
    if site.launcher == "local" and site.longest_job_hours is not None and hours > site.longest_job_hours:
        raise ValueError(
            f"campaign {campaign.name} lets a job run for {hours:g} h, its site for {site.longest_job_hours:g}: lower "
            "constitution.limits.run_seconds or name a site with longer jobs"
        )
    _check_budgets(campaign, placement)
    check_fits(campaign, expected)
    if not placement.training_gpus:
        if expected.architecture.num_parameters() > 10**9:
            raise ValueError(
                f"campaign {campaign.name} trains {expected.architecture.name}, which takes GPUs, and its site has "
                "none: name one that has with --site"
            )
        return Preflight(campaign, site, expected, placement, None, None)
    job = training_job(placement, expected.default)
    found = Preflight(campaign, site, expected, placement, _fitting(campaign, site, expected, job), job)
    _check_reach(campaign)
    _check_engine(found)
    wanted = found.gpu_hours(found.most_rows) / placement.training_gpus
    if wanted > hours:
        raise ValueError(
            f"campaign {campaign.name} kills a run after {hours:g} h, and one of {found.most_rows} full rows takes "
            f"{wanted:.1f} h on {placement.training_gpus} GPUs at the assumed {site.utilisation:.0%} of their peak: "
            "raise constitution.limits.run_seconds, lower max_rows or use more GPUs"
        )
    return found


def check_campaign(campaign: Campaign, site: Site, store: Path, *, new: bool) -> Preflight:
    """What `run` checks first: the preflight, that this machine is what the site says, and that the judge can answer.

    Of a campaign that goes on, the judge is asked once its ledger has told that there is something left to judge.
    Raises ValueError.
    """
    found = preflight(campaign, site, store)
    placement = found.placement
    if site.launcher == "slurm":
        _check_queue(campaign, placement, new=new)
    elif site.launcher == "kubernetes":  # its nodes are elsewhere, so what jobs need is looked for there
        kubernetes_launcher(site)
    else:
        _check_machine(campaign, site, placement)
    if new:
        check_opening(campaign)
        require_import(campaign.substrate, store)
        check_ready(campaign, site, found.expected, resumes=False)
    return found


def check_opening(campaign: Campaign) -> None:
    """Raises ValueError for what would spoil a campaign from its first round on. One that goes on is not asked."""
    check_rows(campaign)
    asks, looks, needed = campaign.search.ask_external, campaign.constitution.external_looks, looks_a_round(campaign)
    if 0 < looks < needed:
        fewer = ", set search.ask_external to best" if asks == "all" else ""
        raise ValueError(
            f"campaign {campaign.name} has {looks} external look(s) in all, and a round that asks `{asks}` takes "
            f"{needed}: the first would leave candidates without a score of the target, the leader perhaps; raise "
            f"constitution.external_looks{fewer}, or ask nobody with 0"
        )


def _check_machine(campaign: Campaign, site: Site, placement: Placement) -> None:
    """Raises ValueError unless this machine has the GPUs of the site and the cores of the campaign's jobs."""
    if len(gpu_names()) < site.gpus_per_node:
        raise ValueError(
            f"the site has {site.gpus_per_node} GPUs a node, the driver of this machine lists {len(gpu_names())}: run "
            "this on such a node, or see what would run with --dry-run"
        )
    here = mamba_scan(machine(True))
    if site.gpus_per_node and site.mamba_scan == "mamba-ssm" and here.path != "mamba-ssm":
        raise ValueError(
            f"the site plans memory for Mamba layers on mamba-ssm, and on this machine {here.why}: install what is "
            "missing, or write `mamba_scan: pytorch` into the site and see whether the campaign fits"
        )
    wanted = max(placement.resources(trains=trains).cores for trains in (True, False))
    if wanted > cores_here(campaign):
        raise ValueError(
            f"a job of campaign {campaign.name} takes {wanted} cores, of {cores_here(campaign)} that it may fill here: "
            "lower launch.training.ranks, or a site's cores_per_gpu, or raise launch.cores"
        )


def _check_queue(campaign: Campaign, placement: Placement, *, new: bool) -> None:
    """Asks Slurm whether it would take the campaign's jobs, without submitting any. Raises ValueError where not.

    One that goes on is only told of: it may have nothing to submit, and what Slurm refuses in earnest pauses it.
    """
    for trains in (True, False):
        asked = placement.resources(trains=trains)
        limit, grace = campaign.constitution.limits.run_seconds, placement.site.grace_seconds
        job = LaunchJob("check", ("true",), Path("/"), limit, "done", resources=asked, grace_s=grace)
        try:
            slurm_queue.check(slurm.render(job, placement.site.queue).text)
        except (slurm_queue.SlurmSilent, slurm_queue.SlurmError) as trouble:
            if not new:
                print(f"Slurm would take no job now: {trouble}; the campaign goes on", file=sys.stderr)
            elif isinstance(trouble, slurm_queue.SlurmError):
                raise
            else:
                raise ValueError(f"Slurm does not answer here: {trouble}; start the campaign once it does") from trouble


def expect(spec: SubstrateSpec, store: Path) -> Expected:
    """The substrate as its manifest says, or as its preset will be. Raises ValueError for one that nobody knows."""
    if spec.path is None and spec.preset not in (*BUILT, *IMPORTED):
        raise ValueError(f"no preset {spec.preset!r}{nearest(spec.preset, [*BUILT, *IMPORTED])}")
    require_own_pool(spec)
    folder = substrate_folder(spec, store)
    if spec.path is not None or (folder / MANIFEST).exists():
        frozen = read_manifest(folder)
        shapes = Architecture.model_validate(frozen.architecture)
        if spec.path is None and spec.preset in IMPORTED:
            _check_shapes(folder, shapes, architecture(spec.preset))
        return Expected(folder, frozen, shapes, frozen.default)
    if spec.preset in IMPORTED:
        return Expected(folder, None, architecture(spec.preset), imported_default(architecture(spec.preset)))
    preset = BUILT[spec.preset]
    shapes = preset.architecture.with_vocab(preset.tokenizer().vocab_size)
    return Expected(folder, None, shapes, preset.default())


def training_job(placement: Placement, settings: Settings) -> Job:
    """A training run as the plan of memory sees it."""
    recipe, training = settings.recipe, placement.training
    own = recipe.batch_size // training.layout.data_parallel(training.ranks)
    return Job(
        mode="sft" if recipe.adapter is None else "lora",
        sequence_length=recipe.sequence_length,
        batch_size=recipe.batch_size,
        micro_batch=max(1, min(own, training.micro_rows or own)),
        recompute=training.recompute,
        recompute_norms=False,
        scan=placement.site.mamba_scan,
        **({"adapter": recipe.adapter} if recipe.adapter else {}),
    )


def _fitting(campaign: Campaign, site: Site, expected: Expected, job: Job) -> Candidate:
    training = campaign.launch.training
    found = assess(expected.architecture, training.layout, training.ranks, memory_bytes(site.gpu_memory), job)
    if not found.fits:
        raise ValueError(
            f"campaign {campaign.name} does not fit {training.ranks} GPUs of {site.gpu_memory} with layout "
            f"{training.layout}: {found.reason}"
        )
    return found


def _check_target(campaign: Campaign) -> None:
    """Raises ValueError where a CSV is named and not there; a dry run may name none."""
    target = campaign.judge.external
    if isinstance(target, ExternalCsv) and target.path is not None:
        require_target(target)


def _check_splits(campaign: Campaign) -> None:
    """Raises ValueError where a suite has no items for a split that every round, or the end, asks."""
    judge = campaign.judge
    for name, suite, splits in (
        ("dev", judge.dev, ("dev-a", "dev-b")),
        ("external", judge.target_suite, ("external-a", "external-b", "final")),
    ):
        if isinstance(suite, GeneratedSuite):
            given, needed = suite.items_per_family, splits
        elif suite is not None:  # a CSV, whose sealed share is its final split
            given, needed = suite.items, splits[:2]
        else:
            continue
        lacking = [split for split in needed if split not in given]
        if lacking:
            raise ValueError(
                f"judge.{name} of campaign {campaign.name} needs items for {', '.join(needed)}, got "
                f"{', '.join(given)}: add {', '.join(lacking)}"
            )


def _check_budgets(campaign: Campaign, placement: Placement) -> None:
    """Raises ValueError where a budget is smaller than what one job may take until it is killed."""
    rules = campaign.constitution
    for what, trains in (("training", True), ("scoring", False)):
        most = most_within(placement.resources(trains=trains), rules.limits.run_seconds, placement.site.grace_seconds)
        needed = figures(rules.budgets, most) | {"wall_hours": most.seconds / 3600}
        for name, limit in limits_of(rules.budgets).items():
            if needed[name] > limit:
                raise ValueError(
                    f"campaign {campaign.name} has a budget of {amount(limit)} {WORDS[name]}, and one {what} job may "
                    f"take {amount(needed[name])} until it is killed: raise constitution.budgets.{name} or lower "
                    "constitution.limits.run_seconds"
                )


def _check_engine(found: Preflight) -> None:
    """Raises ValueError where the weights alone outgrow the GPUs that a scoring job decodes on."""
    engine, gpus, model = found.campaign.judge.engine, found.placement.scoring_gpus, found.expected.architecture
    server = engine.server if isinstance(engine, OpenAISettings) else None
    if not gpus or isinstance(server, CommandServer):
        return
    share = server.gpu_memory if isinstance(server, VllmServer) else 1.0
    needed = 2 * model.num_parameters()  # bfloat16
    if needed > share * gpus * memory_bytes(found.site.gpu_memory):
        raise ValueError(
            f"a scoring job of campaign {found.campaign.name} decodes on {share:.0%} of {gpus} GPUs of "
            f"{found.site.gpu_memory}, and the weights alone take {needed / GIB:.0f} GB: raise tensor_parallel of a "
            "server, or let the engine ask a `url`"
        )


def _check_reach(campaign: Campaign) -> None:
    """Raises ValueError where a delta may change what the plan of memory is made for."""
    space = campaign.constitution.mutation_space
    for path in PLANNED:
        if (pattern := pattern_of(space, path)) is not None:
            raise ValueError(
                f"campaign {campaign.name} lets a delta change {path} ({pattern} in constitution.mutation_space), for "
                "which its GPUs' memory was planned: name the settings that may change, without this one"
            )


def _check_shapes(folder: Path, found: Architecture, size: Architecture) -> None:
    """Raises ValueError unless an imported substrate is of the size that it stands for."""
    other = [
        f"{name} {getattr(found, name)} instead of {getattr(size, name)}"
        for name in Architecture.model_fields
        if name not in ITS_OWN and getattr(found, name) != getattr(size, name)
    ]
    if other:
        raise ValueError(
            f"the substrate in {folder} is no {size.name}: it has {other[0]}; import that checkpoint, or name this "
            "folder as substrate.path"
        )
