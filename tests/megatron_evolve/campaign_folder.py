"""A campaign folder with invented numbers: real ledger, policies, edits, evidence and looks, and no training.

What explorers truly do is a table here (`TRUTH`), noise is drawn from a fixed seed, and everything after that is the
project's own code: the ledger chains it, meta writes the policies. One domain gains on dev only, so that there is
something to find; some runs fail, one proposal is refused, and one hypothesis tries to be markup.
"""

import math
import random
import statistics
from pathlib import Path
from typing import Any

from megatron_evolve.artefacts import CampaignFolder, save_json, save_yaml
from megatron_evolve.campaign import Campaign, find_campaign, load_campaign, plan_of
from megatron_evolve.candidate import candidate_id, run_seed
from megatron_evolve.delta import Change, Delta, canonical_change
from megatron_evolve.eval.looks import Look, Looks
from megatron_evolve.evidence import (
    CandidateEvidence,
    DomainEffect,
    EffectValue,
    Evidence,
    Noise,
    RunRecord,
    ScoreValue,
)
from megatron_evolve.ledger import Ledger
from megatron_evolve.meta import initial_policy, next_policy
from megatron_evolve.policy import DomainState, SearchPolicy
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.mix import Mix
from megatron_evolve.substrate.recipe import Recipe
from megatron_evolve.substrate.settings import Settings, write_all
from megatron_evolve.workers.brief import delta_document
from tests.megatron_evolve.invented_verdicts import verdicts_of

SUBSTRATE, JUDGE = digest_of("a substrate"), digest_of("a judge")
ITEMS = {"dev-a": 1200, "dev-b": 1200, "external-a": 600, "external-b": 600}
MARKUP = "<script>alert('no')</script> & shares \"follow\" weight"
NO_LOOKS = digest_of("looks")
RUN_SD = 0.006

# Operator: true gain on dev (in the shifted domain, in every other) and the same on the external target.
TRUTH = {
    "headroom": ((0.17, -0.01), (-0.03, -0.01)),
    "balance": ((-0.06, 0.02), (0.01, 0.02)),
    "style": ((0.02, 0.03), (0.02, 0.03)),
    "lr": ((0.03, 0.03), (0.02, 0.03)),
    "steps": ((0.05, 0.04), (0.03, 0.04)),
    "schedule": ((0.0, 0.0), (0.0, 0.0)),
    "adapter": ((-0.08, -0.06), (-0.07, -0.06)),
    "stack": ((0.05, 0.05), (0.065, 0.065)),
    "selection": ((-0.05, 0.0), (0.03, 0.02)),
}
# By round and operator: how its first run ended.
FAILURES = {
    (1, "adapter"): ("diverged", "diverged at step 37: loss 1.9e+04 above ten times its start"),
    (2, "schedule"): (
        "out_of_memory",
        "the allocator could not get 1.2 GiB; raise the memory limit or lower the batch",
    ),
    (3, "lr"): ("timed_out", "killed after 1800 s of wall time"),
}
REFUSED = (2, "style")


