"""This project's policy in a laboratory: the product's own proposer, reviewer, judge and meta, run by run.

Nothing here decides. Deltas come from `workers.propose`, are refused by `workers.validate`, evidence is `review`'s on
per-item answers, verdicts `verdict.judge`'s, and `next_policy` writes the next round. What is new is only that a
laboratory draws or trains each run, and that its answers are in memory. A `Variant` leaves one part out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.campaign import Campaign
from megatron_evolve.candidate import candidate_id
from megatron_evolve.comparisons import Weights
from megatron_evolve.contest.space import SPLITS, Lab, Sheet, Spent, Trained
from megatron_evolve.delta import canonical_change
from megatron_evolve.eval.paired import Answers, RunItems
from megatron_evolve.eval.score import ItemRows
from megatron_evolve.eval.seeds import RunReplicates
from megatron_evolve.evidence import Evidence
from megatron_evolve.facts import ProposalFacts, RoundFacts, RunFacts
from megatron_evolve.meta import initial_policy, next_policy
from megatron_evolve.origin import ORIGIN_ROUND, Origin
from megatron_evolve.policy import DomainState, Replicates, SearchPolicy
from megatron_evolve.proposals import Setback, brief_of
from megatron_evolve.review import a_half_means, first_pooled, review
from megatron_evolve.substrate.settings import Settings
from megatron_evolve.workers.propose import propose
from megatron_evolve.workers.validate import validate

NOWHERE = CampaignFolder(Path("contest"))


@dataclass(frozen=True)
class Variant:
    """The policy with a part taken out; all False is the product."""

    anchor: bool = True
    dead_ends: bool = True
    replicates: bool = True


def campaign_of(variant: Variant, base: Campaign) -> Campaign:
    """The campaign of a variant; what it saves on anchors or replicates is spent on more explorers."""
    rules = base.constitution
    if not variant.anchor:  # its 3 runs go to 3 explorers
        rules = rules.replace(workers=rules.workers + rules.anchor_seeds)
    if not variant.replicates:  # one anchor run, no further seeds: 2 + 2 runs go to 4 explorers
        rules = rules.replace(workers=rules.workers + 4, anchor_seeds=1)
    replicates = base.search.replicates
    if not variant.replicates:
        replicates = Replicates(explorer=1, confirm_candidates=0, confirm_seeds=0)
    return base.replace(constitution=rules, search=base.search.replace(replicates=replicates))


@dataclass(frozen=True, eq=False)
class DrawnRun(RunFacts):
    """A run whose answers are in memory: by split, where it was asked."""

    answered: Mapping[str, tuple[Sheet, np.ndarray]] = None

    def has(self, split: str) -> bool:
        return split in self.answered

    def rows(self, split: str) -> ItemRows:
        return self._kept[split]

    def comparison(self, split: str) -> str:
        return split

    def items(self, splits: tuple[str, ...]) -> RunItems:
        if splits not in self._items:
            sheets = [self.answered[split] for split in splits]
            ids, families = _joined(tuple(sheet for sheet, _ in sheets))
            right = np.concatenate([right for _, right in sheets])
            self._items[splits] = RunItems(self.candidate, self.seed, ids, families, right, " ".join(splits))
        return self._items[splits]

    @cached_property
    def _items(self) -> dict[tuple[str, ...], RunItems]:
        return {}

    @cached_property
    def _kept(self) -> dict[str, ItemRows]:
        return {split: _rows(sheet, right) for split, (sheet, right) in self.answered.items()}


@lru_cache(maxsize=64)
def _joined(sheets: tuple[Sheet, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and families of several sheets: the same arrays for every run, so that pairing need not look at them."""
    return np.concatenate([one.ids_n for one in sheets]), np.concatenate([one.families_n for one in sheets])


def _rows(sheet: Sheet, right: np.ndarray) -> ItemRows:
    true, none = np.ones(len(right), dtype=bool), np.zeros(len(right), dtype=int)
    text = np.full(len(right), "")
    split = np.full(len(right), sheet.split)
    return ItemRows(sheet.ids_n, sheet.families_n, sheet.families_n, split, right, right, true, ~true, none, text)


