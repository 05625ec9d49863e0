"""Work in shares: every piece once, and a process that dies is told, never taken for one with nothing to say."""

import json
import math
import os
import time

import pytest

from megatron_evolve.kernels.bench import shares
from megatron_evolve.kernels.bench.lines import line_of, row_of


def test_shares_cover_every_piece_once():
    turns = [shares.turn(f"{i}/3") for i in range(3)]
    assert [[mine() for mine in turns].count(True) for _ in range(10)] == [1] * 10
    assert all(shares.turn(None)() for _ in range(3))


def test_a_share_goes_on_after_its_piece_that_ended_another():
    begun = []
    mine = shares.turn("1/2", after=0, begun=begun.append)
    assert [piece for piece in range(6) if mine()] == [3, 5] and begun == [1, 2]


def test_cores_are_those_that_a_container_allows(tmp_path):
    assert shares.usable_cores(tmp_path) == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert shares.usable_cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert shares.usable_cores(tmp_path) == len(os.sched_getaffinity(0))


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match="a share is i/n with 0 <= i < n; got 3/3"):
        shares.turn("3/3")


@pytest.mark.parametrize("end", ["raise RuntimeError('no such kernel')", "import os; os.abort()"])
def test_a_process_that_dies_costs_its_share_and_is_told(end):
    program = (
        f"import sys\nprint('{{\"piece\": ' + sys.argv[2][0] + '}}', flush=True)\nif sys.argv[2] == '1/2':\n    {end}"
    )
    rows = list(shares.run(["-c", program], 2))
    assert sorted(row["piece"] for row in rows if "piece" in row) == [0, 1]
    (failed,) = [row for row in rows if "piece" not in row]
    assert failed["failed"] == "share 1/2" and failed["ok"] is False and failed["reason"].startswith("status ")


PTX = "=====\n`ptxas` failed with error code 1\n.visible .entry _fc1(\n)\n.reqntid 256\n{\n\tret;\n}\n[1]\n{1: 2}"


def test_what_a_compiler_prints_costs_no_row():
    """Triton prints the whole PTX where ptxas fails, and the body of that begins with a line `{`."""
    assert list(shares.run(["-c", f"print({PTX!r})\nprint('{{\"piece\": 0}}')"], 1)) == [{"piece": 0}]


def test_a_complaint_longer_than_a_pipe_blocks_nobody_and_its_end_is_kept():
    program = "import sys\nprint('x' * 2**20, file=sys.stderr)\nsys.exit('no such kernel')"
    (failed,) = shares.run(["-c", program], 1)
    assert failed["reason"] == "status 1: no such kernel" and len(failed["complaint"]) == 2


def test_one_that_hangs_is_ended_with_the_rows_it_had():
    program = "import time\nprint('{\"piece\": 0}\\n{\"half', end='', flush=True)\ntime.sleep(600)"
    row, failed = shares.run(["-c", program], 1, time.monotonic() + 2)
    assert row == {"piece": 0}
    assert failed["failed"] == "share 0/1" and "when the time of this check was used up" in failed["reason"]
    assert failed["after"] is None and "step" not in failed


GOES_ON = """
import os, sys, time
after = int(sys.argv[4]) if "--after" in sys.argv else -1
for number in range(after + 1, 4):
    print('{"step": %d}' % number, flush=True)
    if number == 1:
        os.abort()
    if number == 2:
        time.sleep(600)
    print('{"check": "piece %d"}' % number, flush=True)
"""


def test_another_goes_on_after_the_piece_that_ended_a_process():
    """One piece aborts, one hangs; those before, between and after are told."""
    first, aborted, hung, last = shares.run(["-c", GOES_ON], 1, silent_s=1.0)
    assert (first, last) == ({"check": "piece 0"}, {"check": "piece 3"})
    assert (aborted["step"], aborted["after"], aborted["ok"]) == (1, "piece 0", False)
    assert hung["step"] == 2 and "it said nothing for 1 s" in hung["reason"]


def test_rows_come_before_the_end_and_whoever_stops_reading_leaves_nothing_running():
    program = """
import os, subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print('{"pids": [%d, %d]}' % (os.getpid(), other.pid), flush=True)
time.sleep(600)
"""
    rows = shares.run(["-c", program], 1)
    pids = next(rows)["pids"]
    rows.close()
    until = time.monotonic() + 10
    while any(is_running(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_row_is_strict_json_whatever_its_numbers():
    row = {"error": math.nan, "errors": {"out": math.inf, "dx": 0.5}, "losses": [1.0, math.nan], "tiles": (1, 2)}
    said = json.loads(line_of(row), parse_constant=lambda word: pytest.fail(word))
    assert said == {"error": None, "errors": {"out": None, "dx": 0.5}, "losses": [1.0, None], "tiles": [1, 2]}
    assert row_of(line_of(row)) == said and row_of("{") is None and row_of("[1]") is None
