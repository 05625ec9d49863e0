"""The end of a campaign: the standing settings against the origin, on fresh seeds and sealed items, once.

A campaign that claims performance is measured here and nowhere else: new runs of the standing settings (no run of
theirs was selected on), the origin's frozen runs, the sealed items of the external target that no round has asked.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.campaign import Campaign
from megatron_evolve.candidate import Candidate, candidate, run_seed
from megatron_evolve.comparisons import INTERVAL_ALPHA, Weights, seeds_of
from megatron_evolve.desk import Awaiting, Desk
from megatron_evolve.eval.discordant import too_few
from megatron_evolve.eval.looks import Look
from megatron_evolve.eval.paired import RunItems, effect, probability_better
from megatron_evolve.eval.power import minimum_detectable_effect
from megatron_evolve.eval.score import comparison_of, read_rows
from megatron_evolve.eval.seeds import RunReplicates, SeedPool
from megatron_evolve.evidence import Evidence
from megatron_evolve.gap import OVERALL
from megatron_evolve.jobs import FINAL_STAGE, ROWS_FILE, Ground, Run, Stage, write_candidate
from megatron_evolve.launch.rundir import read_json
from megatron_evolve.origin import ORIGIN_ROUND, Origin
from megatron_evolve.policy import SearchPolicy
from megatron_evolve.prepare import origin_ground
from megatron_evolve.review import pooled_rounds
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.settings import Settings
from megatron_evolve.survey import affordable, closing_folder, survey, survey_stages
from megatron_evolve.target import check_target


def close_campaign(desk: Desk, policy: SearchPolicy) -> dict[str, Any]:
    """Measures the claim, if there is a target to measure it on, and writes the ledger's last event."""
    closed = desk.ledger.find("campaign-closed")
    if closed is not None:
        return closed.data
    final = None
    if desk.campaign.judge.target_suite is not None and _is_due(desk):
        await_opening(desk)
        final = desk.ledger.once("final", "", lambda: final_comparison(desk, policy))
        desk.ledger.once("survey", "", lambda: final_survey(desk, policy))
    spent = desk.ledger.find("budget-spent")
    said = finding(desk.campaign, desk.all_evidence(), final, spent.data if spent else None)
    statement = {"claim": desk.campaign.claim, "final": final, "finding": said, "looks": desk.looks.digest}
    return desk.ledger.append("campaign-closed", "", statement).data


def _is_due(desk: Desk) -> bool:
    """Whether the rounds left a budget for the final comparison. Said once: the closing may spend the rest itself."""
    return desk.ledger.once("final-due", "", lambda: {"due": desk.account.spent is None})["due"]


def await_opening(desk: Desk) -> None:
    """Returns once the sealed half may be opened. Raises Awaiting while an operator has yet to say so."""
    if desk.campaign.open_final == "at-end" or desk.ledger.find("final-opened") is not None:
        return
    order = desk.ground.folder.open_final
    if not order.exists():
        desk.ledger.once("final-awaited", "", dict)
        raise Awaiting(
            "all rounds are closed and the sealed half is still sealed: open it, once, with `megatron-evolve external "
            f"open-final {desk.ground.folder.root}`, and run the same command to close the campaign"
        )
    desk.ledger.once("final-opened", "", lambda: read_json(order))


def final_comparison(desk: Desk, policy: SearchPolicy) -> dict[str, Any]:
    """The standing settings against the origin on the sealed items."""
    standing = candidate(desk.substrate_digest, policy.standing)
    origin = candidate(desk.substrate_digest, desk.origin_settings)
    if standing.id == origin.id:
        return {"standing": standing.id, "origin": origin.id, "same": True}
    write_candidate(desk.ground.folder, policy.round, standing)
    folder = desk.ground.folder
    outside = _origins(desk.ground)
    mine, theirs = closing_runs(desk.campaign, policy.round, standing, origin, desk.origin)
    names = {"standing": standing.id, "origin": origin.id, "same": False}
    mine = finish(desk, desk.ground, mine, "train")
    if not mine or FINAL_STAGE not in _askable(desk, policy, standing.id, (FINAL_STAGE,)):
        return {**names, **compare([], [], desk.origin, desk.weights, [])}
    _pay(desk, policy, FINAL_STAGE, [standing.id, origin.id], [*mine, *theirs])
    mine = finish(desk, desk.ground, mine, FINAL_STAGE)
    theirs = finish(desk, outside, theirs, FINAL_STAGE)
    answers = [[sealed_answers(folder, run) for run in runs] for runs in (mine, theirs)]
    pooled = [desk.evidence(number) for number in pooled_rounds(policy.round)]
    return {**names, **compare(*answers, desk.origin, desk.weights, pooled)}


