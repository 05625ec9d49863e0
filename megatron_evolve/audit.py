"""The audit: everything a closed (or open) campaign says about itself, checked by anybody who holds its folder.

Digests of the frozen ground and of every file, the ledger's chain, and every deterministic decision made again: what
the default worker proposes, which candidate a delta is, what the evidence says, which policy follows, how it ended. A
decision that the code of another version made is reported as such, not as broken.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_evolve.artefacts import check_digest, load_yaml_checked
from megatron_evolve.campaign import Campaign
from megatron_evolve.candidate import candidate, candidate_id
from megatron_evolve.closing import closing_runs, compare, finding, sealed_answers, surveyed
from megatron_evolve.comparisons import Weights, score_weights
from megatron_evolve.delta import Delta
from megatron_evolve.document import load_yaml
from megatron_evolve.eval.freeze import SUITES_FILE
from megatron_evolve.eval.judge import load_judge
from megatron_evolve.eval.looks import Looks
from megatron_evolve.facts import round_facts
from megatron_evolve.jobs import FINAL_STAGE, MANIFEST_FILE, SPLITS_OF
from megatron_evolve.launch.rundir import RunDirError, read_json
from megatron_evolve.ledger import Event
from megatron_evolve.meta import check_edits, explain, next_policy
from megatron_evolve.origin import ORIGIN_ROUND, Origin, read_origin
from megatron_evolve.prepare import judge_process
from megatron_evolve.proposals import Setback, assigned_axes, brief_of, first_failure
from megatron_evolve.prune import pruned_weights
from megatron_evolve.review import first_pooled, pooled_rounds, review
from megatron_evolve.sources import decision_sources
from megatron_evolve.substrate.digest import digest_file, digest_of
from megatron_evolve.substrate.manifest import Substrate, public_view, verify
from megatron_evolve.substrate.train.checkpoint import load_checkpoint, read_manifest
from megatron_evolve.survey import survey
from megatron_evolve.workers.brief import delta_document
from megatron_evolve.workers.propose import propose as default_worker
from megatron_evolve.workers.seam import PROPOSAL
from megatron_evolve.workers.validate import validate
from megatron_evolve.written import Written, open_written


@dataclass(frozen=True)
class Broken(Exception):
    """The first thing that does not hold."""

    where: str
    expected: str
    got: str


@dataclass(frozen=True)
class Record(Written):
    """A campaign opened for reading, with the frozen ground that its decisions are made again on."""

    campaign: Campaign
    substrate: Substrate
    origin: Origin
    suites: dict[str, Any]
    looks: Looks
    pruned: dict[str, str]

    @property
    def weights(self) -> Weights:
        """Weight of each family in the dev and in the external score."""
        return score_weights(self.suites, self.campaign)

    def is_reviewed(self, number: int) -> bool:
        """Whether every look of a round must have been paid by now; those at the end are paid before they score."""
        return number not in range(1, self.campaign.constitution.rounds + 1) or self.events.has("evidence", str(number))


def open_record(root: Path) -> Record:
    """Opens a campaign folder and its ground. Raises ValueError in one sentence when either is missing or broken."""
    return _on_its_ground(open_written(root))


def _on_its_ground(written: Written) -> Record:
    folder, opened = written.folder, written.opened
    judge_folder = Path(opened["judge_folder"])
    return Record(
        folder=folder,
        events=written.events,
        opened=opened,
        campaign=Campaign.parse(load_yaml(folder.campaign), where=str(folder.campaign)),
        substrate=verify(Path(opened["substrate_folder"]), trainer=False),
        origin=read_origin(judge_folder, load_judge(judge_folder)),
        suites=read_json(judge_folder / SUITES_FILE),
        looks=Looks(folder.looks, external_budget=opened["plan"]["external_looks"]),
        pruned=pruned_weights(folder),
    )


def verify_campaign(root: Path) -> dict[str, Any]:
    """`{"ok", "events", "replayed_decisions", "first_broken", "notes"}`; never raises for a broken campaign."""
    notes: list[str] = []
    decisions = 0
    events = 0
    try:
        written = open_written(root)
        events = len(written.events)
        _check_store(written)
        record = _on_its_ground(written)
        _check_ground(record, notes)
        same_code = record.opened["decisions"] == decision_sources()
        for decision in _decisions(record):
            try:
                decision()
            except Broken as broken:
                if same_code:
                    raise
                notes.append(f"{broken.where}: decided otherwise by the version of the code that ran it")
            decisions += 1
        broken_at = None
    except Broken as broken:
        broken_at = {"where": broken.where, "expected": broken.expected, "got": broken.got}
    except (ValueError, RunDirError) as error:
        broken_at = {"where": str(root), "expected": "a whole campaign", "got": str(error)}
    return {
        "ok": broken_at is None,
        "events": events,
        "replayed_decisions": decisions,
        "first_broken": broken_at,
        "notes": notes,
    }


def _check_store(written: Written) -> None:
    for what in ("substrate", "judge"):
        place = Path(written.opened[f"{what}_folder"])
        if not place.is_dir():
            raise Broken(
                str(place),
                f"the frozen {what}, without which no decision can be made again",
                f"no folder: the chain of {len(written.events)} events holds, but no file was held against it and no "
                "proposal, evidence, policy or ending was replayed; put the folder back, or a link to it",
            )


def _check_ground(record: Record, notes: list[str]) -> None:
    """Frozen parts and files: campaign, constitution, substrate, judge, and what each stage left."""
    folder, opened = record.folder, record.opened
    check_digest(folder.campaign, load_yaml(folder.campaign), opened["campaign"])
    check_digest(folder.constitution, load_yaml(folder.constitution), opened["constitution"])
    _must("substrate", opened["substrate"], record.substrate.digest)
    _must("suites", opened["suites"], digest_of(record.suites))
    try:
        verify(Path(opened["substrate_folder"]))
        judge_process("--verify", opened["judge_folder"])
    except ValueError as error:
        if "source changed" not in str(error):
            raise
        notes.append(f"frozen by another version of the code: {error}")
    _check_reach(record)
    _check_looks(record, notes)
    if unasked := (record.data("survey") or {}).get("unasked"):
        notes.append(f"no external look was left for the survey: {', '.join(unasked)} rows were not asked")
    if record.pruned:
        notes.append(f"the weights of {len(record.pruned)} runs were pruned, as {folder.pruned.name} says")
    for event in record.events:
        if event.kind == "ended":
            _check_stage(record, event)
        elif event.kind == "policy":
            load_yaml_checked(folder.policy(int(event.key)), event.data["digest"])
            _check_edits(record, int(event.key))
        elif event.kind == "external-submitted":
            _must_hold(folder.submitted(event.key), event.data["digest"])
        elif event.kind == "proposed" and event.data["call"]["reply"]:
            number, worker, attempt = event.key.split("/")
            path = folder.worker(int(number), int(worker)) / attempt / PROPOSAL
            _must_hold(path, event.data["call"]["reply"])


def _check_edits(record: Record, number: int) -> None:
    """The edits of a round's policy are what differs and point at values of the evidence, whichever code made them."""
    edits = record.edits(number)
    if number == 1:  # of the first policy, which rests on no evidence, there are none
        return
    if number - 1 not in record.rounds:
        raise Broken(str(record.folder.ledger), f"the evidence that the policy of round {number} rests on", "none")
    before, after, evidence = record.policy(number - 1), record.policy(number), record.evidence(number - 1)
    try:
        check_edits(before, after, edits, evidence)
    except ValueError as error:
        path = str(record.folder.edits(number))
        raise Broken(path, f"the edits that make the policy of round {number}", str(error)) from None


