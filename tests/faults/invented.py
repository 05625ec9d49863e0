"""An invented campaign for the fault tests: the controller's own code on a drawn world, without training or torch.

What a run would answer is drawn from its name alone, so the campaign has one true history whatever goes wrong on the
way to it. Proposals come from the default worker's own program, called in this process.
"""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_evolve.artefacts import CampaignFolder, save_json, save_yaml
from megatron_evolve.budget import Account
from megatron_evolve.campaign import Campaign, plan_of
from megatron_evolve.candidate import candidate_id, run_seed
from megatron_evolve.closing import close_campaign
from megatron_evolve.desk import Desk
from megatron_evolve.eval.looks import Looks
from megatron_evolve.eval.paired import Answers, RunItems
from megatron_evolve.eval.score import ItemRows
from megatron_evolve.eval.seeds import RunReplicates
from megatron_evolve.eval.suite import Split
from megatron_evolve.jobs import Ground
from megatron_evolve.launch.job import Launcher
from megatron_evolve.ledger import Ledger
from megatron_evolve.loop import forgiven, pauses
from megatron_evolve.meta import initial_policy
from megatron_evolve.origin import ORIGIN_ROUND, Origin
from megatron_evolve.placement import Placement
from megatron_evolve.policy import DomainState
from megatron_evolve.retries import Retries
from megatron_evolve.rounds import run_campaign_rounds
from megatron_evolve.site import Site
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.mix import Mix
from megatron_evolve.substrate.recipe import Recipe
from megatron_evolve.substrate.settings import Settings
from megatron_evolve.workers.brief import Brief, document
from megatron_evolve.workers.propose import propose

FAMILIES = ("cipher", "gravity")
STYLES = {name: ["answer", "trace"] for name in FAMILIES}
ITEMS = {"dev-a": 8, "dev-b": 24, "external-a": 12, "external-b": 12, "final": 24}  # of each family
SUBSTRATE, JUDGE = digest_of("an invented substrate"), digest_of("an invented judge")
WEIGHTS = {"dev": {"cipher": 0.5, "gravity": 0.5}, "external": {"cipher": 0.4, "gravity": 0.6}}
DEFAULT = Settings(
    mix=Mix(weight=dict.fromkeys(FAMILIES, 1.0), style=dict.fromkeys(FAMILIES, "answer")), recipe=Recipe()
)
ORIGIN_SEEDS = 8
SITE = Site(gpus_per_node=1)
RUN_SECONDS = 30  # the longest job takes 20
RETRIES = Retries(first_wait_s=0.2, longest_wait_s=1.0)  # a job here takes 0.4 s at most


def campaign(
    seed: int, *, rounds: int = 2, workers: int = 3, external_looks: int = 14, budgets: dict[str, float] | None = None
) -> Campaign:
    """A campaign whose budget of external looks ends within it."""

    def suite(number: int, *splits: str) -> dict[str, Any]:
        asked = {split: ITEMS[split] for split in splits}
        families = {name: {"weight": 1} for name in FAMILIES}
        return {
            "kind": "generated",
            "difficulty": "nano",
            "seed": number,
            "families": families,
            "items_per_family": asked,
        }

    document = {
        "schema": "campaign/1",
        "name": "invented",
        "claim": "performance",
        "comparator": "origin",
        "seed": seed,
        "open_final": "at-end",
        "judge": {
            "secret": "a-secret-of-the-tests-only",
            "dev": suite(1, "dev-a", "dev-b"),
            "external": suite(2, "external-a", "external-b", "final"),
        },
        "constitution": {
            "rounds": rounds,
            "workers": workers,
            "anchor_seeds": 2,
            "external_looks": external_looks,
            "promote_probability": 0.51,
            "repairs": 1,
            "limits": {"run_seconds": RUN_SECONDS},
            "budgets": budgets or {},
        },
        "search": {"replicates": {"explorer": 1, "confirm_candidates": 1, "confirm_seeds": 1}},
    }
    return Campaign.parse(document, where="the invented campaign")


def rows_of(name: str, seed: int, number: int, splits: tuple[str, ...]) -> ItemRows:
    """What a run answers to the items of a round: a candidate has its skill, a run its luck, an item its difficulty."""
    rows = []
    for split in splits:
        for family in FAMILIES:
            skill = random.Random(f"{name} {family}").gauss(0.5, 0.15) + random.Random(f"{name} {seed}").gauss(0, 0.05)
            items, luck = (random.Random(f"{who} {number} {split} {family}") for who in ("items", f"{name} {seed}"))
            for place in range(ITEMS[split]):
                right = luck.random() < skill - items.gauss(0, 0.3)
                row = {"item_id": f"{number}-{family}-{place}", "family": family, "subfamily": "plain", "split": split}
                row |= {"correct": right, "exact": right, "boxed": True, "truncated": False}
                rows.append({**row, "num_tokens": 5, "prediction": "x"})
    return ItemRows.of(rows)


def comparison(split: str, number: int) -> str:
    """The comparison key of a split in a round."""
    return digest_of([JUDGE, split, number])


