"""The end of a campaign: the standing settings against the origin, on fresh seeds and sealed items, once.

A campaign that claims performance is measured here and nowhere else: new runs of the standing settings (no run of
theirs was selected on), the origin's frozen runs, the sealed items of the external target that no round has asked.
"""

from collections.abc import Sequence
from typing import Any

from megatron_evolve.candidate import candidate, run_seed
from megatron_evolve.desk import Desk, Stopped
from megatron_evolve.eval.looks import Look
from megatron_evolve.eval.paired import RunItems, effect, probability_better
from megatron_evolve.eval.score import read_rows
from megatron_evolve.eval.seeds import RunReplicates, SeedPool
from megatron_evolve.jobs import FINAL_STAGE, Ground, Run, drive, write_candidate
from megatron_evolve.origin import ORIGIN_ROUND
from megatron_evolve.policy import SearchPolicy
from megatron_evolve.prepare import origin_ground
from megatron_evolve.review import INTERVAL_ALPHA, seeds_of
from megatron_evolve.substrate.digest import digest_of


def close_campaign(desk: Desk, policy: SearchPolicy) -> dict[str, Any]:
    """Measures the claim, if there is a target to measure it on, and writes the ledger's last event."""
    closed = desk.ledger.find("campaign-closed")
    if closed is not None:
        return closed.data
    final = None
    if desk.campaign.judge.external is not None:
        final = desk.ledger.once("final", "", lambda: final_comparison(desk, policy))
    statement = {"claim": desk.campaign.claim, "final": final, "finding": finding(desk, final)}
    return desk.ledger.append("campaign-closed", "", statement).data


def final_comparison(desk: Desk, policy: SearchPolicy) -> dict[str, Any]:
    """The standing settings against the origin on the sealed items."""
    standing = candidate(desk.substrate_digest, policy.standing)
    write_candidate(desk.ground.folder, policy.round, standing)
    outside = origin_ground(
        desk.ground.substrate, desk.ground.judge, desk.ground.time_limit_s, desk.ground.folder.root / "closing"
    )
    origin = candidate(desk.substrate_digest, desk.origin_settings)
    origin_runs = [Run(ORIGIN_ROUND, origin, seed) for seed in desk.origin.seeds]
    if standing.id == origin.id:
        return {"standing": standing.id, "origin": origin.id, "same": True}
    seeds = [
        run_seed(desk.campaign.seed, policy.round, standing.id, index)
        for index in range(desk.campaign.constitution.anchor_seeds)
    ]
    runs = [Run(policy.round, standing, seed) for seed in seeds]
    _drive(desk, desk.ground, runs, "train")
    finished = [
        run for run in runs if desk.ledger.find("ended", f"{run.key}/train").data["end"]["outcome"] == "finished"
    ]
    if not finished:
        return {
            "standing": standing.id,
            "origin": origin.id,
            "same": False,
            "failed": "no run of the standing settings finished",
        }
    _pay(desk, policy, [standing.id, origin.id], [*finished, *origin_runs])
    _drive(desk, desk.ground, finished, FINAL_STAGE)
    _drive(desk, outside, origin_runs, FINAL_STAGE)
    mine = [_items(desk.ground, run) for run in finished]
    theirs = [_items(outside, run) for run in origin_runs]
    return _compare(desk, standing.id, origin.id, mine, theirs)


def _drive(desk: Desk, ground: Ground, runs: Sequence[Run], stage: str) -> None:
    """Runs one stage of some runs, each end an event; raises Stopped when asked to stop before all ended."""
    todo = [(run, stage) for run in runs if desk.ledger.find("ended", f"{run.key}/{stage}") is None]
    for end in drive(ground, desk.launcher, todo, lambda end: (), desk.stop):
        facts = {name: getattr(end, name) for name in ("outcome", "reason", "cpu_seconds", "seconds", "attempts")}
        desk.ledger.once("ended", f"{end.run.key}/{end.stage}", lambda facts=facts: {"end": facts, "files": {}})
        desk.on_progress("ended", {"round": end.run.round, "stage": end.stage, "end": end})
    if desk.stop():
        raise Stopped("stopped as asked: everything finished is kept; run the same command to go on")


