"""Equation puzzles: operator glyphs whose meaning is hidden.

Nano: operands 1..6, two glyphs a row, each with one of five rules; the query's glyph is seen in one or two of the three
examples, whose operands all differ. So the answer is forced in 92 % of the rows (87 % where it is seen once). The trace
is the code of that glyph's rule.

Challenge: five characters `AB?CD`, operands 10..99, up to three glyphs a row. A row has one mode (flip: operands and
result are printed backwards) and three slots, add, sub and mul, with one rule and one glyph each; in the add and mul
slots the rule may be a join of the operands. Either the slots have the plain glyphs `+`, `-`, `*`, or all three glyphs
are drawn at random. Every line draws its slot anew, so a query's glyph may be unseen. Symbolic rows print each digit
as a symbol of the row. A sign is printed as the operator's glyph, at the place its rule says. The four sub-families
are numeric or symbolic ("cryptarithm"), deduce (the query's glyph occurs in the examples) or guess.

Cue. Nano: a glyph takes its canonical rule (`+ @` add, `- #` absolute difference, `* $` multiply) instead of a uniform
one; the glyphs are drawn the same way either way. Challenge: the query's glyph stands for one of the 26 pairs of mode
and rule, and the row's mode and other rules are drawn around it. At cue rate 0 the only tie between glyph and rule is
that of the published rows: a plain glyph has its own slot.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_evolve.substrate.puzzles.frame import Frame
from megatron_evolve.substrate.puzzles.row import Row

FAMILY = "equation"
PLAIN_GLYPHS = "+-*"
SYMBOLS = "!\"#$%&'()/:<>?@[\\]^`{|}"
SLOTS = ("add", "sub", "mul")


@dataclass(frozen=True)
class NanoKnobs:
    glyphs: str = "+-*@#$"
    operand_max: int = 6
    rules: tuple[str, ...] = ("+", "-", "*", "+1", "*1")
    canonical: str = "+-*+-*"  # rule of each glyph when cued
    # Which of the row's two glyphs (0 is the query's) stands in each example.
    patterns: tuple[tuple[int, int, int], ...] = ((0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))


@dataclass(frozen=True)
class ChallengeKnobs:
    symbolic: float = 823 / 1555  # share of the published rows
    flip: float = 485 / 727  # of the numeric rows whose mode can be told
    # Share of rows with the plain glyphs in their own slots, from rows that show all three slots: 70 of 205 numeric
    # ones, 147 of 254 symbolic ones. It also explains how many plain glyphs the other rows show.
    plain_numeric: float = 0.34
    plain_symbolic: float = 0.58
    num_examples: tuple[int, int] = (3, 5)


NANO = NanoKnobs()
CHALLENGE = ChallengeKnobs()

# Mode -> slot -> rule -> weight: how often each rule explains a glyph in the 732 published numeric rows; a join's count
# is shared equally by the two slots where it can stand.
WEIGHTS = {
    "normal": {
        "add": {"add": 59, "add+1": 56, "add-1": 47, "join": 42, "join_swap": 1.5},
        "sub": {"sub": 68, "absdiff": 52, "absdiff_prefix": 51, "maxmodmin": 46},
        "mul": {"mul": 76, "mul+1": 43, "mul-1": 47, "join": 42, "join_swap": 1.5},
    },
    "flip": {
        "add": {"add": 215, "add+1": 65, "add-1": 52, "join": 13, "join_swap": 59},
        "sub": {
            "sub_prefix": 170,
            "sub_suffix": 52,
            "absdiff": 63,
            "absdiff_prefix": 57,
            "absdiff_suffix": 13,
            "maxmodmin": 56,
        },
        "mul": {"mul": 189, "mul+1": 77, "mul-1": 69, "join": 13, "join_swap": 59},
    },
}

FRAME = Frame(
    header="In Alice's Wonderland, a secret set of transformation rules is applied to equations. "
    "Below are a few examples:",
    example="{left} = {right}",
    query="Now, determine the result for: {query}",
    left=r"[!-~]{5}",
    right=r"[!-~]{1,4}",
)


def nano_result(rule: str, a: int, b: int) -> int:
    """The nano rule with code `rule` on operands a and b."""
    if rule == "-":
        return abs(a - b)
    value = a + b if rule[0] == "+" else a * b
    return value + 1 if rule[1:] else value


def draw_nano(rng: random.Random, cue_rate: float) -> Row:
    """A nano row: three examples, operands of all lines distinct pairs."""
    rules = []
    codes = rng.sample(range(len(NANO.glyphs)), 2)
    for code in codes:
        rule = NANO.rules[int(rng.random() * len(NANO.rules))]
        rules.append(NANO.canonical[code] if rng.random() < cue_rate else rule)
    glyphs = [NANO.glyphs[code] for code in codes]
    lines = []
    pattern = NANO.patterns[int(rng.random() * len(NANO.patterns))]
    *shown, asked = rng.sample(range(NANO.operand_max**2), len(pattern) + 1)
    for which, pair in zip(pattern, shown, strict=True):
        a, b = 1 + pair // NANO.operand_max, 1 + pair % NANO.operand_max
        lines.append(f"{a}{glyphs[which]}{b} = {nano_result(rules[which], a, b)}\n")
    a, b = 1 + asked // NANO.operand_max, 1 + asked % NANO.operand_max
    prompt = f"equation\n{''.join(lines)}Q {a}{glyphs[0]}{b}"
    answer = str(nano_result(rules[0], a, b))
    traces = {"answer": "", "short-trace": rules[0]}
    rule_record = {"rules": dict(zip(glyphs, rules, strict=True)), "cue": glyphs[0]}
    return Row(FAMILY, FAMILY, "nano", prompt, answer, traces, rule_record, prompt)


def printed(number: int, mode: str) -> str:
    """A non-negative number as `mode` prints it (flip keeps zeros that come to the front)."""
    return str(number)[::-1] if mode == "flip" else str(number)


def challenge_result(mode: str, rule: str, x: int, y: int, glyph: str) -> str:
    """The printed result, in digits, of one of the 24 rules on operands x and y in 10..99."""
    if rule == "join":
        return printed(x, mode) + printed(y, mode)
    if rule == "join_swap":
        return printed(y, mode) + printed(x, mode)
    if rule[:3] in ("add", "mul"):
        value = x + y if rule[:3] == "add" else x * y
        return printed(value + int(rule[3:] or 0), mode)
    if rule == "maxmodmin":
        return printed(max(x, y) % min(x, y), mode)
    difference = printed(abs(x - y), mode)
    if (rule in ("sub", "sub_prefix") and x < y) or (rule == "absdiff_prefix" and x != y):
        return glyph + difference
    if (rule == "sub_suffix" and y < x) or (rule == "absdiff_suffix" and x != y):
        return difference + glyph
    return difference


def _cued_rules() -> dict[str, tuple[str, str, str]]:
    """Glyph -> (mode, slot, rule): one glyph for each pair of mode and rule, the plain glyphs in their own slots."""
    plain = {"+": ("flip", "add", "add"), "-": ("flip", "sub", "sub_prefix"), "*": ("flip", "mul", "mul")}
    others = [
        (mode, slot, rule)
        for mode, slots in WEIGHTS.items()
        for slot, rules in slots.items()
        for rule in rules
        if (mode, slot, rule) not in plain.values() and not (slot == "mul" and rule in ("join", "join_swap"))
    ]
    return plain | dict(zip(SYMBOLS, others, strict=True))


CUED_RULES = _cued_rules()


def _draw_rule(rng: random.Random, mode: str, slot: str) -> str:
    weights = WEIGHTS[mode][slot]
    return rng.choices(tuple(weights), tuple(weights.values()))[0]


def subfamily_of(examples: Sequence[tuple[str, str]], query: str) -> str:
    """The sub-family of a challenge prompt, from what it shows: digits or symbols, query's glyph seen or not."""
    kind = "equation_numeric" if (query[:2] + query[3:]).isdigit() else "cryptarithm"
    return f"{kind}_deduce" if any(left[2] == query[2] for left, _ in examples) else f"{kind}_guess"


