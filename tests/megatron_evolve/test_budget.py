"""Budgets: never exceeded whatever jobs take, the same after any restart, and told before anything starts."""

import os
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from megatron_evolve.budget import Account, Spend, amount, figures, limits_of, most_of, spent_before
from megatron_evolve.constitution import Budgets, Constitution
from megatron_evolve.estimate import use_words
from megatron_evolve.launch.job import Job, JobOutcome, OutcomeKind, Resources
from megatron_evolve.launch.rundir import prepare_attempt, write_json, write_outcome
from megatron_evolve.ledger import Event
from tests.megatron_evolve.small_jobs import DONE, LOST, Bench

HOUR = 3600.0


def job_of(key: str, run_dir: Path = Path("/nowhere"), *, limit_s: float = 90.0, gpus: int = 2, cores: int = 4) -> Job:
    return Job(key, ("true",), run_dir, limit_s, "done", resources=Resources(cores=cores, gpus=gpus), grace_s=10.0)


def ended(number: int, time: datetime, kind: str, data: dict) -> Event:
    return Event(number=number, time=time.isoformat(), kind=kind, key=str(number), data=data, previous="", hash="")


def test_whatever_jobs_take_no_budget_is_exceeded() -> None:
    """Law, on random jobs that run beside each other and take up to all they may: used stays within every budget."""
    rng = random.Random(5)
    refused = 0
    for _ in range(60):
        prices = {"gpu_hour_price": 2.5, "cpu_hour_price": 0.1}
        budgets = Budgets(
            gpu_hours=rng.uniform(0.1, 2), cpu_hours=rng.uniform(0.2, 3), money=rng.uniform(0.3, 4), **prices
        )
        account, running = Account(budgets), {}
        for number in range(150):
            job = job_of(f"j{number}", limit_s=rng.uniform(10, 400), gpus=rng.randint(0, 4), cores=rng.randint(1, 8))
            if rng.random() < 0.5 and account.refusal(job) is None:
                account.reserve(job)
                running[job.key] = job
            elif account.refusal(job) is not None:
                refused += 1
                most, used = figures(budgets, most_of(job)), figures(budgets, account.used)
                reserved = figures(budgets, sum(map(most_of, running.values()), Spend()))
                limits = limits_of(budgets).items()
                assert any(used[name] + reserved[name] + most[name] > limit for name, limit in limits), (
                    "no idle refusal"
                )
            if running and rng.random() < 0.5:
                key, done = running.popitem()
                share = rng.choice([0.0, 0.3, 1.0])
                most = most_of(done)
                account.settle(key, Spend(most.seconds * share, most.cpu_seconds * share, most.gpu_seconds * share))
            for name, limit in limits_of(budgets).items():
                assert figures(budgets, account.used)[name] <= limit * (1 + 1e-12)
    assert refused > 500


def test_wall_time_is_counted_from_the_opening_pauses_included() -> None:
    opened = datetime.now(UTC) - timedelta(hours=3)
    account = Account.of(Budgets(wall_hours=3.1), [ended(0, opened, "campaign-opened", {})])
    assert account.refusal(job_of("a", limit_s=300)) is None
    told = account.refusal(job_of("a", limit_s=700))
    assert told == "3 of 3.1 hours are used, and the next job could take 0.1972"


def test_the_ledger_alone_tells_what_was_used() -> None:
    now = datetime.now(UTC)
    end = {
        "outcome": "lost",
        "reason": "",
        "seconds": 1800.0,
        "cpu_seconds": 7200.0,
        "gpu_seconds": 14400.0,
        "attempts": 3,
    }
    old = {name: value for name, value in end.items() if name != "gpu_seconds"}  # of before GPUs were charged
    events = [
        ended(0, now, "campaign-opened", {}),
        *(ended(n, now, "ended", {"end": one}) for n, one in ((1, end), (2, old))),
    ]
    account = Account.of(Budgets(gpu_hours=8, gpu_hour_price=3), events)
    told = account.statement()
    assert told["gpu_hours"] == {"used": 4.0, "budget": 8} and told["cpu_hours"] == {"used": 4.0, "budget": None}
    assert told["money"] == {"used": 12.0, "budget": None}
    spent = [*events, ended(3, now, "budget-spent", {"why": "all of it"})]
    assert Account.of(Budgets(gpu_hours=800), spent).refusal(job_of("a")) == "all of it", "once spent it stays so"


@pytest.mark.parametrize("kind", OutcomeKind)
def test_an_end_that_nobody_saw_is_charged_up_to_its_last_sign_of_life(kind: OutcomeKind, tmp_path: Path) -> None:
    """Whatever it is called: Slurm's TIMEOUT and OUT_OF_MEMORY and Kubernetes' OOMKilled cost nothing before."""
    job = job_of("a", tmp_path)
    folder = prepare_attempt(job, 1)
    write_outcome(tmp_path, JobOutcome.unmeasured("a", 1, kind, "host", "nobody saw it end"))
    assert spent_before(job) == Spend(), "it never began"
    write_json(folder / "supervisor.json", {})
    (folder / "alive").touch()
    for lived_s, charged_s in ((40.0, 60.0), (5000.0, 100.0)):  # a sign was due every 20 s; its limit and grace are 100
        at = (folder / "alive").stat().st_mtime - lived_s
        os.utime(folder / "supervisor.json", (at, at))
        assert vars(spent_before(job)) == pytest.approx(vars(Spend.most(job.resources, charged_s)))
    (folder / "outcome.json").write_text("{")
    assert spent_before(job) == most_of(job), "and the whole limit where its outcome is damaged"


