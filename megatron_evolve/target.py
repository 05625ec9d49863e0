"""The external target, looked after before a look at it is paid: a file that changed or went costs nothing.

Scoring jobs read a CSV afresh. Where it is not the one that was frozen each of them ends crashed, which is nobody's
machine and is not tried again: without this the round would spend its looks, be judged without an external score, and
the rounds after it would train and pay on.
"""

from collections.abc import Sequence

from megatron_evolve.campaign import Campaign, ExternalCsv
from megatron_evolve.jobs import Ground, StageEnd
from megatron_evolve.launch.job import OutcomeKind
from megatron_evolve.ledger import Ledger
from megatron_evolve.prepare import judge_process
from megatron_evolve.retries import Paused


def check_target(campaign: Campaign, ground: Ground) -> None:
    """Has the judge hash its files again, in a process of its own, where the target is a CSV. Raises Paused."""
    if not isinstance(campaign.judge.external, ExternalCsv):
        return
    try:
        judge_process("--verify", str(ground.judge))
    except ValueError as error:
        raise Paused(f"before a look was paid, {error}", {}) from None


def check_scored(ledger: Ledger, key: str, ends: Sequence[StageEnd]) -> None:
    """Raises Paused where every job of a stage crashed, of two or more: no run's fault, and more looks follow.

    Once for a key, by the `paused` event that the controller enters: one that died before it did will pause again.
    """
    crashed = len(ends) > 1 and all(end.outcome == OutcomeKind.CRASHED.value for end in ends)
    if crashed and not any(event.data.get("once") == key for event in ledger.of_kind("paused")):
        raise Paused(
            f"all {len(ends)} jobs that scored {ends[0].stage} crashed, the first with: {ends[0].reason}; their looks "
            "are spent, and the round goes on without these scores",
            {},
            once=key,
        )