class ProductCampaign:
    """One campaign of the product, or of a variant, in a laboratory."""

    def __init__(self, lab: Lab, variant: Variant, seed: int) -> None:
        self.lab, self.variant = lab, variant
        self.space = lab.space
        self.campaign = campaign_of(variant, self.space.campaign).replace(seed=seed)
        self.rules = self.campaign.constitution
        self.weights = Weights(self.space.dev_weights, self.space.external_weights)
        self.origin = self._origin()
        self.closed: list[RoundFacts] = []
        self.evidence: list[Evidence] = []

    def run(self) -> Trained:
        """All rounds; ships a fresh run of the settings that stand at the end."""
        policy = self._first_policy()
        for _ in range(self.rules.rounds):
            policy = self._round(policy)
        return self.lab.ship(policy.standing)

    def _first_policy(self) -> SearchPolicy:
        accuracy = self.origin.family_means("dev-a")
        domains = {
            name: DomainState(dev=accuracy[name], external=None, dev_weight=weight, external_weight=None)
            for name, weight in self.space.dev_weights.items()
        }
        policy = initial_policy(self.space.origin, domains, self.rules)
        return policy.replace(round=1, replicates=self.campaign.search.replicates)

    def _origin(self) -> Origin:
        num_seeds = self.campaign.judge.origin_seeds
        runs = self.lab.origin_runs(self.space.origin, num_seeds)
        sheets = {split: self.lab.sheet(split, ORIGIN_ROUND) for split in SPLITS}
        name = candidate_id(self.space.substrate, self.space.origin)
        drawn = self.origin_drawn = [self._answer(name, seed, run, sheets) for seed, run in enumerate(runs)]
        halves = ("external-a", "external-b")
        dev, outside = (
            Answers.of([run.items(splits) for run in drawn]).replicates(name, range(num_seeds))
            for splits in (("dev-b",), halves)
        )
        means = {}
        for split in SPLITS:
            answers = Answers.of([run.items((split,)) for run in drawn])
            means[split] = dict(zip(answers.families, answers.family_means_RF().mean(0).tolist(), strict=True))
        replicates = RunReplicates(dev, outside).to_dict()
        return Origin(candidate=name, seeds=tuple(range(num_seeds)), means=means, replicates=replicates)

    # --- a round ---

    def _round(self, policy: SearchPolicy) -> SearchPolicy:
        one = DrawnRound(self, policy)
        one.run_candidates()
        looks = {"dev": 0, "external": self.lab.looks, "external_budget": self.rules.external_looks}
        evidence = self._evidence(one.facts(), looks)
        if not self.variant.replicates:
            evidence = _taken_at_their_word(evidence)
        self.closed.append(one.facts())
        self.evidence.append(evidence)
        following, _ = next_policy(self.rules, policy, evidence)
        return following if self.variant.dead_ends else following.replace(dead_ends=())

    def _evidence(self, facts: RoundFacts, looks: Mapping[str, int]) -> Evidence:
        first = first_pooled(facts.policy, self.rules)
        window = [*(one for one in self.closed if one.number >= first), facts]
        earlier = [found for past in self.evidence for found in past.replicates]
        return review(window, self.rules, self.origin, self.weights, earlier, looks)

    def _answer(
        self, name: str, seed: int, run: Trained, sheets: Mapping[str, Sheet], before: DrawnRun | None = None
    ) -> DrawnRun:
        answered = dict(before.answered) if before else {}
        answered |= {split: (sheet, self.lab.answers(run, sheet)) for split, sheet in sheets.items()}
        return DrawnRun(name, seed, NOWHERE.root, {}, answered=answered)


def _taken_at_their_word(evidence: Evidence) -> Evidence:
    """Without further seeds nothing is ever confirmed, so every candidate counts as if it were."""
    taken = {"confirmed": True, "confirmed_off_objective": True}
    candidates = tuple(one.replace(**taken) if one.role == "explorer" else one for one in evidence.candidates)
    return evidence.replace(candidates=candidates)