def test_processor_time_that_nobody_took_is_that_of_all_cores(tmp_path: Path) -> None:
    """Ranks under srun, and any job under pyxis: their CPU-hours were free."""
    job = job_of("a", tmp_path)
    prepare_attempt(job, 1)
    ended = JobOutcome.unmeasured("a", 1, OutcomeKind.FINISHED, "host", "")
    for cpu_seconds, charged_s in ((None, 120.0), (7.0, 7.0)):
        write_outcome(tmp_path, replace(ended, seconds=30.0, cpu_seconds=cpu_seconds))
        assert spent_before(job) == Spend(30.0, charged_s, 60.0)


def test_what_would_exceed_the_budget_is_not_started_and_no_new_name_helps(tmp_path: Path) -> None:
    """Jobs of half a second on one GPU that may take two: of 3.2 GPU-seconds three are safe, a fourth is not."""
    bench = Bench(tmp_path, devices=("0",))
    budgets = Budgets(gpu_hours=3.2 / HOUR)
    account = Account(budgets)
    where = {"account": account, "time_limit_s": 2.0, "resources": Resources(gpus=1)}
    ends = bench.run(dict.fromkeys("abcd", f"sleep 0.5; {DONE}"), **where)
    started = {name for name in "abcd" if bench.attempts(name)}
    assert started == set(ends) and 1 <= len(ends) <= 3
    assert account.spent is not None and "GPU-hours are used, and the next job could take 0.0005556" in account.spent
    assert account.used.gpu_seconds == pytest.approx(sum(end.gpu_seconds for end in ends.values()))
    facts = [ended(n, datetime.now(UTC), "ended", {"end": vars(end)}) for n, end in enumerate(ends.values())]
    again = Account.of(budgets, facts)
    assert Bench(tmp_path, devices=("0",)).run({"another": DONE}, **{**where, "account": again}) == {}
    assert not bench.attempts("another")


def test_reservations_delay_jobs_and_stop_none(tmp_path: Path) -> None:
    """Two of six fit the budget at their worst; as each takes next to nothing, all are run."""
    account = Account(Budgets(cpu_hours=65 / HOUR))
    ends = Bench(tmp_path, cores=6).run(dict.fromkeys("abcdef", DONE), account=account)
    assert {end.outcome for end in ends.values()} == {"finished"} and len(ends) == 6 and account.spent is None


def test_a_retry_that_no_budget_allows_ends_the_stage_with_its_cost(tmp_path: Path) -> None:
    account = Account(Budgets(gpu_hours=2.2 / HOUR))
    where = {"account": account, "time_limit_s": 2.0, "resources": Resources(gpus=1)}
    end = Bench(tmp_path, devices=("0",)).run({"a": f"sleep 0.4; {LOST}"}, **where)["a"]
    assert (end.outcome, end.attempts) == ("lost", 1) and end.gpu_seconds > 0.4
    assert account.used.gpu_seconds == pytest.approx(end.gpu_seconds) and account.spent is not None


@pytest.mark.parametrize(
    ("value", "told"),
    [(0.0, "0"), (0.12344, "0.1234"), (999.94, "999.9"), (1234.56, "1,235"), (14_400.0, "14,400"), (2e6, "2,000,000")],
)
def test_an_amount_is_told_without_an_exponent(value: float, told: str) -> None:
    assert amount(value) == told


def test_a_refusal_tells_large_amounts_in_full() -> None:
    account = Account(Budgets(gpu_hours=14_400), used=Spend(gpu_seconds=14_399 * HOUR))
    told = account.refusal(job_of("1/a/1/train", limit_s=HOUR - 10, gpus=12_000))
    assert told == "14,399 of 14,400 GPU-hours are used, and the next job could take 12,000"


def test_a_budget_of_money_needs_a_price() -> None:
    with pytest.raises(ValueError, match="a budget of money needs a price: add gpu_hour_price"):
        Constitution.parse({"budgets": {"money": 100}}, where="constitution")
    assert Constitution().budgets == Budgets() and limits_of(Budgets()) == {}


def test_the_statement_sets_what_will_be_used_beside_the_budgets() -> None:
    total = {"training_runs": 60, "scoring_jobs": 180, "training_gpu_hours_assumed": 1234.5, "gpu_hours_limit": 9600.0}
    budget = Account(Budgets(gpu_hours=5000, gpu_hour_price=2)).statement()
    use = {"total": {**total, "cpu_hours_limit": 80_000.0}, "rounds": 4, "rounds_anew": {}, "warnings": []}
    lines = use_words(use, budget)
    assert lines[0] == "at most 60 training runs and 180 scoring jobs, with the origin's"
    used = "0 used of a budget of 5,000"
    assert lines[1] == f"  GPU-hours: 9,600 if every job ran to its time limit, 1,234 assumed for training, {used}"
    assert lines[2] == "  CPU-hours: 80,000 if every job ran to its time limit, no budget" and len(lines) == 3
