"""The loop: opens a campaign, takes it round by round to its end, and closes it. One controller per folder.

    open (digests checked) -> round 1 .. R (rounds.py) -> close (the standing settings against the origin, sealed items)

Between rounds exactly one value survives: the search policy. Run again on the same folder, the loop goes on where it
was.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_evolve import __version__
from megatron_evolve.artefacts import CampaignFolder, load_yaml_checked, save_json, save_yaml
from megatron_evolve.budget import Account
from megatron_evolve.campaign import Campaign, plan_of
from megatron_evolve.closing import close_campaign
from megatron_evolve.desk import Desk
from megatron_evolve.estimate import estimate
from megatron_evolve.eval.freeze import SUITES_FILE
from megatron_evolve.eval.looks import Looks
from megatron_evolve.launch.job import Launcher
from megatron_evolve.launch.local import DEVICES_VARIABLE, LocalLauncher, WarmSettings
from megatron_evolve.launch.rundir import Lock, make_folder, read_json, resolved
from megatron_evolve.launch.slurm_launcher import SlurmLauncher
from megatron_evolve.ledger import Ledger
from megatron_evolve.meta import initial_policy
from megatron_evolve.origin import read_origin
from megatron_evolve.placement import cores_here
from megatron_evolve.policy import DomainState, SearchPolicy
from megatron_evolve.preflight import check_campaign
from megatron_evolve.prepare import Prepared, ground_of, prepare, reopen, run_one
from megatron_evolve.readiness import check_ready, first_job
from megatron_evolve.retries import Paused, Retries
from megatron_evolve.reuse import rounds_anew
from megatron_evolve.rounds import run_campaign_rounds
from megatron_evolve.site import Site, kubernetes_launcher, placed
from megatron_evolve.sources import decision_sources
from megatron_evolve.status import paused
from megatron_evolve.stopping import StopOrder
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.manifest import public_view

Progress = Callable[[str, dict[str, Any]], None]

# What every job of a campaign loads; the warm parent loads it once. Names only: nothing is imported here.
PRELOAD = ("megatron_evolve.substrate.train.preload:preload",)


@dataclass(frozen=True)
class Session:
    """How this start of the controller runs: not part of the campaign, so nothing of it is hashed.

    stop   whether this process was told to stop
    moved  whether it was by SIGTERM, as a scheduler tells it that may start it again elsewhere
    """

    root: Path
    store: Path
    on_progress: Progress
    stop: Callable[[], bool]
    site: Site = field(default_factory=Site)
    retries: Retries = field(default_factory=Retries)
    moved: Callable[[], bool] = lambda: False


def run_campaign(session: Session, campaign: Campaign) -> dict[str, Any]:
    """Runs or resumes the campaign in `session.root` to its end; returns the closing statement.

    Raises ValueError in one sentence for anything that does not fit (another campaign in the folder, a changed
    substrate or judge, a second controller, a layout that does not fit the site), before any job starts.
    """
    campaign, folder = placed(campaign, session.site), CampaignFolder(resolved(session.root))
    new = not folder.ledger.exists() or folder.ledger.stat().st_size == 0  # an earlier start may have opened nothing
    found = check_campaign(campaign, session.site, session.store, new=new)
    make_folder(folder.root)
    stop = StopOrder(folder.stop_file, session.stop, session.moved)
    account = Account(campaign.constitution.budgets)
    with (
        Lock(folder.lock),
        closing(Ledger(folder.root, account.enter)) as ledger,
        launcher_of(campaign, session) as launcher,
        stop.carried_out(),
    ):
        session.on_progress("use", {"use": estimate(found), "budget": account.statement()})
        opened = ledger.find("campaign-opened")
        if opened is not None:
            check_same_campaign(folder, campaign, opened.data)
        if not (new or stop() or ledger.has("campaign-closed")):
            check_ready(campaign, session.site, found.expected, resumes=True)
        if session.site != Site():
            save_yaml(folder.site, session.site)
        if opened is None:
            if (job := first_job(campaign, session.site, folder.root)) is not None:
                session.on_progress("engine", {"key": job.key})
                run_one(launcher, job, stop)
            prepared = prepare(campaign, session.site, session.store, launcher, session.on_progress, stop)
        else:
            prepared = reopen(Path(opened.data["substrate_folder"]), Path(opened.data["judge_folder"]))
        with pauses(ledger):
            return _run(replace(session, stop=stop), campaign, folder, ledger, account, launcher, prepared)


@contextmanager
def launcher_of(campaign: Campaign, session: Session) -> Iterator[Launcher]:
    """The site's launcher; that of this machine has the site's GPUs or those that this process may see."""
    if session.site.launcher == "kubernetes":
        with kubernetes_launcher(session.site) as launcher:
            yield launcher
        return
    if session.site.launcher == "slurm":
        make_folder(session.root)
        with SlurmLauncher(session.site.queue, session.root.resolve()) as launcher:
            yield launcher
        return
    warm = WarmSettings(PRELOAD, ("megatron_evolve",), {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"})
    seen = os.environ.get(DEVICES_VARIABLE)
    devices = seen.split(",") if seen else [str(number) for number in range(session.site.gpus_per_node)]
    devices = devices[: session.site.gpus_per_node]
    kept_warm = warm if campaign.launch.warm else None
    with LocalLauncher(cores_here(campaign), session.root.resolve(), kept_warm, devices) as launcher:
        yield launcher


@contextmanager
def pauses(ledger: Ledger) -> Iterator[None]:
    """Enters that a paused campaign goes on, and that one pauses: its standing between the two is that it is paused."""
    if (pause := paused(ledger)) is not None:
        ledger.append("resumed", pause.key, {})
    try:
        yield
    except Paused as pause:
        facts = {"why": pause.why, "attempts": pause.attempts, "once": pause.once}
        ledger.append("paused", str(1 + len(ledger.keys("paused"))), facts)
        raise


def forgiven(ledger: Ledger) -> dict[str, int]:
    """By job, its last attempt before a pause: what failed up to it was the machine's."""
    found: dict[str, int] = {}
    for event in ledger.of_kind("paused"):
        found |= event.data["attempts"]
    return found


