"""The cue: at rate 1 the surface feature settles the rule, at 0 it tells nothing, and its distribution is the same.

Chi-square statistics against the 0.1 % point by Wilson and Hilferty's approximation; seeds are fixed.
"""

import random
from collections import Counter, defaultdict

import pytest

from megatron_evolve.substrate.puzzles.families import CUED_FAMILIES, FAMILIES, draw

NUM_ROWS = 3000
CASES = [(family, difficulty) for family in CUED_FAMILIES for difficulty in ("nano", "challenge")]

# The part of the hidden rule that the feature stands for.
SETTLED = {
    ("gravity", "nano"): lambda rule: rule["k"],
    ("gravity", "challenge"): lambda rule: int((rule["g"] - 4.9) / 1.47),
    ("unit_conversion", "nano"): lambda rule: rule["factor"],
    ("unit_conversion", "challenge"): lambda rule: int((rule["factor"] - 0.5) / 0.15),
    ("cipher", "nano"): lambda rule: rule["shift"],
    ("cipher", "challenge"): lambda rule: rule["key"],
    ("bit_manipulation", "nano"): lambda rule: rule["operation"],
    ("bit_manipulation", "challenge"): lambda rule: (rule["table"], rule["rol"], rule["shl"], rule["shr"]),
    ("equation", "nano"): lambda rule: rule["rules"][rule["cue"]],
    ("equation", "challenge"): lambda rule: (rule["mode"], rule["rules"][rule["cue"]]),
}
# A coarser view of the rule for the test of independence, where the rule itself has too many values to count.
COARSE = SETTLED | {
    ("cipher", "challenge"): lambda rule: rule["key"][4],
    ("bit_manipulation", "challenge"): lambda rule: rule["table"],
}


def rules_at(family: str, difficulty: str, cue_rate: float, seed: int = 11) -> list:
    rng = random.Random(seed)
    return [draw(family, rng, difficulty=difficulty, cue_rate=cue_rate).rule for _ in range(NUM_ROWS)]


def chi_square_fits(table: dict) -> bool:
    """Whether a {row: Counter} table is compatible with rows and columns being independent, at the 0.1 % point."""
    columns = sum(table.values(), Counter())
    total = sum(columns.values())
    statistic = 0.0
    for counts in table.values():
        share = sum(counts.values()) / total
        statistic += sum((counts[c] - share * n) ** 2 / (share * n) for c, n in columns.items())
    free = (len(table) - 1) * (len(columns) - 1)
    spread = 2 / (9 * free)
    return statistic < free * (1 - spread + 3.09 * spread**0.5) ** 3


def test_the_chi_square_test_can_fail():
    assert chi_square_fits({0: Counter(a=500, b=500), 1: Counter(a=520, b=480)})
    assert not chi_square_fits({0: Counter(a=500, b=500), 1: Counter(a=600, b=400)})


@pytest.mark.parametrize(("family", "difficulty"), CASES)
def test_feature_has_one_distribution_at_both_rates(family, difficulty):
    at_0 = Counter(rule["cue"] for rule in rules_at(family, difficulty, 0.0, seed=11))
    at_1 = Counter(rule["cue"] for rule in rules_at(family, difficulty, 1.0, seed=12))
    assert set(at_0) == set(at_1)
    assert chi_square_fits({0: at_0, 1: at_1})


@pytest.mark.parametrize(("family", "difficulty"), CASES)
def test_feature_settles_the_rule_at_rate_1(family, difficulty):
    settled = defaultdict(set)
    for rule in rules_at(family, difficulty, 1.0):
        settled[rule["cue"]].add(SETTLED[family, difficulty](rule))
    assert all(len(rules) == 1 for rules in settled.values())
    assert len({next(iter(rules)) for rules in settled.values()}) >= 3


@pytest.mark.parametrize(("family", "difficulty"), CASES)
def test_feature_tells_nothing_at_rate_0(family, difficulty):
    table = defaultdict(Counter)
    for rule in rules_at(family, difficulty, 0.0):
        # The published equation rows tie plain glyphs to slots by themselves; the other glyphs are free.
        if (family, difficulty) != ("equation", "challenge") or rule["cue"] not in "+-*":
            table[rule["cue"]][COARSE[family, difficulty](rule)] += 1
    assert chi_square_fits(table)


@pytest.mark.parametrize("family", ["gravity", "unit_conversion", "cipher", "bit_manipulation"])
def test_nano_feature_is_the_only_difference_between_rates(family):
    low, high = random.Random(13), random.Random(13)
    for _ in range(200):
        plain, cued = draw(family, low, difficulty="nano"), draw(family, high, difficulty="nano", cue_rate=0.9)
        assert plain.answer == cued.answer
        assert plain.prompt.replace(f" {plain.rule['cue']}", "?") == cued.prompt.replace(f" {cued.rule['cue']}", "?")


def test_half_the_rate_cues_half_the_rows():
    rules = rules_at("gravity", "nano", 0.5)
    order = {body: k for rule in rules_at("gravity", "nano", 1.0) for body, k in [(rule["cue"], rule["k"])]}
    hits = sum(order[rule["cue"]] == rule["k"] for rule in rules) / NUM_ROWS
    assert abs(hits - (0.5 + 0.5 / 9)) < 0.037  # 4 sigma


@pytest.mark.parametrize("rate", [-0.1, 1.1, 90, float("nan")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rate_outside_0_1_is_refused(family, rate):
    with pytest.raises(ValueError, match="cue_rate"):
        draw(family, random.Random(0), difficulty="nano", cue_rate=rate)
