"""Work in shares: every piece once, and a process that dies is told, never taken for one with nothing to say."""

import time

import pytest

from megatron_evolve.kernels.bench import shares


def test_shares_cover_every_piece_once():
    turns = [shares.turn(f"{i}/3") for i in range(3)]
    assert [[mine() for mine in turns].count(True) for _ in range(10)] == [1] * 10
    assert all(shares.turn(None)() for _ in range(3))


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match="a share is i/n with 0 <= i < n; got 3/3"):
        shares.turn("3/3")


@pytest.mark.parametrize("end", ["raise RuntimeError('no such kernel')", "import os; os.abort()"])
def test_a_process_that_dies_costs_its_share_and_is_told(end):
    program = (
        f"import sys\nprint('{{\"piece\": ' + sys.argv[2][0] + '}}', flush=True)\nif sys.argv[2] == '1/2':\n    {end}"
    )
    first, second, failed = shares.run(["-c", program], 2)
    assert (first, second) == ({"piece": 0}, {"piece": 1})
    assert failed["failed"] == "share 1/2" and failed["ok"] is False and failed["reason"].startswith("status ")


def test_one_that_hangs_is_ended_with_the_rows_it_had():
    program = "import time\nprint('{\"piece\": 0}\\n{\"half', end='', flush=True)\ntime.sleep(600)"
    row, failed = shares.run(["-c", program], 1, time.monotonic() + 2)
    assert row == {"piece": 0}
    assert failed["failed"] == "share 0/1" and "when the time of this check was used up" in failed["reason"]