def check_same_campaign(folder: CampaignFolder, campaign: Campaign, opened: dict[str, Any]) -> None:
    """Refuses to go on in a folder that another campaign opened, or whose frozen files were changed."""
    if digest_of(campaign.model_dump(mode="json", by_alias=True)) != opened["campaign"]:
        raise ValueError(
            f"{folder.root} holds campaign {opened['name']!r}, opened with other settings than the file given now: "
            f"give {folder.campaign}, or choose another --dir"
        )
    load_yaml_checked(folder.campaign, opened["campaign"])
    load_yaml_checked(folder.constitution, opened["constitution"])


def _run(
    session: Session,
    campaign: Campaign,
    folder: CampaignFolder,
    ledger: Ledger,
    account: Account,
    launcher: Launcher,
    prepared: Prepared,
) -> dict[str, Any]:
    opened = ledger.once("campaign-opened", "", lambda: _opening(folder, campaign, prepared))
    account.enter(ledger.find("campaign-opened"))
    _check_digests(opened, prepared)
    desk = Desk(
        campaign=campaign,
        ground=ground_of(campaign, session.site, folder, prepared.substrate_folder, prepared.judge_folder),
        ledger=ledger,
        looks=Looks(folder.looks, external_budget=campaign.constitution.external_looks),
        launcher=launcher,
        substrate_view=public_view(prepared.substrate),
        substrate_digest=prepared.substrate.digest,
        judge_digest=prepared.judge.digest,
        origin=read_origin(prepared.judge_folder, prepared.judge),
        origin_settings=prepared.substrate.default,
        suites=read_json(prepared.judge_folder / SUITES_FILE),
        on_progress=session.on_progress,
        stop=session.stop,
        retries=replace(session.retries, forgiven=forgiven(ledger)),
        account=account,
    )
    ledger.once("policy", "1", lambda: _first_policy(desk, prepared))
    policy = run_campaign_rounds(desk)
    if ledger.find("campaign-closed") is None:
        reopen(prepared.substrate_folder, prepared.judge_folder)  # nothing may have changed on the way
    return close_campaign(desk, policy)


def _opening(folder: CampaignFolder, campaign: Campaign, prepared: Prepared) -> dict[str, Any]:
    return {
        "name": campaign.name,
        "claim": campaign.claim,
        "version": __version__,
        "decisions": decision_sources(),
        "campaign": save_yaml(folder.campaign, campaign),
        "constitution": save_yaml(folder.constitution, campaign.constitution),
        "substrate": prepared.substrate.digest,
        "judge": prepared.judge.digest,
        "suites": suites_digest(prepared.judge_folder),
        "substrate_folder": str(prepared.substrate_folder),
        "judge_folder": str(prepared.judge_folder),
        "plan": plan_of(campaign),
        "rounds_anew": rounds_anew(campaign),
        "budgets": campaign.constitution.budgets.model_dump(mode="json"),
    }


def suites_digest(judge_folder: Path) -> str:
    """Digest of the score weights and sizes that the judge tells; not in the judge's own digest."""
    return digest_of(read_json(judge_folder / SUITES_FILE))


def _check_digests(opened: dict[str, Any], prepared: Prepared) -> None:
    """A campaign goes on only on the ground and under the judge that it was opened with."""
    now = {
        "substrate": prepared.substrate.digest,
        "judge": prepared.judge.digest,
        "suites": suites_digest(prepared.judge_folder),
    }
    for name, digest in now.items():
        if opened[name] != digest:
            raise ValueError(
                f"the {name} changed since the campaign was opened: expected {opened[name][:12]}, got {digest[:12]}; "
                "restore it, or start a new campaign in another folder"
            )


def _first_policy(desk: Desk, prepared: Prepared) -> dict[str, Any]:
    policy = opening_policy(desk.campaign, prepared)
    return {
        "digest": save_yaml(desk.ground.folder.policy(policy.round), policy),
        "edits": save_json(desk.ground.folder.edits(policy.round), []),
    }


def opening_policy(campaign: Campaign, prepared: Prepared) -> SearchPolicy:
    """The policy of round 1: the substrate's own recipe, every axis open, dev as the objective, dev's profile known."""
    told = prepared.judge.public_view()["dev"]["weight"]
    accuracy = read_origin(prepared.judge_folder, prepared.judge).family_means("dev-a")
    domains = {
        name: DomainState(dev=accuracy.get(name), external=None, dev_weight=weight, external_weight=None)
        for name, weight in sorted(told.items())
    }
    policy = initial_policy(prepared.substrate.default, domains, campaign.constitution)
    changes: dict[str, Any] = {"replicates": campaign.search.replicates, "ask_external": campaign.search.ask_external}
    if campaign.search.axes is not None:
        changes["axes"] = campaign.search.axes
    return policy.replace(round=1, **changes)
