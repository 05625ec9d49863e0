"""The account of looks: on disk first, never twice, within budget, final once; and what the Ladder releases."""

import hashlib
import os
import subprocess
import sys

import pytest

from megatron_evolve.eval.looks import BudgetSpent, Look, Looks, round_to
from megatron_evolve.launch.rundir import RunDirError


def look(candidate: str = "c1", split: str = "external-b", number: int = 1, **changes) -> Look:
    fields = {
        "candidates": (candidate,),
        "runs": (f"{candidate}/0",),
        "purpose": "verdict",
        "split": split,
        "round": number,
        "item_set": "0123",
        "items": 100,
    }
    return Look(**fields | changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "looks.jsonl"


def test_a_look_is_on_disk_before_pay_returns(path):
    paid = Looks(path, external_budget=3).pay(look())
    again = Looks(path, external_budget=3)
    assert again.entries == (paid,)
    assert again.paid(candidate="c1", round_number=1, split="external-b") == paid
    assert again.paid(candidate="c1", round_number=2, split="external-b") is None
    assert again.paid(candidate="c2", round_number=1, split="external-b") is None


def test_asking_again_after_a_crash_is_no_second_look(path):
    first = look(runs=("c1/0", "c1/1"))
    Looks(path, external_budget=1).pay(first)
    before = path.read_bytes()
    account = Looks(path, external_budget=1)
    assert account.pay(look(runs=("c1/1", "c1/0"), purpose="resumed")) == first
    assert account.summary() == {"dev": 0, "external": 1, "external_budget": 1}
    assert path.read_bytes() == before


def test_the_digest_of_the_account_is_that_of_its_file_as_it_grew(path):
    account = Looks(path, external_budget=5)
    seen = [hashlib.sha256(b"").hexdigest()]
    for number in (1, 2, 3):
        account.pay(look(number=number))
        account.pay(look(number=number))  # paid before: no line
        seen.append(hashlib.sha256(path.read_bytes()).hexdigest())
        assert account.digest == seen[-1]
    path.write_bytes(path.read_bytes() + b'{"cut off')
    again = Looks(path, external_budget=5)
    assert again.digests() == account.digests() == seen and again.digest == seen[-1]


@pytest.mark.parametrize("changes", [{"runs": ("c1/0", "c1/9")}, {"item_set": "3210"}])
def test_another_question_under_the_same_key_is_refused(path, changes):
    account = Looks(path, external_budget=5)
    account.pay(look())
    with pytest.raises(ValueError, match="a candidate is asked once a round"):
        account.pay(look(**changes))
    assert account.spent == 1


def test_the_budget_holds_across_restarts(path):
    Looks(path, external_budget=2).pay(look("c1"))
    account = Looks(path, external_budget=2)
    account.pay(look("c1", split="external-a"))
    with pytest.raises(BudgetSpent, match=r"expected at most 2 looks .* c2 asks for one more on external-b") as caught:
        account.pay(look("c2"))
    assert "\n" not in str(caught.value)
    account.pay(look("c2", split="dev-b"))
    assert account.pay(look("c1")) == look("c1")
    assert account.summary() == {"dev": 1, "external": 2, "external_budget": 2}
    assert len(path.read_bytes().splitlines()) == 3


def test_looks_of_earlier_rounds_are_counted_without_reading_them(path):
    looks = Looks(path, external_budget=9)
    for number in (1, 1, 2, 3):
        looks.pay(look(f"c{looks.spent}", number=number))
    looks.pay(look(split="dev-a"))
    for account in (looks, Looks(path, external_budget=9)):
        assert [account.spent_before(number) for number in (1, 2, 3, 4)] == [0, 2, 3, 4]


def test_without_a_budget_nothing_external_is_asked(path):
    with pytest.raises(BudgetSpent):
        Looks(path, external_budget=0).pay(look())
    assert not path.exists()


def test_final_opens_once_for_all_it_names(path):
    account = Looks(path, external_budget=0)
    opening = look(candidates=("c1", "c2"), runs=("c1/0", "c2/0"), split="final", number=4)
    assert account.pay(opening) == opening
    account = Looks(path, external_budget=0)
    assert account.pay(opening) == opening
    assert account.paid(candidate="c2", round_number=9, split="final") == opening
    assert account.paid(candidate="c3", round_number=4, split="final") is None
    with pytest.raises(ValueError, match="the final split opens once"):
        account.pay(look("c3", split="final", number=5))


def test_only_final_takes_several_candidates():
    with pytest.raises(ValueError, match="one candidate's"):
        look(candidates=("c1", "c2"))


def test_a_line_cut_off_by_a_crash_was_never_paid(path):
    account = Looks(path, external_budget=2)
    account.pay(look("c1"))
    account.pay(look("c2"))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        account = Looks(path, external_budget=2)
        assert account.spent == 1
        account.pay(look("c2"))
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{}", "line 1: candidates is missing"),
        (b"\xff", "line 1: expected a look in JSON"),
        (b"[", "line 1: expected a look"),
        (b"[" * 100_000, "line 1: expected a look in JSON"),
    ],
)
def test_a_corrupt_line_is_named(path, line, message):
    path.write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=message):
        Looks(path, external_budget=1)


def test_a_doubled_line_is_named(path):
    Looks(path, external_budget=1).pay(look())
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ValueError, match="line 2: expected every look once"):
        Looks(path, external_budget=1)


def test_a_failed_write_leaves_the_account_as_it_was(path, monkeypatch):
    account = Looks(path, external_budget=3)
    account.pay(look("c1"))
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunDirError, match="No space left on device: free space"):
        account.pay(look("c2"))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert account.spent == 1
    account.pay(look("c2"))
    assert Looks(path, external_budget=3).spent == 2


def test_a_process_killed_after_pay_has_paid(path):
    program = (
        "import os, sys; from megatron_evolve.eval.looks import Look, Looks;"
        f"Looks({str(path)!r}, external_budget=1).pay(Look.model_validate_json(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", program, look().model_dump_json()], check=False)
    assert ended.returncode == -9
    assert Looks(path, external_budget=1).entries == (look(),)


def test_round_to():
    assert round_to(0.8512, 0.004) == pytest.approx(0.852)
    assert round_to(-0.011, 0.02) == pytest.approx(-0.02)