def final_survey(desk: Desk, policy: SearchPolicy) -> dict[str, Any]:
    """Every sub-family of the target as the standing settings answer it; the origin's runs where nothing has moved.

    What the budget has no look left for is not asked: the sealed half is open by now, so the campaign must close.
    """
    runs, stages = surveyed(desk.campaign, policy, desk.substrate_digest, desk.origin, desk.origin_settings)
    asked = affordable(desk.looks, stages, runs[0].candidate.id, policy.round)
    asked = _askable(desk, policy, runs[0].candidate.id, asked)
    ground = desk.ground
    if not asked:
        runs = []
    elif runs[0].round == ORIGIN_ROUND:
        ground = _origins(ground)
        _pay(desk, policy, FINAL_STAGE, [runs[0].candidate.id], runs)
    else:
        runs = finish(desk, ground, runs, "train")
    for stage in asked:
        if not runs:
            break
        if stage != FINAL_STAGE:
            _pay(desk, policy, stage, [runs[0].candidate.id], runs)
        runs = finish(desk, ground, runs, stage)
    return survey(desk.ground.folder, runs, asked, [stage for stage in stages if stage not in asked])


def _askable(desk: Desk, policy: SearchPolicy, name: str, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Those of the stages that can be asked: once a budget is spent nothing is started, so no look is paid any more."""
    paid = lambda stage: desk.looks.paid(candidate=name, round_number=policy.round, split=stage)  # noqa: E731
    return tuple(stage for stage in stages if desk.account.spent is None or paid(stage) is not None)


def _origins(ground: Ground) -> Ground:
    """Where the origin's runs lie and where the end of this campaign scores them."""
    place = ground.folder.closing
    return origin_ground(ground.substrate, ground.judge, ground.time_limit_s, place, ground.placement)


def surveyed(
    campaign: Campaign, policy: SearchPolicy, substrate: str, scored: Origin, origin_settings: Settings
) -> tuple[list[Run], tuple[Stage, ...]]:
    """The runs that the survey asks, and what it asks them as far as looks are left."""
    standing, origin = candidate(substrate, policy.standing), candidate(substrate, origin_settings)
    mine, theirs = closing_runs(campaign, policy.round, standing, origin, scored)
    runs = theirs[: campaign.constitution.anchor_seeds] if standing.id == origin.id else mine
    return runs, survey_stages(campaign)


def closing_runs(
    campaign: Campaign, number: int, standing: Candidate, origin: Candidate, scored: Origin
) -> tuple[list[Run], list[Run]]:
    """Fresh runs of the standing settings, in the round after the last, and the origin's frozen ones."""
    indices = range(campaign.constitution.anchor_seeds)
    seeds = [run_seed(campaign.seed, number, standing.id, index) for index in indices]
    return [Run(number, standing, seed) for seed in seeds], [Run(ORIGIN_ROUND, origin, seed) for seed in scored.seeds]


def finish(desk: Desk, ground: Ground, runs: Sequence[Run], stage: Stage) -> list[Run]:
    """Takes some runs through one stage and returns those that finished. Raises Stopped, Paused."""
    todo = [(run, stage) for run in runs if not desk.ledger.has("ended", f"{run.key}/{stage}")]
    for _ in desk.drive(todo, ground=ground):
        pass
    ended = [(run, desk.ledger.find("ended", f"{run.key}/{stage}")) for run in runs]
    finished = [(run, event) for run, event in ended if event and event.data["end"]["outcome"] == "finished"]
    for run, event in finished:
        ground.check_files(run, stage, event.data["files"])
    return [run for run, _ in finished]


def _pay(desk: Desk, policy: SearchPolicy, split: Stage, names: Sequence[str], runs: Sequence[Run]) -> None:
    """Enters the look at a split of the target that is asked once, at the end. Raises Paused for a changed file."""
    check_target(desk.campaign, desk.ground)
    desk.looks.pay(
        Look(
            candidates=tuple(names),
            runs=tuple(run.key for run in runs),
            purpose="once, at the end",
            split=split,
            round=policy.round,
            item_set=digest_of({"judge": desk.judge_digest, "split": split}),
            items=desk.suites["items"][split],
        )
    )


def sealed_answers(folder: CampaignFolder, run: Run) -> RunItems:
    """A run's answers to the sealed items."""
    place = closing_folder(folder, run, FINAL_STAGE)
    comparison = comparison_of(place, FINAL_STAGE)
    return read_rows(place / ROWS_FILE).of_run(run.candidate.id, run.seed, FINAL_STAGE, comparison=comparison)


def compare(
    mine: Sequence[RunItems], theirs: Sequence[RunItems], origin: Origin, weights: Weights, evidence: Sequence[Evidence]
) -> dict[str, Any]:
    """Accuracy of both sides and the paired gain; a side that no run finished has none, and says so.

    Nor has a pair that too few items tell apart, of which nothing is claimed. The smallest visible effect is the
    true gain whose interval leaves zero out with 80 % power.
    """
    if not mine or not theirs:
        side = "the origin" if mine else "the standing settings"
        return {"failed": f"no run of {side} finished and was scored"}
    earlier = [RunReplicates.from_dict(one) for found in evidence for one in found.replicates]
    pool = SeedPool((*origin.pooled(), *earlier))
    found = effect(mine, theirs, weights.external, seeds_of(pool, weights, "external"))
    means = {}
    for name, runs in (("standing", mine), ("origin", theirs)):
        means[name] = sum(_mean(run, weights.external) for run in runs) / len(runs)
    told = {
        "accuracy": means,
        "items": len(mine[0].item_ids),
        "runs": {"standing": len(mine), "origin": len(theirs)},
    }
    if not found.enough:
        return told | {"failed": too_few(found.discordant, told["items"], "sealed")}
    return told | {
        "gain": {
            "mean": found.mean,
            "se": found.se,
            "low": found.lower(INTERVAL_ALPHA),
            "high": found.upper(INTERVAL_ALPHA),
            "p_better": probability_better(found),
            "minimum_detectable_effect": minimum_detectable_effect(found, INTERVAL_ALPHA),
        },
    }


def _mean(run: RunItems, weights: Any) -> float:
    names = sorted(set(run.families.tolist()))
    total = sum(weights[name] for name in names)
    return sum(weights[name] * float(run.correct[run.families == name].mean()) for name in names) / total


def finding(
    campaign: Campaign,
    evidence: Iterable[Evidence],
    final: dict[str, Any] | None,
    spent: dict[str, Any] | None = None,
) -> str:
    """One sentence that says what the campaign found, made from its evidence, and whether a budget ended it."""
    told = [(found.round, found.verdicts) for found in evidence]  # one evidence at a time is held
    verdicts = [(number, verdict) for number, mine in told for verdict in mine]
    alarms = [(number, one) for number, one in verdicts if one["outcome"] in ("DECOUPLED", "INVERSE")]
    tracked: dict[str, list[int]] = {}  # scope to rounds, each once
    for number, one in verdicts:
        if one["outcome"] == "TRACKING" and number not in tracked.setdefault(one["domain"], []):
            tracked[one["domain"]].append(number)
    if alarms:
        number, first = alarms[0]
        domains = sorted({verdict["domain"] for _, verdict in alarms if verdict["domain"] != OVERALL})
        where = f" in {', '.join(domains)}" if domains else " overall, with no single domain named"
        said = f"dev stopped tracking the external target{where}: first said in round {number} ({first['outcome']})"
    elif campaign.judge.external is None:
        said = "there was no external target, so whether dev tracks anything is unknown"
    elif OVERALL in tracked:
        said = f"no decoupling found: dev tracked the external target in {_rounds(tracked[OVERALL])}"
    elif tracked:
        domains = ", ".join(f"{name} ({_rounds(tracked[name])})" for name in sorted(tracked))
        said = "unresolved: no round could tell whether dev tracks the external target overall"
        said += f", though it does in {domains}"
    else:
        said = "unresolved: no round could tell whether dev tracks the external target"
    return f"{said}{_gain(final)}{_cut(campaign, len(told), spent)}."


def _gain(final: dict[str, Any] | None) -> str:
    if not final or "gain" not in final:
        return ""
    gain = final["gain"]
    shown = "" if gain["low"] > 0 or gain["high"] < 0 else ", an interval that holds zero"
    return (
        f"; on {final['items']} sealed items the standing settings are {100 * gain['mean']:+.1f} pt from the origin "
        f"[{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]{shown}"
    )


def _cut(campaign: Campaign, judged: int, spent: dict[str, Any] | None) -> str:
    if spent is None:
        return ""
    return f"; budget spent after {judged} of {campaign.constitution.rounds} rounds: {spent['why']}"


def _rounds(numbers: Sequence[int]) -> str:
    return f"round{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