class Story:
    """Writes one campaign, round by round."""

    def __init__(self, root: Path, external: bool) -> None:
        campaign = load_campaign(find_campaign("demo"))
        if not external:
            campaign = campaign.replace(
                judge=campaign.judge.replace(external=None), claim="infrastructure", comparator=None
            )
        self.campaign: Campaign = campaign
        self.rules = campaign.constitution
        self.families = tuple(campaign.judge.dev.families)
        self.shifted = self.families[-1]
        weight = {name: share.weight for name, share in campaign.judge.dev.families.items()}
        self.dev_weights = {name: value / sum(weight.values()) for name, value in weight.items()}
        self.external_weights = dict.fromkeys(self.families, 1 / len(self.families)) if external else {}
        self.rng = random.Random(7)
        self.tried: set[str] = set()
        self.folder = CampaignFolder(root)
        self.ledger = Ledger(root)
        self.looks = Looks(self.folder.looks, external_budget=self.rules.external_looks)
        base = self.rng.sample([0.28, 0.36, 0.43, 0.52, 0.61, 0.7], k=len(self.families))
        self.level = {name: [one, one - 0.03] for name, one in zip(self.families, base, strict=True)}

    def open(self) -> SearchPolicy:
        self.ledger.append(
            "campaign-opened",
            "",
            {
                "name": self.campaign.name,
                "claim": self.campaign.claim,
                "version": "0.1.0",
                "decisions": digest_of("sources"),
                "campaign": save_yaml(self.folder.campaign, self.campaign),
                "constitution": save_yaml(self.folder.constitution, self.rules),
                "substrate": SUBSTRATE,
                "judge": JUDGE,
                "substrate_folder": "substrate",
                "judge_folder": "judge",
                "plan": plan_of(self.campaign),
            },
        )
        standing = Settings(
            mix=Mix(weight=dict.fromkeys(self.families, 1.0), style=dict.fromkeys(self.families, "answer")),
            recipe=Recipe(),
        )
        domains = {
            name: DomainState(
                dev=self.level[name][0], external=None, dev_weight=self.dev_weights[name], external_weight=None
            )
            for name in self.families
        }
        policy = initial_policy(standing, domains, self.rules).replace(round=1)
        self._policy(policy, [])
        return policy

    def _policy(self, policy: SearchPolicy, edits: list[Any]) -> None:
        facts = {
            "digest": save_yaml(self.folder.policy(policy.round), policy),
            "edits": save_json(self.folder.edits(policy.round), edits),
        }
        self.ledger.append("policy", str(policy.round), facts)

    def start(self, policy: SearchPolicy) -> list[tuple[CandidateEvidence, str]]:
        """Opens a round, proposes and runs; the candidates as they will stand in the evidence, with their operator."""
        self.ledger.append(
            "round-opened", str(policy.round), {"policy": digest_of(policy), "objective": policy.objective}
        )
        anchor = self._candidate(policy, "anchor", "anchor", policy.standing, self.rules.anchor_seeds, "")
        found = [(anchor, "anchor")]
        self.tried = {anchor.id}
        for worker, axis in enumerate(policy.axes_for(self.rules.workers - 1), start=1):
            if (policy.round, axis.operator) == REFUSED:
                self._propose(policy, worker, 0, axis.name, None, "recipe.lr: expected at most 1.0, got 30.0")
                continue
            resolved = self._changed(policy, axis.operator)
            hypothesis = MARKUP if axis.operator == "headroom" else f"More {axis.operator} should transfer."
            self._propose(policy, worker, 0, axis.name, (resolved, hypothesis), "")
            seeds = 2 if axis.operator in ("headroom", "steps", "stack", "selection") else 1
            one = self._candidate(policy, axis.name, axis.operator, resolved, seeds, hypothesis)
            found.append((one, axis.operator))
            self.tried.add(one.id)
        return found

    def _changed(self, policy: SearchPolicy, operator: str) -> Settings:
        standing = policy.standing
        recipe, weight = standing.recipe, standing.mix.weight
        wanted: dict[str, Any] = {
            "headroom": {f"mix.weight.{self.shifted}": 2 * weight[self.shifted]},
            "balance": {f"mix.weight.{self.families[0]}": 1.5 * weight[self.families[0]]},
            "style": {f"mix.style.{self.families[1]}": "trace"},
            "lr": {"recipe.lr": 1.5 * recipe.lr},
            "steps": {"recipe.steps": min(300, recipe.steps + 40)},
            "schedule": {"recipe.schedule": "linear" if recipe.schedule == "cosine" else "cosine"},
            "adapter": {"recipe.adapter": {"rank": 16, "alpha": 16.0, "targets": ["attention", "mamba"]}},
            "selection": {"recipe.checkpoint_selection": "lowest-loss-uniform"},
            "stack": {path: both["to"] for entry in policy.pending for path, both in entry["change"].items()},
        }[operator]
        moved = write_all(standing, wanted)
        while candidate_id(SUBSTRATE, moved) in self.tried:
            moved = write_all(moved, {"recipe.weight_decay": moved.recipe.weight_decay + 0.01})
        return moved

    def _propose(self, policy: SearchPolicy, worker: int, attempt: int, axis: str, made, refused: str) -> None:
        data: dict[str, Any] = {"round": policy.round, "worker": worker, "axis": axis, "call": {"ending": "ok"}}
        data |= {"delta": None, "candidate": "", "refused": refused}
        if made is not None:
            resolved, hypothesis = made
            change = canonical_change(policy.standing, resolved)
            delta = Delta(hypothesis=hypothesis, change={path: Change(set=both["to"]) for path, both in change.items()})
            data |= {"delta": delta_document(delta), "candidate": candidate_id(SUBSTRATE, resolved)}
            data |= {"settings": resolved.model_dump(mode="json")}
        self.ledger.append("proposed", f"{policy.round}/{worker}/{attempt}", data)

    # --- scores -------------------------------------------------------------------------------------------------------

    def _candidate(
        self, policy: SearchPolicy, axis: str, operator: str, resolved: Settings, seeds: int, hypothesis: str
    ) -> CandidateEvidence:
        name = candidate_id(SUBSTRATE, resolved)
        outcome, reason = FAILURES.get((policy.round, operator), ("finished", ""))
        truth = TRUTH.get(operator, ((0.0, 0.0), (0.0, 0.0)))
        domains = {}
        for family in self.families:
            gains = [split[family != self.shifted] for split in truth]
            domains[family] = self._domain(family, gains, seeds, outcome == "finished" and operator != "anchor")
        scored = outcome == "finished"
        runs = []
        for index in range(seeds if scored else 1):
            seed = run_seed(self.campaign.seed, policy.round, name, index)
            runs.append(self._run(policy.round, name, seed, outcome, reason, domains))
        return CandidateEvidence(
            id=name,
            axis=axis,
            role="anchor" if operator == "anchor" else "explorer",
            change=canonical_change(policy.standing, resolved),
            hypothesis=hypothesis,
            runs=tuple(runs),
            dev=self._overall(domains, "dev") if scored else None,
            external=self._overall(domains, "external") if scored else None,
            effects=self._effects(domains, seeds) if scored and operator != "anchor" else {},
            confirmed=seeds > 1 and operator != "anchor",
            confirmed_off_objective=seeds > 1 and operator != "anchor",
            domains=domains if scored else {family: DomainEffect() for family in self.families},
        )

    def _domain(self, family: str, gains: list[float], seeds: int, explorer: bool) -> DomainEffect:
        sd = math.sqrt(RUN_SD**2 / seeds + RUN_SD**2 / 3)
        means = [
            min(0.99, level + gain + self.rng.gauss(0, sd))
            for level, gain in zip(self.level[family], gains, strict=True)
        ]
        scores = [
            ScoreValue(mean=mean, se=math.sqrt(mean * (1 - mean) / n), n=n)
            for mean, n in zip(means, (200, 200), strict=True)
        ]
        effects = [
            self._effect(score.mean - level, 0.02) for score, level in zip(scores, self.level[family], strict=True)
        ]
        outside = bool(self.external_weights)
        return DomainEffect(
            dev=scores[0],
            external=scores[1] if outside else None,
            dev_effect=effects[0] if explorer else None,
            external_effect=effects[1] if explorer and outside else None,
        )

    def _effect(self, mean: float, se: float) -> EffectValue:
        p = statistics.NormalDist().cdf(mean / se)
        return EffectValue(mean=mean, se=se, low=mean - 2.1 * se, high=mean + 2.1 * se, p_better=p)

    def _weighted(self, domains: dict[str, DomainEffect], field: str) -> tuple[float, float] | None:
        weights = self.dev_weights if field.startswith("dev") else self.external_weights
        values = {name: getattr(one, field) for name, one in domains.items()}
        if not weights or None in values.values():
            return None
        mean = sum(weights[name] * one.mean for name, one in values.items())
        return mean, math.sqrt(sum((weights[name] * one.se) ** 2 for name, one in values.items()))

    def _overall(self, domains: dict[str, DomainEffect], split: str) -> ScoreValue | None:
        found = self._weighted(domains, split)
        return ScoreValue(mean=found[0], se=found[1], n=1200) if found else None

    def _effects(self, domains: dict[str, DomainEffect], seeds: int) -> dict[str, EffectValue]:
        effects = {}
        for split in ("dev-a", "dev-b", "external-a", "external-b", "external"):
            found = self._weighted(domains, f"{split.split('-')[0]}_effect")
            if found:
                effects[split] = self._effect(found[0] + self.rng.gauss(0, 0.004), max(0.009, found[1]))
        return effects

    def _run(
        self, number: int, name: str, seed: int, outcome: str, reason: str, domains: dict[str, DomainEffect]
    ) -> RunRecord:
        stages = ("train", "dev", *(("external-a", "external-b") if self.external_weights else ()))
        stages = stages if outcome == "finished" else stages[:1]
        spent = 0.0
        for stage in stages:
            cpu = round(self.rng.uniform(15, 24) if stage == "train" else self.rng.uniform(0.5, 1.2), 3)
            end = {"outcome": outcome, "reason": reason, "cpu_seconds": cpu, "seconds": 1.4 * cpu, "attempts": 1}
            self.ledger.append("ended", f"{number}/{name}/{seed}/{stage}", {"end": end, "files": {}})
            spent += cpu
            if stage.startswith("external"):
                self._look(number, name, stage, f"{number}/{name}/{seed}")
        scores = {}
        for split, n in ITEMS.items() if outcome == "finished" else ():
            found = self._weighted(domains, split.split("-")[0])
            if found:
                scores[split] = ScoreValue(mean=found[0] + self.rng.gauss(0, RUN_SD), se=found[1], n=n)
        return RunRecord(seed=seed, outcome=outcome, reason=reason, cpu_seconds=spent, scores=scores)

    def _look(self, number: int, name: str, split: str, run: str) -> None:
        if self.looks.paid(candidate=name, round_number=number, split=split) or self.looks.spent >= 60:
            return
        self.looks.pay(
            Look(
                candidates=(name,),
                runs=(run,),
                purpose="select" if split == "external-a" else "judge",
                split=split,
                round=number,
                item_set=digest_of([number, split]),
                items=ITEMS[split],
            )
        )

    # --- judging ------------------------------------------------------------------------------------------------------

    def judge(self, policy: SearchPolicy, found: list[tuple[CandidateEvidence, str]]) -> SearchPolicy:
        """Evidence, verdicts and the next policy."""
        candidates = tuple(one for one, _ in found)
        explorers = [one for one in candidates if one.role == "explorer" and one.effects]
        selecting = f"{policy.objective}-a"
        selected = max(explorers, key=lambda one: one.effects[selecting].mean)
        evidence = Evidence(
            round=policy.round,
            substrate=SUBSTRATE,
            judge=JUDGE,
            policy=digest_of(policy),
            objective=policy.objective,
            anchor=candidates[0].id,
            selected=selected.id,
            candidates=candidates,
            noise=Noise(seed_sd_dev=RUN_SD, between_sd_dev=0.03, signal_to_noise=2.6, df=10 + policy.round),
            minimum_detectable_effect=dict.fromkeys(ITEMS, 0.031),
            verdicts=tuple(one.to_dict() for one in verdicts_of(selected, explorers, self.families)),
            looks=self.looks.summary(),
            cpu_seconds=sum(run.cpu_seconds for one in candidates for run in one.runs),
        )
        self.ledger.append(
            "evidence", str(policy.round), {"digest": save_json(self.folder.evidence(policy.round), evidence)}
        )
        following, edits = next_policy(self.rules, policy, evidence)
        self._policy(following, [edit.model_dump(mode="json", by_alias=True) for edit in edits])
        self.ledger.append("round-closed", str(policy.round), {})
        self._advance(policy, following, found)
        return following

    def _advance(self, policy: SearchPolicy, following: SearchPolicy, found: list) -> None:
        """The anchor of the next round is as good as the candidate that was promoted truly is."""
        name = candidate_id(SUBSTRATE, following.standing)
        operator = next((operator for one, operator in found if one.id == name), None)
        for family in self.families if operator in TRUTH else ():
            for place, gains in enumerate(TRUTH[operator]):
                self.level[family][place] = min(0.97, self.level[family][place] + gains[family != self.shifted])

    # --- end ----------------------------------------------------------------------------------------------------------

    def close(self, policy: SearchPolicy) -> None:
        """The final comparison and the last event."""
        gain = {"mean": 0.0413, "se": 0.0127, "low": 0.0155, "high": 0.0671, "p_better": 0.9988}
        gain["minimum_detectable_effect"] = 0.0364
        names = {
            "standing": candidate_id(SUBSTRATE, policy.standing),
            "origin": candidate_id(SUBSTRATE, policy.standing.replace(recipe=Recipe())),
        }
        final = {**names, "same": False, "accuracy": {"standing": 0.5246, "origin": 0.4833}, "items": 2400}
        final |= {"runs": {"standing": 3, "origin": 8}, "gain": gain}
        seeds = {
            "standing": [run_seed(self.campaign.seed, policy.round, names["standing"], index) for index in range(3)],
            "origin": [run_seed(self.campaign.seed, 0, names["origin"], index) for index in range(8)],
        }
        for side, number in (("standing", policy.round), ("origin", 0)):
            for seed in seeds[side]:
                for stage in ("train", "final") if side == "standing" else ("final",):
                    end = {"outcome": "finished", "reason": "", "cpu_seconds": 18.5 if stage == "train" else 1.7}
                    end |= {"seconds": 20.0, "attempts": 1}
                    self.ledger.append("ended", f"{number}/{names[side]}/{seed}/{stage}", {"end": end, "files": {}})
        self.ledger.append("final", "", final)
        found = "dev stopped tracking the external target: first said in round 1 (DECOUPLED); on 2400 sealed items the "
        found += "standing settings are +4.1 pt from the origin [+1.6, +6.7]."
        statement = {"claim": self.campaign.claim, "final": final, "finding": found, "looks": NO_LOOKS}
        self.ledger.append("campaign-closed", "", statement)


def build_campaign(root: Path, *, judged: int = 4, closed: bool = True, external: bool = True) -> Path:
    """A campaign of `judged` rounds in `root`; one that is not closed has a further round open."""
    root.mkdir(parents=True, exist_ok=True)
    story = Story(root, external)
    policy = story.open()
    for _ in range(judged):
        policy = story.judge(policy, story.start(policy))
    if closed and external:
        story.close(policy)
    elif closed:
        found = "there was no external target."
        statement = {"claim": "infrastructure", "final": None, "finding": found, "looks": NO_LOOKS}
        story.ledger.append("campaign-closed", "", statement)
    else:
        story.start(policy)
    story.ledger.close()
    return root


def build_empty(root: Path) -> Path:
    """A campaign that is still being prepared: a ledger without events."""
    root.mkdir(parents=True, exist_ok=True)
    Ledger(root).close()
    return root
