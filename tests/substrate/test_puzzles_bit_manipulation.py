"""Bit rows: outputs recomputed on lists of bits instead of machine words."""

import random
from collections import Counter

from megatron_evolve.substrate.puzzles import bit_manipulation
from megatron_evolve.substrate.puzzles.families import draw, parse

ROLLED = {"r1": [1, 2, 3, 0], "r2": [2, 3, 0, 1]}


def nano_output(operation: str, word: str) -> str:
    if operation == "n":
        return "".join("10"[int(bit)] for bit in word)
    if operation == "s1":
        return "0" + word[:3]
    return "".join(word[i] for i in ROLLED[operation])


def challenge_output(table: str, rol: int, shl: int, shr: int, word: str) -> str:
    left = word[shl:] + "0" * shl
    right = ("0" * shr + word)[:8]
    rolled = word[rol:] + word[:rol]
    return "".join(table[int(bits, 2)] for bits in map("".join, zip(rolled, left, right, strict=True)))


def nano_pairs(row) -> tuple[list[list[str]], str]:
    _, *lines, query = row.prompt.splitlines()
    return [line.split(f" {row.rule['cue']} ") for line in lines], query[2:]


def test_nano_rows_follow_their_operation_and_force_their_answer():
    rng = random.Random(1)
    operations = Counter()
    for _ in range(600):
        row = draw("bit_manipulation", rng, difficulty="nano")
        pairs, query = nano_pairs(row)
        assert len({left for left, _ in pairs} | {query}) == 5
        assert all(nano_output(row.rule["operation"], left) == right for left, right in pairs)
        possible = {
            nano_output(operation, query)
            for operation in bit_manipulation.NANO.operations
            if all(nano_output(operation, left) == right for left, right in pairs)
        }
        assert possible == {row.answer}
        operations[row.rule["operation"]] += 1
    # Redrawing inputs, not operations, keeps the operation uniform: 150 each, 4 sigma = 42.
    assert all(108 < operations[operation] < 192 for operation in bit_manipulation.NANO.operations)


def test_challenge_rows_follow_their_table():
    rng = random.Random(2)
    tables, num_examples = Counter(), Counter()
    for _ in range(1500):
        row = draw("bit_manipulation", rng, difficulty="challenge")
        parsed = parse(row.prompt)
        rule = (row.rule["table"], row.rule["rol"], row.rule["shl"], row.rule["shr"])
        pairs = [*parsed.examples, (parsed.query, row.answer)]
        assert all(challenge_output(*rule, left) == right for left, right in pairs)
        assert len({left for left, _ in pairs}) == len(pairs)
        tables[rule[0]] += 1
        num_examples[len(parsed.examples)] += 1
    assert set(num_examples) == {7, 8, 9, 10}
    assert all(300 < count < 450 for count in num_examples.values())  # 375 each, 4 sigma = 67
    total = sum(bit_manipulation.TABLES.values())
    for table, weight in bit_manipulation.TABLES.items():
        share = weight / total
        assert abs(tables[table] / 1500 - share) < 4 * (share * (1 - share) / 1500) ** 0.5
