"""Unit conversion rows: results recomputed from the recorded factor."""

import random
import re

from megatron_evolve.substrate.puzzles.families import draw, parse
from megatron_evolve.substrate.puzzles.unit_conversion import CHALLENGE, NANO, UNITS


def test_nano_rows_follow_their_factor():
    assert len(UNITS) == NANO.factor[1] - NANO.factor[0] + 1
    rng = random.Random(1)
    for _ in range(400):
        row = draw("unit_conversion", rng, difficulty="nano")
        lines = re.findall(r"(\d+) (\w) becomes (\d+)", row.prompt)
        query = int(row.prompt.rsplit("Q ")[1])
        assert len(lines) == 3
        assert {unit for _, unit, _ in lines} == {row.rule["cue"]}
        assert len({int(x) for x, _, _ in lines} | {query}) == 4
        # One example fixes the factor, so the answer is always forced.
        assert {int(y) / int(x) for x, _, y in lines} == {row.rule["factor"]}
        assert int(row.answer) == row.rule["factor"] * query
        assert 2 <= query <= 12


def test_challenge_rows_follow_their_factor():
    rng = random.Random(2)
    num_examples, lengths = set(), []
    for _ in range(600):
        row = draw("unit_conversion", rng, difficulty="challenge")
        parsed = parse(row.prompt)
        factor = row.rule["factor"]
        assert CHALLENGE.factor[0] <= factor <= CHALLENGE.factor[1]
        for x, y in [*parsed.examples, (parsed.query, row.answer)]:
            assert 5 <= float(x) <= 50
            assert x == str(float(x))
            assert abs(float(y) - factor * float(x)) <= 0.005001
            assert re.fullmatch(r"\d+\.\d\d", y)
        assert abs(float(row.traces["short-trace"][1:]) / factor - 1) < 0.01
        num_examples.add(len(parsed.examples))
        lengths.append(len(row.answer))
    assert num_examples == {3, 4, 5}
    # y < 10 for 10 % of uniform factors and measurements, published 66 of 769; 4 sigma of 600 either side.
    assert 0.04 < lengths.count(4) / 600 < 0.15
    assert set(lengths) <= {4, 5, 6}