def origin() -> Origin:
    """The frozen origin's scores, as the judge would keep them."""
    name = candidate_id(SUBSTRATE, DEFAULT)
    seeds = tuple(run_seed(0, ORIGIN_ROUND, name, index) for index in range(ORIGIN_SEEDS))

    def answers(*splits: str) -> Answers:
        return Answers.of([_items(name, seed, splits) for seed in seeds])

    dev, external = (answers(*splits).replicates(name, seeds) for splits in (("dev-b",), ("external-a", "external-b")))
    means = {}
    for split in ("dev-a", "dev-b", "external-a", "external-b"):
        found = answers(split)
        means[split] = dict(zip(found.families, found.family_means_RF().mean(0).tolist(), strict=True))
    return Origin(candidate=name, seeds=seeds, means=means, replicates=RunReplicates(dev, external).to_dict())


def _items(name: str, seed: int, splits: tuple[str, ...]) -> RunItems:
    return rows_of(name, seed, ORIGIN_ROUND, splits).of_run(name, seed, *splits)


VIEW = {
    "name": "invented",
    "digest": SUBSTRATE,
    "architecture": {},
    "default": DEFAULT.model_dump(mode="json"),
    "construction": {"families": list(FAMILIES), "difficulty": "nano", "styles": STYLES},
}


def answer(question: bytes) -> bytes:
    """The default worker's answer to a brief."""
    brief = Brief.parse(json.loads(question), where="brief")
    return json.dumps(document(propose(brief))).encode()


@dataclass(frozen=True)
class Invented:
    """One invented campaign in a folder."""

    root: Path
    campaign: Campaign
    origin: Origin

    @property
    def folder(self) -> CampaignFolder:
        """Its paths."""
        return CampaignFolder(self.root / "campaign")

    @property
    def suites(self) -> dict[str, Any]:
        """Weights and sizes as the judge tells them."""
        items: dict[Split, int] = {split: number * len(FAMILIES) for split, number in ITEMS.items()}
        return {"weights": WEIGHTS, "items": items}

    @contextmanager
    def opened(self) -> Iterator[tuple[Ledger, Account]]:
        """Its ledger and what it used, as the loop opens them."""
        account = Account(self.campaign.constitution.budgets)
        with closing(Ledger(self.folder.root, account.enter)) as ledger:
            yield ledger, account

    def desk(self, ledger: Ledger, account: Account, launcher: Launcher, stop: Callable[[], bool]) -> Desk:
        """The campaign, open."""
        folder, rules = self.folder, self.campaign.constitution
        return Desk(
            campaign=self.campaign,
            ground=Ground(
                folder,
                self.root / "substrate",
                self.root / "judge" / "judge",
                rules.limits.run_seconds,
                placement=Placement(site=SITE, scoring_gpus=1),
            ),
            ledger=ledger,
            looks=Looks(folder.looks, external_budget=rules.external_looks),
            launcher=launcher,
            substrate_view=VIEW,
            substrate_digest=SUBSTRATE,
            judge_digest=JUDGE,
            origin=self.origin,
            origin_settings=DEFAULT,
            suites=self.suites,
            on_progress=lambda what, facts: None,
            stop=stop,
            retries=replace(RETRIES, forgiven=forgiven(ledger)),
            account=account,
        )

    def control(self, ledger: Ledger, account: Account, launcher: Launcher, stop: Callable[[], bool]) -> dict[str, Any]:
        """What the loop does with an open campaign, from its first event to its last."""
        with pauses(ledger):
            ledger.once("campaign-opened", "", self._opening)
            account.enter(ledger.find("campaign-opened"))
            desk = self.desk(ledger, account, launcher, stop)
            ledger.once("policy", "1", self._first_policy)
            return close_campaign(desk, run_campaign_rounds(desk))

    def _opening(self) -> dict[str, Any]:
        folder = self.folder
        return {
            "name": self.campaign.name,
            "claim": self.campaign.claim,
            "version": "0.1.0",
            "decisions": digest_of("sources"),
            "campaign": save_yaml(folder.campaign, self.campaign),
            "constitution": save_yaml(folder.constitution, self.campaign.constitution),
            "substrate": SUBSTRATE,
            "judge": JUDGE,
            "suites": digest_of(self.suites),
            "substrate_folder": str(self.root / "substrate"),
            "judge_folder": str(self.root / "judge"),
            "plan": plan_of(self.campaign),
            "budgets": self.campaign.constitution.budgets.model_dump(mode="json"),
        }

    def _first_policy(self) -> dict[str, Any]:
        domains = {
            name: DomainState(
                dev=self.origin.means["dev-a"][name],
                external=None,
                dev_weight=WEIGHTS["dev"][name],
                external_weight=None,
            )
            for name in FAMILIES
        }
        policy = initial_policy(DEFAULT, domains, self.campaign.constitution)
        policy = policy.replace(round=1, replicates=self.campaign.search.replicates)
        return {
            "digest": save_yaml(self.folder.policy(1), policy),
            "edits": save_json(self.folder.edits(1), []),
        }
