"""What a round left behind: its proposals, its runs and how each stage ended, read from the ledger and the run folders.

The reviewer works on these facts and nothing else, so that anybody can review a closed round again and must get the
same evidence. In: events and files. Out: `RoundFacts`, and per-item answers on demand.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_evolve.artefacts import CampaignFolder, check_file
from megatron_evolve.budget import Spend, of_end
from megatron_evolve.candidate import candidate_id, run_seed
from megatron_evolve.delta import Delta, canonical_change
from megatron_evolve.eval.paired import RunItems
from megatron_evolve.eval.score import SCORES_FILE, ItemRows, comparison_of, read_rows
from megatron_evolve.launch.rundir import read_json
from megatron_evolve.ledger import History
from megatron_evolve.policy import SearchPolicy, kept_policy
from megatron_evolve.substrate.settings import Settings

STAGE_OF_SPLIT = {"dev-a": "dev", "dev-b": "dev", "external-a": "external-a", "external-b": "external-b"}
REPORTED_FILE = "reported.json"
MAX_REPLICATES = 1024


@dataclass(frozen=True)
class RunFacts:
    """One run: where it lies and how its stages ended (`outcome`, `reason` and what they took, by stage).

    `files` is the digest of each file that a stage left, by stage and name, as far as a ledger keeps it: what is read
    then must be those bytes. Parquet alone lets a flipped bit pass for another answer.
    """

    candidate: str
    seed: int
    folder: Path
    ends: dict[str, dict[str, Any]]
    files: dict[str, dict[str, str]] = field(default_factory=dict, compare=False)
    _rows: dict[str, ItemRows] = field(default_factory=dict, compare=False, repr=False)
    _items: dict[tuple[str, ...], RunItems] = field(default_factory=dict, compare=False, repr=False)

    @property
    def spent(self) -> Spend:
        """What its stages took, in all."""
        return sum(map(of_end, self.ends.values()), Spend())

    def has(self, split: str) -> bool:
        """Whether this run was scored on the split."""
        return self.ends.get(STAGE_OF_SPLIT[split], {}).get("outcome") == "finished"

    def rows(self, split: str) -> ItemRows:
        """Per-item answers on one split."""
        if split not in self._rows:
            stage = STAGE_OF_SPLIT[split]
            whole = read_rows(self._kept(stage, "scores.parquet"))
            self._rows.update({one: whole.of_split(one) for one, its in STAGE_OF_SPLIT.items() if its == stage})
        return self._rows[split]

    @cached_property
    def reported(self) -> dict[str, Any] | None:
        """What a target that shows no item told of this run (score, items, step); none if it was not asked."""
        for stage in ("external-a", "external-b"):
            path = self.folder / stage / REPORTED_FILE
            if self.has(stage) and path.exists():
                return read_json(self._kept(stage, REPORTED_FILE))
        return None

    def comparison(self, split: str) -> str:
        """The comparison key of its score on one split."""
        return comparison_of(self._kept(STAGE_OF_SPLIT[split], SCORES_FILE).parent, split)

    def _kept(self, stage: str, name: str) -> Path:
        path = self.folder / stage / name
        if digest := self.files.get(stage, {}).get(name):
            check_file(path, digest)
        return path

    def items(self, splits: Sequence[str]) -> RunItems:
        """Answers on some splits together, as the paired comparison wants them; a review asks for them 25 times."""
        wanted = tuple(splits)
        if wanted not in self._items:
            self._items[wanted] = self._joined(wanted)
        return self._items[wanted]

    def _joined(self, splits: tuple[str, ...]) -> RunItems:
        parts = [
            self.rows(split).of_run(self.candidate, self.seed, split, comparison=self.comparison(split))
            for split in splits
        ]
        if len(parts) == 1:
            return parts[0]
        return RunItems(
            self.candidate,
            self.seed,
            [item for part in parts for item in part.item_ids.tolist()],
            [name for part in parts for name in part.families.tolist()],
            [value for part in parts for value in part.correct.tolist()],
            " ".join(part.comparison for part in parts),
        )


@dataclass(frozen=True)
class ProposalFacts:
    """An explorer as it was proposed."""

    candidate: str
    worker: int
    axis: str
    change: dict[str, Any]
    hypothesis: str


@dataclass(frozen=True)
class RoundFacts:
    """All that a review of the round rests on. `reused` names the halves of a CSV whose rows come round again."""

    number: int
    folder: CampaignFolder
    policy: SearchPolicy
    policy_digest: str
    substrate: str
    judge: str
    anchor: str
    proposals: tuple[ProposalFacts, ...]
    refusals: tuple[dict[str, Any], ...]
    runs: dict[str, tuple[RunFacts, ...]]
    reused: frozenset[str] = frozenset()

    def asked_before(self, split: str) -> bool:
        """Whether rows of a split were asked in an earlier round; `external` is both halves."""
        return split in self.reused or (split == "external" and bool(self.reused))

    def scored(self, name: str, split: str) -> list[RunFacts]:
        """Runs of a candidate that were scored on a split, in order of replicate."""
        return [run for run in self.runs.get(name, ()) if run.has(split)]

    def first(self, name: str, split: str) -> list[RunFacts]:
        """The scored runs that selection reads: all of the anchor, and of an explorer those before any confirmation."""
        runs = self.scored(name, split)
        return runs if name == self.anchor else [run for run in runs if run in self.before_confirmation(name)]

    def before_confirmation(self, name: str) -> tuple[RunFacts, ...]:
        """An explorer's runs that were planned for selection.

        Every worker that opens with a candidate adds runs of it; a repair adds some only where there were none.
        """
        opened = {one.worker: one.candidate for one in reversed(self.proposals)}  # each worker's first
        repaired = any(one.candidate == name for one in self.proposals)
        workers = sum(found == name for found in opened.values()) or int(repaired)
        return self.runs.get(name, ())[: workers * self.policy.replicates.explorer]

    def further(self, name: str) -> tuple[RunFacts, ...]:
        """An explorer's runs on further seeds, which confirm: nothing was selected on them."""
        return self.runs.get(name, ())[len(self.before_confirmation(name)) :]

    @property
    def has_anchor(self) -> bool:
        """Whether the round has a score of the anchor, without which nothing of it compares."""
        return bool(self.scored(self.anchor, "dev-b"))

    @cached_property
    def explorers(self) -> tuple[str, ...]:
        """Explorers with a dev score, in order of worker; each once."""
        return tuple(dict.fromkeys(one.candidate for one in self.proposals if self.scored(one.candidate, "dev-b")))


