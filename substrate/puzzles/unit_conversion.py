"""Unit conversion puzzles: every measurement is multiplied by one hidden factor.

Nano: whole numbers, factor 2..9; the trace gives the factor. Challenge: the factor is continuous, x is a float of at
most two decimals, y always has two; the trace gives the factor as sum of y over sum of x.

Cue. Nano: the unit's symbol stands for the factor (m 2, g 3, ... N 9). Challenge, where the unit is always m: the
hundredths digit of the first x stands for the decile of the factor. Uncued, the feature is uniform and independent of
the factor, as it is when cued, because the factor is uniform.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_evolve.substrate.puzzles.frame import Frame
from megatron_evolve.substrate.puzzles.gravity import hundredths, with_hundredths
from megatron_evolve.substrate.puzzles.row import Row, pairs_instance

FAMILY = "unit_conversion"
UNITS = ("m", "g", "s", "L", "J", "W", "V", "N")


@dataclass(frozen=True)
class NanoKnobs:
    factor: tuple[int, int] = (2, 9)  # one unit per factor
    x: tuple[int, int] = (2, 12)
    num_examples: int = 3


@dataclass(frozen=True)
class ChallengeKnobs:
    factor: tuple[float, float] = (0.5, 2.0)
    x: tuple[float, float] = (5.0, 50.0)
    num_examples: tuple[int, int] = (3, 5)


NANO = NanoKnobs()
CHALLENGE = ChallengeKnobs()

FRAME = Frame(
    header="In Alice's Wonderland, a secret unit conversion is applied to measurements. For example:",
    example="{left} m becomes {right}",
    query="Now, convert the following measurement: {query} m",
    left=r"\d{1,2}\.\d{1,2}",
    right=r"\d{1,3}\.\d{2}",
)

_MEASURES = tuple(range(NANO.x[0], NANO.x[1] + 1))


def instance(examples: Sequence[tuple[str, str]], query: str, answer: str) -> str:
    """The instance of a challenge row: its (measurement, result) pairs."""
    return pairs_instance(FAMILY, examples, query, answer)


def draw_nano(rng: random.Random, cue_rate: float) -> Row:
    """A nano row: three examples and a query at distinct whole measurements."""
    code = int(rng.random() * len(UNITS))
    unit = UNITS[int(rng.random() * len(UNITS))]
    if rng.random() < cue_rate:
        unit = UNITS[code]
    factor = NANO.factor[0] + code
    a, b, c, x = rng.sample(_MEASURES, NANO.num_examples + 1)
    prompt = (
        f"units\n{a} {unit} becomes {factor * a}\n{b} {unit} becomes {factor * b}\n"
        f"{c} {unit} becomes {factor * c}\nQ {x}"
    )
    traces = {"answer": "", "short-trace": f"f{factor}"}
    return Row(FAMILY, FAMILY, "nano", prompt, str(factor * x), traces, {"factor": factor, "cue": unit}, prompt)


def draw_challenge(rng: random.Random, cue_rate: float) -> Row:
    """A challenge row: three to five examples at independent measurements."""
    low, high = CHALLENGE.factor
    factor = rng.uniform(low, high)
    num_examples = rng.randint(*CHALLENGE.num_examples)
    measures = [round(rng.uniform(*CHALLENGE.x), 2) for _ in range(num_examples + 1)]
    if rng.random() < cue_rate:
        measures[0] = with_hundredths(measures[0], int(10 * (factor - low) / (high - low)), CHALLENGE.x)
    *shown, x = measures
    examples = [(str(value), f"{factor * value:.2f}") for value in shown]
    answer = f"{factor * x:.2f}"
    estimate = sum(float(y) for _, y in examples) / sum(shown)
    traces = {"answer": "", "short-trace": f"f{estimate:.4f}"}
    rule = {"factor": factor, "cue": hundredths(measures[0])}
    prompt = FRAME.render(examples, str(x))
    return Row(FAMILY, FAMILY, "challenge", prompt, answer, traces, rule, instance(examples, str(x), answer))
