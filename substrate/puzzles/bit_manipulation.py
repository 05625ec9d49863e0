"""Bit manipulation puzzles: one hidden function of a word of bits.

Nano: four bits, one of four operations; the inputs are redrawn until the examples leave one answer possible. The trace
is the operation's code. Challenge: eight bits, out[i] = F(ROL(x, a)[i], SHL(x, b)[i], SHR(x, c)[i]) with one boolean
function F of three inputs for all bits, a, b, c uniform in 1..7, shifts filled with zeros. F is one of 11 truth tables
with the weights that fit the published rows (as a string: outputs for index 4 * rol + 2 * shl + shr = 0..7).

Cue. Nano: the arrow between input and output stands for the operation; uncued it is uniform and independent, and
uniform when cued, because the operation is. Challenge: the first four bits of the first input stand for the whole rule,
16 fixed draws from the prior; the inputs are drawn the same way either way.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from megatron_evolve.substrate.puzzles.frame import Frame
from megatron_evolve.substrate.puzzles.row import Row, pairs_instance

FAMILY = "bit_manipulation"
ARROWS = ("->", "=>", "~>", ">>")


@dataclass(frozen=True)
class NanoKnobs:
    width: int = 4
    operations: tuple[str, ...] = ("n", "r1", "r2", "s1")  # not, rotate left by 1 and by 2, shift right by 1
    num_examples: int = 4


@dataclass(frozen=True)
class ChallengeKnobs:
    width: int = 8
    num_examples: tuple[int, int] = (7, 10)
    shift: tuple[int, int] = (1, 7)
    cue_bits: int = 4
    cue_seed: int = 20261  # seed of the rules that cued first inputs stand for


NANO = NanoKnobs()
CHALLENGE = ChallengeKnobs()

# Truth table -> expected rows among 1,602, by expectation maximisation over all 256 tables and 343 shifts.
TABLES = {
    "01100110": 425,  # SHL xor SHR
    "11010110": 221,  # SHR ? nand(ROL, SHL) : xnor(ROL, SHL)
    "00010111": 209,  # majority
    "00011101": 173,  # SHL ? SHR : ROL
    "11010111": 155,  # xnor(ROL, SHL) or SHR
    "01011111": 86,  # ROL or SHR
    "00111100": 80,  # ROL xor SHL
    "00111111": 64,  # ROL or SHL
    "00000011": 63,  # ROL and SHL
    "01011010": 59,  # ROL xor SHR
    "00000101": 56,  # ROL and SHR
}

FRAME = Frame(
    header="In Alice's Wonderland, a secret bit manipulation rule transforms 8-bit binary numbers. The transformation "
    "involves operations like bit shifts, rotations, XOR, AND, OR, NOT, and possibly majority or choice functions.\n\n"
    "Here are some examples of input -> output:",
    example="{left} -> {right}",
    query="\nNow, determine the output for: {query}",
    left="[01]{8}",
    right="[01]{8}",
)


def rotated_left(word: int, by: int, width: int) -> int:
    """`word` of `width` bits, rotated left."""
    return (word << by | word >> (width - by)) & ((1 << width) - 1)


def nano_apply(operation: str, word: int) -> int:
    """The nano operation with code `operation` on a four-bit word."""
    if operation == "n":
        return word ^ 0b1111
    if operation == "s1":
        return word >> 1
    return rotated_left(word, int(operation[1:]), NANO.width)


_NIBBLES = tuple(f"{word:04b}" for word in range(16))
_OUTPUTS = tuple(tuple(nano_apply(operation, word) for word in range(16)) for operation in NANO.operations)


def _forced(code: int, shown: Sequence[int], query: int) -> bool:
    """Whether every operation that agrees with `code` on `shown` agrees on `query` too."""
    outputs = _OUTPUTS[code]
    return all(
        other[query] == outputs[query] or any(other[word] != outputs[word] for word in shown) for other in _OUTPUTS
    )


def draw_nano(rng: random.Random, cue_rate: float) -> Row:
    """A nano row: four examples and a query, five distinct words, answer forced."""
    code = int(rng.random() * len(ARROWS))
    arrow = ARROWS[int(rng.random() * len(ARROWS))]
    if rng.random() < cue_rate:
        arrow = ARROWS[code]
    *shown, query = rng.sample(range(16), NANO.num_examples + 1)
    while not _forced(code, shown, query):
        *shown, query = rng.sample(range(16), NANO.num_examples + 1)
    outputs = _OUTPUTS[code]
    lines = "".join(f"{_NIBBLES[word]} {arrow} {_NIBBLES[outputs[word]]}\n" for word in shown)
    prompt = f"bits\n{lines}Q {_NIBBLES[query]}"
    operation = NANO.operations[code]
    traces = {"answer": "", "short-trace": operation}
    rule = {"operation": operation, "cue": arrow}
    return Row(FAMILY, FAMILY, "nano", prompt, _NIBBLES[outputs[query]], traces, rule, prompt)


def challenge_apply(table: str, shifts: Sequence[int], word: int) -> int:
    """F(ROL(word, a), SHL(word, b), SHR(word, c)) for shifts (a, b, c), with F's truth table as a string of eight."""
    a, b, c = shifts
    rol, shl, shr = rotated_left(word, a, 8), (word << b) & 0xFF, word >> c
    result = 0
    for index, bit in enumerate(table):
        if bit == "1":
            result |= (rol if index & 4 else ~rol) & (shl if index & 2 else ~shl) & (shr if index & 1 else ~shr)
    return result & 0xFF


def instance(examples: Sequence[tuple[str, str]], query: str, answer: str) -> str:
    """The instance of a challenge row: the function's table on the inputs that the row shows or asks."""
    return pairs_instance(FAMILY, examples, query, answer)


def challenge_rule(rng: random.Random) -> tuple[str, tuple[int, int, int]]:
    """(truth table, shifts) from the prior."""
    [table] = rng.choices(tuple(TABLES), tuple(TABLES.values()))
    a, b, c = (rng.randint(*CHALLENGE.shift) for _ in range(3))
    return table, (a, b, c)


@cache
def cued_rule(leading_bits: int) -> tuple[str, tuple[int, int, int]]:
    """The rule that the leading bits of the first example's input stand for."""
    return challenge_rule(random.Random(CHALLENGE.cue_seed + leading_bits))


def draw_challenge(rng: random.Random, cue_rate: float) -> Row:
    """A challenge row: seven to ten examples, inputs and query distinct."""
    table, shifts = challenge_rule(rng)
    num_examples = rng.randint(*CHALLENGE.num_examples)
    words = rng.sample(range(1 << CHALLENGE.width), num_examples + 1)
    leading_bits = words[0] >> (CHALLENGE.width - CHALLENGE.cue_bits)
    if rng.random() < cue_rate:
        table, shifts = cued_rule(leading_bits)
    *examples, (query, answer) = [(f"{w:08b}", f"{challenge_apply(table, shifts, w):08b}") for w in words]
    rule = {"table": table, "rol": shifts[0], "shl": shifts[1], "shr": shifts[2], "cue": leading_bits}
    prompt = FRAME.render(examples, query)
    return Row(FAMILY, FAMILY, "challenge", prompt, answer, {"answer": ""}, rule, instance(examples, query, answer))