def _pay(desk: Desk, policy: SearchPolicy, names: Sequence[str], runs: Sequence[Run]) -> None:
    desk.looks.pay(
        Look(
            candidates=tuple(names),
            runs=tuple(run.key for run in runs),
            purpose="the standing settings against the origin, once, at the end",
            split="final",
            round=policy.round,
            item_set=digest_of({"judge": desk.judge_digest, "split": "final"}),
            items=desk.suites["items"]["final"],
        )
    )


def _items(ground: Ground, run: Run) -> RunItems:
    rows = read_rows(ground.stage_dir(run, FINAL_STAGE) / "scores.parquet")
    return rows.of_run(run.candidate.id, run.seed, "final")


def _compare(desk: Desk, standing: str, origin: str, mine: list[RunItems], theirs: list[RunItems]) -> dict[str, Any]:
    earlier = [
        one for number in range(1, desk.campaign.constitution.rounds + 1) for one in desk.evidence(number).replicates
    ]
    pool = SeedPool((*desk.origin.pooled(), *(RunReplicates.from_dict(one) for one in earlier)))
    weights = desk.weights.external
    found = effect(mine, theirs, weights, seeds_of(pool, desk.weights, "external"))
    means = {}
    for name, runs in (("standing", mine), ("origin", theirs)):
        means[name] = sum(_mean(run, weights) for run in runs) / len(runs)
    return {
        "standing": standing,
        "origin": origin,
        "same": False,
        "accuracy": means,
        "items": len(mine[0].item_ids),
        "runs": {"standing": len(mine), "origin": len(theirs)},
        "gain": {
            "mean": found.mean,
            "se": found.se,
            "low": found.lower(INTERVAL_ALPHA),
            "high": found.upper(INTERVAL_ALPHA),
            "p_better": probability_better(found),
        },
    }


def _mean(run: RunItems, weights: Any) -> float:
    names = sorted(set(run.families.tolist()))
    total = sum(weights[name] for name in names)
    return sum(weights[name] * float(run.correct[run.families == name].mean()) for name in names) / total


def finding(desk: Desk, final: dict[str, Any] | None) -> str:
    """One sentence that says what the campaign found, made from its evidence."""
    rounds = range(1, desk.campaign.constitution.rounds + 1)
    evidence = {number: desk.evidence(number) for number in rounds}
    alarms = [
        (number, verdict)
        for number in rounds
        for verdict in evidence[number].verdicts
        if verdict["outcome"] in ("DECOUPLED", "INVERSE")
    ]
    tracked = [number for number in rounds if any(v["outcome"] == "TRACKING" for v in evidence[number].verdicts)]
    if alarms:
        number, first = alarms[0]
        domains = sorted({verdict["domain"] for _, verdict in alarms if verdict["domain"] != "overall"})
        where = f" in {', '.join(domains)}" if domains else " overall, with no single domain named"
        said = f"dev stopped tracking the external target{where}: first said in round {number} ({first['outcome']})"
    elif desk.campaign.judge.external is None:
        said = "there was no external target, so whether dev tracks anything is unknown"
    elif tracked:
        rounds_said = f"round{'s' if len(tracked) > 1 else ''} {_list(tracked)}"
        said = f"no decoupling found: dev tracked the external target in {rounds_said}"
    else:
        said = "unresolved: no round could tell whether dev tracks the external target"
    return f"{said}{_gain(final)}."


def _gain(final: dict[str, Any] | None) -> str:
    if not final or "gain" not in final:
        return ""
    gain = final["gain"]
    shown = "" if gain["low"] > 0 or gain["high"] < 0 else ", an interval that holds zero"
    return (
        f"; on {final['items']} sealed items the standing settings are {100 * gain['mean']:+.1f} pt from the origin "
        f"[{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]{shown}"
    )


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)