class DrawnRound:
    """The runs of one round: what rounds.py does with jobs, done with draws."""

    def __init__(self, owner: ProductCampaign, policy: SearchPolicy) -> None:
        self.owner, self.policy, self.lab = owner, policy, owner.lab
        self.space = owner.space
        self.sheets = {split: self.lab.sheet(split, policy.round) for split in SPLITS}
        self.anchor = candidate_id(self.space.substrate, policy.standing)
        self.settings: dict[str, Settings] = {self.anchor: policy.standing}
        self.proposals: list[ProposalFacts] = []
        self.refusals: list[dict[str, Any]] = []
        self.trained: dict[str, list[tuple[Trained | None, DrawnRun]]] = {}

    def run_candidates(self) -> None:
        """The anchor, the explorers with repairs, the confirmations, and the looks outside."""
        rules, replicates = self.owner.rules, self.policy.replicates
        if self.owner.variant.anchor:
            self.train(self.anchor, rules.anchor_seeds)
        for worker, axis in enumerate(self.policy.axes_for(rules.workers - 1), start=1):
            self._explore(worker, axis)
        means = a_half_means(self.facts(), self.owner.weights) if self.policy.objective == "dev" else self._outside("a")
        leaders = sorted(means, key=lambda name: (-means[name], name))
        for name in leaders[: replicates.confirm_candidates]:
            self.train(name, replicates.confirm_seeds)
        asked = [
            *([self.anchor] if self.owner.variant.anchor else []),
            *(self.trained if self.policy.ask_external == "all" else leaders[:1]),
        ]
        for split in ("external-a", "external-b"):
            for name in dict.fromkeys(asked):
                self._ask(name, split)

    def _outside(self, half: str) -> dict[str, float]:
        for name in self.trained:
            self._ask(name, f"external-{half}")
        return a_half_means(self.facts(), self.owner.weights)

    def train(self, name: str, count: int) -> bool:
        """`count` more runs of a candidate, scored on dev; False if the first of them diverged."""
        runs = self.trained.setdefault(name, [])
        for _ in range(count):
            try:
                run = self.lab.train(self.settings[name])
            except Spent:
                break
            seed = self.policy.round * 1000 + len(runs)
            runs.append((run, self._scored(name, seed, run)))
        return bool(runs) and runs[0][0] is not None

    def facts(self) -> RoundFacts:
        """What the reviewer reads."""
        return RoundFacts(
            number=self.policy.round,
            folder=NOWHERE,
            policy=self.policy,
            policy_digest="",
            substrate=self.space.substrate,
            judge="",
            anchor=self.anchor,
            proposals=tuple(self.proposals),
            refusals=tuple(self.refusals),
            runs={name: tuple(drawn for _, drawn in runs) for name, runs in self.trained.items()},
        )

    def _scored(self, name: str, seed: int, run: Trained | None) -> DrawnRun:
        if run is None:
            end = {"outcome": "diverged", "reason": "the loss was not finite", "cpu_seconds": 0.0}
            return DrawnRun(name, seed, NOWHERE.root, {"train": end}, answered={})
        self.lab.seconds += self.lab.scoring_seconds(run, self.sheets["dev-a"])  # one job asks both halves
        dev = {split: self.sheets[split] for split in ("dev-a", "dev-b")}
        return self.owner._answer(name, seed, run, dev)

    def _ask(self, name: str, split: str) -> None:
        """One look, for all runs of a candidate; none beyond the budget."""
        runs = [place for place, (run, drawn) in enumerate(self.trained[name]) if run and not drawn.has(split)]
        if not runs or self.lab.looks >= self.owner.rules.external_looks:
            return
        self.lab.looks += 1
        for place in runs:
            run, drawn = self.trained[name][place]
            self.lab.seconds += self.lab.scoring_seconds(run, self.sheets[split])
            sheet = {split: self.sheets[split]}
            self.trained[name][place] = run, self.owner._answer(name, drawn.seed, run, sheet, drawn)

    def _explore(self, worker: int, axis: Any) -> None:
        """Asks a worker until a candidate of its trains, or its repairs are used up."""
        owner, setback, refused = self.owner, None, ""
        for attempt in range(owner.rules.repairs + 1):
            brief = brief_of(owner.campaign, self.space.view, self.policy, worker, axis, attempt, setback)
            proposal = propose(brief)
            if proposal.delta is None:
                refused, setback = proposal.nothing, Setback(None, "", proposal.nothing)
                continue
            settings = validate(proposal.delta, self.policy, owner.rules, self.space.view)
            name = candidate_id(self.space.substrate, settings)
            if name in self.settings and attempt:
                return
            self.settings[name] = settings
            change = canonical_change(self.policy.standing, settings)
            self.proposals.append(ProposalFacts(name, worker, axis.name, change, proposal.delta.hypothesis))
            if self.train(name, self.policy.replicates.explorer):
                return
            setback = Setback(proposal.delta, "diverged", "the loss was not finite")
        if refused:
            self.refusals.append({"worker": worker, "axis": axis.name, "reason": refused, "nothing": True})