def instance(examples: Sequence[tuple[str, str]], query: str, answer: str) -> str:
    """The instance of a challenge row: its lines with glyphs and symbols renamed, in whatever order the examples stand.

    Names are given in order of appearance, to the asked line first and then always to the example that reads smallest
    by the names so far; where several read alike, each is tried. So it is the smallest text of all orders.
    """
    asked, names = _renamed(query + answer, {})
    lines, orders = [asked], [(names, [left + right for left, right in examples])]
    for _ in examples:
        found = [(*_renamed(line, names), rest, at) for names, rest in orders for at, line in enumerate(rest)]
        lines.append(min(text for text, *_ in found))
        orders = [(names, rest[:at] + rest[at + 1 :]) for text, names, rest, at in found if text == lines[-1]]
    return f"{FAMILY}|{' '.join(lines)}"


def _renamed(line: str, names: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """A line under `names`, and these with its new characters. A digit is its own name."""
    named = dict(names)
    for character in line:
        if character not in named:
            named[character] = character if character.isdigit() else chr(ord("a") + len(named))
    return "".join([named[character] for character in line]), named


def draw_challenge(rng: random.Random, cue_rate: float) -> Row:
    """A challenge row of one of the four sub-families: three to five examples, operands of all lines distinct pairs."""
    symbolic = rng.random() < CHALLENGE.symbolic
    digit_symbols = rng.sample(SYMBOLS, 10)
    free = [glyph for glyph in SYMBOLS + PLAIN_GLYPHS if glyph not in digit_symbols]
    glyphs = rng.sample(free, len(SLOTS))
    if rng.random() < (CHALLENGE.plain_symbolic if symbolic else CHALLENGE.plain_numeric):
        glyphs = list(PLAIN_GLYPHS)
    mode = "flip" if rng.random() < CHALLENGE.flip else "normal"
    num_lines = rng.randint(*CHALLENGE.num_examples) + 1
    line_glyphs = [rng.choice(glyphs) for _ in range(num_lines)]
    pairs = [divmod(pair, 90) for pair in rng.sample(range(90 * 90), num_lines)]

    asked = line_glyphs[-1]
    slots = dict(zip(glyphs, SLOTS, strict=True))
    cued = rng.random() < cue_rate
    if cued:
        mode, slot, cued_rule = CUED_RULES[asked]
        slots[glyphs[SLOTS.index(slot)]], slots[asked] = slots[asked], slot
    rules = {glyph: _draw_rule(rng, mode, slots[glyph]) for glyph in glyphs}
    if cued:
        rules[asked] = cued_rule

    table = str.maketrans("0123456789", "".join(digit_symbols)) if symbolic else {}
    lines = []
    for glyph, (tens, units) in zip(line_glyphs, pairs, strict=True):
        x, y = 10 + tens, 10 + units
        left = printed(x, mode).translate(table) + glyph + printed(y, mode).translate(table)
        lines.append((left, challenge_result(mode, rules[glyph], x, y, glyph).translate(table)))
    *examples, (query, answer) = lines
    record = {
        "mode": mode,
        "rules": {glyph: rules[glyph] for glyph in dict.fromkeys(line_glyphs)},
        "digits": "".join(digit_symbols) if symbolic else None,
        "cue": asked,
    }
    return Row(
        FAMILY,
        subfamily_of(examples, query),
        "challenge",
        FRAME.render(examples, query),
        answer,
        {"answer": ""},
        record,
        instance(examples, query, answer),
    )