def _check_reach(record: Record) -> None:
    """The folder holds no round that the ledger does not tell of; one cut back between lines is whole in itself."""
    opened = set(record.events.keys("round-opened"))
    ended = {event.key.split("/")[0] for event in record.events.of_kind("ended")}
    for number in range(1, record.campaign.constitution.rounds + 1):
        judged = record.folder.evidence(number).exists()
        ran = judged or any(record.folder.round(number).glob("*/runs"))
        if ran and str(number) not in (ended if judged else opened):
            raise Broken(str(record.folder.ledger), f"the events of round {number}, whose files are there", "none")


def _check_looks(record: Record, notes: list[str]) -> None:
    """The account of looks as every round and the close left it: none was changed, added between or taken out since."""
    kept = [event for kind in ("evidence", "campaign-closed") for event in record.events.of_kind(kind)]
    digests = set(record.looks.digests())
    for event in kept:
        if event.data.get("looks", record.looks.digest) not in digests:
            raise Broken(str(record.folder.looks), f"the looks paid before {event.kind} {event.key}".rstrip(), "others")
    if any("looks" not in event.data for event in kept):
        notes.append("the account of looks was kept by a version of the code that left no digest of it in the ledger")


def _check_stage(record: Record, event: Event) -> None:
    """What a stage left, and that a look was paid for every score."""
    number, name, seed, stage = event.key.split("/")
    base = record.folder.run(int(number), name, int(seed)) / stage
    if int(number) == ORIGIN_ROUND:
        base = record.folder.closing / name / seed / stage
    for file, digest in event.data["files"].items():
        _must_hold(base / file, digest)
        if file == MANIFEST_FILE:
            _check_weights(record, base, digest)
    for split in SPLITS_OF.get(stage, (stage,)) if stage != "train" and record.is_reviewed(int(number)) else ():
        asked = int(number) or record.campaign.constitution.rounds + 1  # the origin's runs are asked at the end
        if event.data["end"]["outcome"] == "finished":
            # Dev-A of a confirming run is scored with its dev-B and read by nobody: the evidence tells.
            _must_be_paid(record, name, asked, split, None if split == "dev-a" else f"{number}/{name}/{seed}")


