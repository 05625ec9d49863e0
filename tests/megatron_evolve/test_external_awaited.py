"""What an operator has yet to bring, scores or the word that opens the sealed half: what stands, what is too late."""

from contextlib import closing
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from megatron_evolve.campaign import ExternalScores
from megatron_evolve.cli import app
from megatron_evolve.desk import Awaiting
from megatron_evolve.external import ask_scores, keep_score
from megatron_evolve.ledger import Ledger
from megatron_evolve.status import awaited
from megatron_evolve.tally import Tally
from tests.megatron_evolve.test_external import RUN, TARGET, Table, table

__all__ = ["table"]  # the fixture


def test_what_is_still_awaited_after_some_were_brought_is_a_pause_of_its_own(table):
    """It was entered once under its first run: the campaign then stood as stopped, without a reason."""
    target, runs = ExternalScores(**TARGET), [replace(RUN, seed=seed) for seed in (1, 2, 3)]
    keys = [f"{run.key}/external-b" for run in runs]
    for brought, left in ((None, keys), (runs[1], [keys[0], keys[2]]), (None, [keys[0], keys[2]])):
        if brought is not None:
            keep_score(table.ground.folder, brought.key, {"score": 0.5, "by": "operator"})
            table = Table(Ledger(table.ground.folder.root), table.ground)
        with pytest.raises(Awaiting, match=f"{len(left)} external score"):
            ask_scores(table, target, [(run, "external-b") for run in runs])
        assert awaited(table.ledger) == left
        assert Tally.of(table.ledger).pause == f"{len(left)} external score(s) are awaited"
    assert len(table.ledger.keys("external-awaited")) == 2


def test_a_score_is_refused_once_its_round_is_judged(table):
    """A reply was lost, the round was judged without it: a score that came then would be read by nobody."""
    table.ledger.append("evidence", "1", {})
    with pytest.raises(ValueError, match=f"round 1 is judged without the score of {RUN.key}"):
        keep_score(table.ground.folder, RUN.key, {"score": 0.5, "by": "operator"})
    assert not table.ground.folder.submitted(RUN.key).exists()


def test_of_two_operators_the_first_ones_word_opens_the_sealed_half_and_both_are_told(tmp_path):
    def opens(*more: str):
        return CliRunner().invoke(app, ["external", "open-final", str(tmp_path), *more])

    with closing(Ledger(tmp_path)) as ledger:
        ledger.append("campaign-opened", "", {})
        early = opens()
        ledger.append("final-awaited", "", {})
        nobody = opens("--by", " ")
        told = [opens("--by", "alice"), opens("--by", "bob"), opens("--by", "bob", "--json"), opens("--by", "alice")]
        ledger.append("final-opened", "", {"by": "alice"})
        late = opens("--by", "carol")
        ledger.append("campaign-closed", "", {})
        closed = opens("--by", "carol", "--json")
    plain = "the sealed half is opened when the campaign goes on\n"
    assert [one.stdout for one in told] == [
        plain,
        f"alice said so before, and that word stands: {plain}",
        '{"by": "alice"}\n',
        plain,
    ]
    for one, said in ((early, "does not wait"), (nobody, "got a blank"), (late, "the word of alice, and opens once")):
        assert one.exit_code == 1 and said in one.stderr and one.stderr.count("\n") == 1
    assert closed.exit_code == 1 and "opens once" in closed.stdout