def round_facts(folder: CampaignFolder, history: History, campaign_seed: int, number: int) -> RoundFacts:
    """The facts of a round whose runs have ended."""
    opened, digest = history.find("campaign-opened").data, history.find("policy", str(number)).data["digest"]
    policy = kept_policy(folder.policy(number), digest)
    anchor = candidate_id(opened["substrate"], policy.standing)
    proposed = sorted(
        history.of_round("proposed", number),
        key=lambda event: (event.data["worker"], int(event.key.rsplit("/", 1)[1])),
    )
    accepted = tuple(_proposal(event.data, policy) for event in proposed if event.data["candidate"])
    ended: dict[str, dict[int, dict[str, Any]]] = {}
    for event in history.of_round("ended", number):
        _, name, seed, stage = event.key.split("/")
        ended.setdefault(name, {}).setdefault(int(seed), {})[stage] = event.data
    return RoundFacts(
        number=number,
        folder=folder,
        policy=policy,
        policy_digest=digest,
        substrate=opened["substrate"],
        judge=opened["judge"],
        anchor=anchor,
        proposals=accepted,
        refusals=tuple(
            {
                "worker": event.data["worker"],
                "axis": event.data["axis"],
                "reason": event.data["refused"],
                "nothing": event.data["delta"] is None and event.data["call"]["ending"] == "ok",
            }
            for event in proposed
            if event.data["refused"]
        ),
        runs={name: _runs(folder, campaign_seed, number, name, found) for name, found in ended.items()},
        reused=frozenset(split for split, anew in opened.get("rounds_anew", {}).items() if number > anew),
    )


def _proposal(data: dict[str, Any], policy: SearchPolicy) -> ProposalFacts:
    resolved = Settings.parse(data["settings"], where="proposed settings")
    return ProposalFacts(
        candidate=data["candidate"],
        worker=data["worker"],
        axis=data["axis"],
        change=canonical_change(policy.standing, resolved),
        hypothesis=Delta.parse(data["delta"], where="delta").hypothesis,
    )


def _runs(
    folder: CampaignFolder, campaign_seed: int, number: int, name: str, found: dict[int, dict[str, Any]]
) -> tuple[RunFacts, ...]:
    """Runs in order of replicate, which is the order their seeds are drawn in, whatever order they ended in.

    The origin's frozen runs, asked again, were drawn under no seed of the round: by seed.
    """
    order: list[int] = []
    for replicate in range(MAX_REPLICATES):
        if len(order) == len(found):
            break
        seed = run_seed(campaign_seed, number, name, replicate)
        if seed in found:
            order.append(seed)
    order += sorted(set(found) - set(order))
    return tuple(
        RunFacts(
            name,
            seed,
            folder.run(number, name, seed),
            {stage: data["end"] for stage, data in found[seed].items()},
            {stage: data["files"] for stage, data in found[seed].items()},
        )
        for seed in order
    )