def _must_be_paid(record: Record, name: str, asked: int, split: str, run: str | None) -> None:
    """A look at a candidate's score was paid in a round, and it names the run."""
    look = record.looks.paid(candidate=name, round_number=asked, split=split)
    if look is None or (run is not None and run not in look.runs):
        got = "none" if look is None else f"one that does not name run {run}"
        raise Broken(str(record.folder.looks), f"a look at {split} for {name} in round {asked}", got)


def _check_weights(record: Record, run_dir: Path, manifest: str) -> None:
    """The weights that a training handed on, unless they were pruned and it is written down that they were."""
    place = (run_dir / MANIFEST_FILE).parent
    missing = [name for name in read_manifest(place).files if not (place / name).is_file()]
    entered = record.pruned.get(place.relative_to(record.folder.root).as_posix())
    if missing and entered is not None:
        _must(f"{record.folder.pruned}: {place}", manifest, entered)
        return
    load_checkpoint(place)


def _must_hold(path: Path, digest: str) -> None:
    _must(str(path), digest, digest_file(path) if path.exists() else "no file")


def _must(where: str, expected: Any, got: Any) -> None:
    if expected != got:
        raise Broken(where, str(expected), str(got))


# --- decisions -------------------------------------------------------------------------------------------------------


def _decisions(record: Record) -> Iterator[Callable[[], None]]:
    """Every deterministic decision of the campaign, as something that makes it again and compares."""
    for event in record.events:
        if event.kind == "proposed":
            yield lambda event=event: _check_proposal(record, event)
    for number in record.rounds:
        yield lambda number=number: _check_evidence(record, number)
        if record.data("policy", str(number + 1)):
            yield lambda number=number: _check_policy(record, number)
    if record.data("final"):
        yield lambda: _check_final(record)
    if record.data("survey"):
        yield lambda: _check_survey(record)
    if record.data("campaign-closed"):
        yield lambda: _check_finding(record)


def _check_proposal(record: Record, event: Event) -> None:
    number, worker, attempt = (int(part) for part in event.key.split("/"))
    policy, view = record.policy(number), public_view(record.substrate)
    axis = dict(assigned_axes(record.campaign, policy))[worker]
    brief = brief_of(record.campaign, view, policy, worker, axis, attempt, _setback(record, number, worker, attempt))
    where = f"proposal {event.key}"
    _must(f"{where}: brief", event.data["call"]["prompt"], brief.digest)
    if record.campaign.worker is None and event.data["delta"] is not None:
        _must(f"{where}: delta", event.data["delta"], delta_document(default_worker(brief).delta))
    if event.data["delta"] is None:
        return
    resolved = validate(Delta.parse(event.data["delta"], where=where), policy, record.campaign.constitution, view)
    if isinstance(resolved, str):
        _must(f"{where}: refusal", event.data["refused"], resolved)
    else:
        _must(f"{where}: candidate", event.data["candidate"], candidate_id(record.substrate.digest, resolved))


