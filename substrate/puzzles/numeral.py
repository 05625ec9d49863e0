"""Numeral puzzles: Arabic numbers become Roman ones.

The rule is known, nothing is hidden, so there is no cue: a `cue_rate` other than 0 is refused. Numbers are independent
draws, a query may repeat an example. The trace writes the numeral by decimal place (`CCC,LXX,IV`, places may be empty).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_evolve.substrate.puzzles.frame import Frame
from megatron_evolve.substrate.puzzles.row import Row

FAMILY = "numeral"


@dataclass(frozen=True)
class NanoKnobs:
    num_max: int = 399  # 99 saturates within 400 steps of the nano model
    num_examples: int = 2


@dataclass(frozen=True)
class ChallengeKnobs:
    num_max: int = 100
    num_examples: tuple[int, int] = (3, 5)


NANO = NanoKnobs()
CHALLENGE = ChallengeKnobs()

FRAME = Frame(
    header="In Alice's Wonderland, numbers are secretly converted into a different numeral system. "
    "Some examples are given below:",
    example="{left} -> {right}",
    query="Now, write the number {query} in the Wonderland numeral system.",
    left=r"[1-9]\d{0,2}",
    right="[IVXLC]+",
)

_ONES = ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX")
_TENS = ("", "X", "XX", "XXX", "XL", "L", "LX", "LXX", "LXXX", "XC")
_HUNDREDS = ("", "C", "CC", "CCC")


def places(number: int) -> tuple[str, str, str]:
    """Roman hundreds, tens and ones of `number` in 1..399."""
    return _HUNDREDS[number // 100], _TENS[number // 10 % 10], _ONES[number % 10]


def roman(number: int) -> str:
    """`number` in 1..399 as a Roman numeral with the usual subtractive forms."""
    return "".join(places(number))


def instance(examples: Sequence[tuple[str, str]], query: str, answer: str) -> str:
    """The instance of a challenge row: its whole prompt, since all 100 queries occur in any large set of rows.

    The examples are sorted: in another order they are the same question.
    """
    return f"{FAMILY}|{FRAME.render(sorted(examples), query)}"


def _check_cue_rate(cue_rate: float) -> None:
    if cue_rate != 0:
        raise ValueError(
            f"cue_rate of numeral must be 0, got {cue_rate}: the family hides no rule that a cue could give away; "
            "plant the cue in another family"
        )


def draw_nano(rng: random.Random, cue_rate: float) -> Row:
    """A nano row: two examples, numbers to 399."""
    _check_cue_rate(cue_rate)
    first, second, number = (1 + int(rng.random() * NANO.num_max) for _ in range(NANO.num_examples + 1))
    prompt = f"numeral\n{first} -> {roman(first)}\n{second} -> {roman(second)}\nQ {number}"
    return _row("nano", prompt, number, prompt)


def draw_challenge(rng: random.Random, cue_rate: float) -> Row:
    """A challenge row: three to five examples, numbers to 100."""
    _check_cue_rate(cue_rate)
    num_examples = rng.randint(*CHALLENGE.num_examples)
    *shown, number = (rng.randint(1, CHALLENGE.num_max) for _ in range(num_examples + 1))
    examples = [(str(n), roman(n)) for n in shown]
    prompt = FRAME.render(examples, str(number))
    return _row("challenge", prompt, number, instance(examples, str(number), roman(number)))


def _row(difficulty: str, prompt: str, number: int, instance_: str) -> Row:
    parts = places(number)
    trace = ",".join(parts if number >= 100 else parts[1:])
    return Row(
        FAMILY,
        FAMILY,
        difficulty,
        prompt,
        "".join(parts),
        {"answer": "", "short-trace": trace},
        {"n": number},
        instance_,
    )
