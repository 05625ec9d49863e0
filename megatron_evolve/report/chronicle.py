"""The chronicle: all that a report tells, read from a campaign's folder once, digests checked.

It takes what is there: a campaign that runs has a last round without evidence, one that is being prepared has no round
at all. Substrate and judge are not opened, so a copied folder reads the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_evolve.artefacts import CampaignFolder, load_json, load_yaml_checked
from megatron_evolve.campaign import Campaign
from megatron_evolve.candidate import candidate_id
from megatron_evolve.constitution import Constitution
from megatron_evolve.delta import canonical_change
from megatron_evolve.eval.looks import Look, Looks
from megatron_evolve.evidence import CandidateEvidence, EffectValue, Evidence
from megatron_evolve.ledger import Event, read_ledger
from megatron_evolve.policy import Edit, SearchPolicy
from megatron_evolve.status import status
from megatron_evolve.substrate.settings import Settings


@dataclass(frozen=True)
class Proposed:
    """One answer of a worker: a candidate with its change and hypothesis, or why it was refused."""

    worker: int
    attempt: int
    axis: str
    candidate: str
    change: dict[str, Any]
    hypothesis: str
    refused: str


@dataclass(frozen=True)
class Chapter:
    """One round: the policy it searched under, what was proposed and found, and the policy that followed."""

    place: int
    number: int
    policy: SearchPolicy
    proposed: tuple[Proposed, ...]
    evidence: Evidence | None
    following: SearchPolicy | None
    edits: tuple[Edit, ...]
    moved: dict[str, Any]
    promoted: CandidateEvidence | None

    def axis_of(self, candidate: str) -> str:
        """The axis that a candidate was found on."""
        return next((one.axis for one in self.proposed if one.candidate == candidate), "anchor")

    @property
    def judging_split(self) -> str:
        """The external split that no selection of this round has used."""
        return "external-b" if self.policy.objective == "external" else "external"

    def effects_of(self, one: CandidateEvidence) -> tuple[EffectValue | None, EffectValue | None]:
        """A candidate's dev effect and its external effect, each on items that did not select it."""
        outside = one.effects.get(self.judging_split) or one.effects.get("external")
        return one.effects.get("dev-b"), outside


@dataclass(frozen=True)
class Chronicle:
    """A whole campaign, as far as it went."""

    status: dict[str, Any]
    events: Sequence[Event] = ()
    opened: dict[str, Any] = field(default_factory=dict)
    campaign: Campaign | None = None
    chapters: tuple[Chapter, ...] = ()
    looks: tuple[Look, ...] = ()

    @property
    def rules(self) -> Constitution:
        """The constitution it runs under."""
        assert self.campaign is not None, "a campaign that was opened has its file"
        return self.campaign.constitution

    @property
    def judged(self) -> tuple[Chapter, ...]:
        """Rounds with evidence."""
        return tuple(chapter for chapter in self.chapters if chapter.evidence)

    @property
    def domains(self) -> tuple[str, ...]:
        """Every domain that was scored, in the evidence's order."""
        names = [name for chapter in self.judged for one in chapter.evidence.candidates for name in one.domains]
        return tuple(dict.fromkeys(names))


def read_chronicle(root: Path) -> Chronicle:
    """The chronicle of a campaign's folder. Raises ValueError in one sentence where it holds none or a changed file."""
    folder, document = CampaignFolder(root), status(root)
    events = read_ledger(folder.ledger)
    opened = next((event.data for event in events if event.kind == "campaign-opened"), None)
    if opened is None:
        return Chronicle(status=document)
    campaign = Campaign.parse(load_yaml_checked(folder.campaign, opened["campaign"]), where=str(folder.campaign))
    known = {(event.kind, event.key): event.data for event in events}
    rounds = [int(event.key) for event in events if event.kind == "round-opened"]
    return Chronicle(
        status=document,
        events=events,
        opened=opened,
        campaign=campaign,
        chapters=tuple(_chapter(folder, known, opened, place, number) for place, number in enumerate(rounds)),
        looks=Looks(folder.looks, external_budget=campaign.constitution.external_looks).entries,
    )


def _chapter(
    folder: CampaignFolder, known: dict[tuple[str, str], Any], opened: dict[str, Any], place: int, number: int
) -> Chapter:
    policy = _policy(folder, known, number)
    assert policy is not None, f"round {number} was opened with a policy"
    evidence, following, edits, moved, promoted = None, _policy(folder, known, number + 1), (), {}, None
    if said := known.get(("evidence", str(number))):
        path = folder.evidence(number)
        evidence = Evidence.parse(load_json(path, said["digest"]), where=str(path))
    if following is not None and evidence is not None:
        path = folder.edits(following.round)
        written = load_json(path, known["policy", str(following.round)]["edits"])
        edits = tuple(Edit.parse(edit, where=str(path)) for edit in written)
        moved = canonical_change(policy.standing, following.standing)
        name = candidate_id(opened["substrate"], following.standing)
        promoted = next((one for one in evidence.candidates if moved and one.id == name), None)
    return Chapter(
        place=place,
        number=number,
        policy=policy,
        proposed=_proposed(known, policy),
        evidence=evidence,
        following=following,
        edits=edits,
        moved=moved,
        promoted=promoted,
    )


def _policy(folder: CampaignFolder, known: dict[tuple[str, str], Any], number: int) -> SearchPolicy | None:
    said = known.get(("policy", str(number)))
    if said is None:
        return None
    path = folder.policy(number)
    return SearchPolicy.parse(load_yaml_checked(path, said["digest"]), where=str(path))


def _proposed(known: dict[tuple[str, str], Any], policy: SearchPolicy) -> tuple[Proposed, ...]:
    found = []
    for (kind, key), data in known.items():
        if kind != "proposed" or data["round"] != policy.round:
            continue
        change = {}
        if data["candidate"]:
            change = canonical_change(policy.standing, Settings.parse(data["settings"], where=f"proposal {key}"))
        found.append(
            Proposed(
                worker=data["worker"],
                attempt=int(key.rsplit("/", 1)[1]),
                axis=data["axis"],
                candidate=data["candidate"],
                change=change,
                hypothesis=(data["delta"] or {}).get("hypothesis", ""),
                refused=data["refused"],
            )
        )
    return tuple(sorted(found, key=lambda one: (one.worker, one.attempt)))