def _setback(record: Record, number: int, worker: int, attempt: int) -> Setback | None:
    """Why the worker was asked this time, from the event before."""
    if attempt == 0:
        return None
    before = record.data("proposed", f"{number}/{worker}/{attempt - 1}")
    delta = Delta.parse(before["delta"], where="delta") if before["delta"] else None
    if before["refused"]:
        return Setback(delta, "", before["refused"])
    failed = first_failure(record.events, number, before["candidate"])
    if failed is None:
        raise Broken(f"proposal {number}/{worker}/{attempt}", "a refusal or a failed run before it", "none")
    return Setback(delta, failed["outcome"], failed["reason"])


def _check_evidence(record: Record, number: int) -> None:
    rules = record.campaign.constitution
    first = first_pooled(record.policy(number), rules)
    window = [round_facts(record.folder, record.events, record.campaign.seed, one) for one in range(first, number + 1)]
    earlier = [one for past in pooled_rounds(number) for one in record.evidence(past).replicates]
    found = record.evidence(number)
    again = review(window, rules, record.origin, record.weights, earlier, found.looks)
    expected, got = (digest_of(one.model_dump(mode="json", by_alias=True)) for one in (found, again))
    _must(f"evidence of round {number}", expected, got)
    for one in found.candidates:
        for run in one.runs:
            for split in run.scores:
                _must_be_paid(record, one.id, number, split, f"{number}/{one.id}/{run.seed}")


def _check_policy(record: Record, number: int) -> None:
    following, edits = next_policy(record.campaign.constitution, record.policy(number), record.evidence(number))
    said = record.data("policy", str(number + 1))
    _must(f"policy of round {number + 1}", said["digest"], digest_of(following.model_dump(mode="json", by_alias=True)))
    written = [edit.model_dump(mode="json", by_alias=True) for edit in edits]
    _must(f"edits to the policy of round {number + 1}", said["edits"], digest_of(written))


def _check_final(record: Record) -> None:
    said, rounds = record.data("final"), record.campaign.constitution.rounds
    sides = [
        candidate(record.substrate.digest, settings)
        for settings in (record.policy(rounds + 1).standing, record.substrate.default)
    ]
    again = {"standing": sides[0].id, "origin": sides[1].id, "same": sides[0].id == sides[1].id}
    if not again["same"]:
        answers = [
            [sealed_answers(record.folder, run) for run in runs if record.finished(f"{run.key}/{FINAL_STAGE}")]
            for runs in closing_runs(record.campaign, rounds + 1, *sides, record.origin)
        ]
        pooled = [record.evidence(one) for one in pooled_rounds(rounds + 1)]
        again |= compare(*answers, record.origin, record.weights, pooled)
    _must("the final comparison", said, again)


def _check_survey(record: Record) -> None:
    policy = record.policy(record.campaign.constitution.rounds + 1)
    runs, stages = surveyed(record.campaign, policy, record.substrate.digest, record.origin, record.substrate.default)
    name, number = runs[0].candidate.id, policy.round
    paid = [one for one in stages if record.looks.paid(candidate=name, round_number=number, split=one) is not None]
    scored = [run for run in runs if paid and all(record.finished(f"{run.key}/{stage}") for stage in paid)]
    unasked = [stage for stage in stages if stage not in paid]
    _must("the survey", record.data("survey"), survey(record.folder, scored, paid, unasked))


def _check_finding(record: Record) -> None:
    evidence = (record.evidence(number) for number in record.rounds)
    found = finding(record.campaign, evidence, record.data("final"), record.data("budget-spent"))
    _must("the finding", record.data("campaign-closed")["finding"], found)


def explain_round(root: Path, number: int) -> str:
    """The argument of a round's verdicts and of the policy that followed. Raises ValueError if it is not closed."""
    told = open_written(root)
    if number not in told.rounds or not told.events.has("policy", str(number + 1)):
        raise ValueError(f"round {number} is not closed yet; closed rounds: {told.rounds or 'none'}")
    before, after = told.policy(number), told.policy(number + 1)
    return explain(before, told.evidence(number), after, told.edits(number + 1), told.axes_of(number))
