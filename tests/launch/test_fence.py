"""The fence: only a later start takes a folder, an older copy is told, and of two claims one is first."""

import itertools
import threading
from pathlib import Path

import pytest

from megatron_evolve.launch.fence import (
    FENCE_FILE,
    Fenced,
    Token,
    check_fence,
    claim,
    fence_environment,
    raise_fence,
    read_fence,
    shut_out,
)
from megatron_evolve.launch.rundir import DamagedFile, RunDirError

IN_ORDER = [Token(1, 0, "17"), Token(1, 1, "17"), Token(1, 2, "17"), Token(2, 0, "18")]


@pytest.mark.parametrize(("held", "token"), itertools.product(IN_ORDER, IN_ORDER))
def test_only_a_later_start_takes_the_folder(held: Token, token: Token, tmp_path: Path) -> None:
    raise_fence(tmp_path, held)
    if IN_ORDER.index(token) > IN_ORDER.index(held):
        raise_fence(tmp_path, token)
        assert read_fence(tmp_path) == token
    else:
        with pytest.raises(Fenced, match=f"to be free for {token}; {held} has it"):
            raise_fence(tmp_path, token)
        assert read_fence(tmp_path) == held


def test_of_one_start_only_one_job_has_the_folder(tmp_path: Path) -> None:
    raise_fence(tmp_path, Token(1, 0, "17"))
    with pytest.raises(Fenced):
        raise_fence(tmp_path, Token(1, 0, "18"))


def test_no_start_of_an_attempt_that_was_given_up_takes_the_folder(tmp_path: Path) -> None:
    raise_fence(tmp_path, Token(1, 0, "17"))
    for _ in range(2):
        shut_out(tmp_path, 1, "us")
        for late in (Token(1, 1, "17"), Token(1, 10**6, "17")):
            with pytest.raises(Fenced, match="no further start of attempt 1 by us has it"):
                raise_fence(tmp_path, late)
    raise_fence(tmp_path, Token(2, 0, "18"))
    shut_out(tmp_path, 1, "us")
    assert read_fence(tmp_path) == Token(2, 0, "18"), "and its successor is left alone"


def test_a_copy_is_told_once_it_is_overtaken(tmp_path: Path) -> None:
    first, second = IN_ORDER[:2]
    raise_fence(tmp_path, first)
    environment = fence_environment(tmp_path, first)
    check_fence(environment)
    raise_fence(tmp_path, second)
    with pytest.raises(Fenced, match="this copy writes no more"):
        check_fence(environment)
    check_fence(fence_environment(tmp_path, second))
    check_fence({})  # a job that nobody fenced


def test_a_fence_that_says_nothing_is_an_error(tmp_path: Path) -> None:
    assert read_fence(tmp_path) is None
    (tmp_path / FENCE_FILE).write_text('{"attempt": 1}\n')
    with pytest.raises(DamagedFile):
        raise_fence(tmp_path, IN_ORDER[0])


def test_of_many_claims_one_is_first_and_all_hear_of_it(tmp_path: Path) -> None:
    heard: list[str] = []
    threads = [
        threading.Thread(target=lambda name=str(number): heard.append(claim(tmp_path / "owner", name)))
        for number in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(heard) == 16 and len(set(heard)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["owner"]
    assert claim(tmp_path / "owner", "late") == heard[0]
    with pytest.raises(RunDirError, match="cannot claim"):
        claim(tmp_path / "nowhere" / "owner", "x")
