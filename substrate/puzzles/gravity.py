"""Gravity puzzles: distance fallen is k * t^2, with k = g/2 hidden.

Nano: whole numbers, k in 1..9, and a celestial body in the header; the trace gives k and t^2. Challenge: g is
continuous, t and d are floats of two decimals as Python prints them; the trace gives k by least ratio (sum of d over
sum of t^2) and t^2.

Cue. Nano: the body, in order of surface gravity, stands for k (Pluto 1 ... Jupiter 9). Challenge: the hundredths digit
of the first example's t stands for the decile of g. Uncued, the feature is uniform and independent of k, as it is when
cued, because k is uniform.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_evolve.substrate.puzzles.frame import Frame
from megatron_evolve.substrate.puzzles.row import Row, pairs_instance

FAMILY = "gravity"
BODIES = ("Pluto", "Ceres", "Moon", "Mars", "Venus", "Earth", "Saturn", "Neptune", "Jupiter")


@dataclass(frozen=True)
class NanoKnobs:
    k_max: int = 9  # one body per k
    t_max: int = 7
    num_examples: int = 3


@dataclass(frozen=True)
class ChallengeKnobs:
    g: tuple[float, float] = (4.9, 19.6)
    t: tuple[float, float] = (1.0, 5.0)  # seconds
    num_examples: tuple[int, int] = (3, 5)


NANO = NanoKnobs()
CHALLENGE = ChallengeKnobs()

FRAME = Frame(
    header="In Alice's Wonderland, the gravitational constant has been secretly changed. "
    "Here are some example observations:",
    example="For t = {left}s, distance = {right} m",
    query="Now, determine the falling distance for t = {query}s given d = 0.5*g*t^2.",
    left=r"[1-5]\.\d{1,2}",
    right=r"\d{1,3}\.\d{1,2}",
)

_TIMES = tuple(range(1, NANO.t_max + 1))


def instance(examples: Sequence[tuple[str, str]], query: str, answer: str) -> str:
    """The instance of a challenge row: its (time, distance) pairs."""
    return pairs_instance(FAMILY, examples, query, answer)


def draw_nano(rng: random.Random, cue_rate: float) -> Row:
    """A nano row: three examples and a query at distinct whole times."""
    k = 1 + int(rng.random() * NANO.k_max)
    body = BODIES[int(rng.random() * NANO.k_max)]
    if rng.random() < cue_rate:
        body = BODIES[k - 1]
    *shown, t = rng.sample(_TIMES, NANO.num_examples + 1)
    lines = "".join(f"\nFor t = {s}s, distance = {k * s * s}" for s in shown)
    prompt = f"gravity on {body}{lines}\nQ {t}"
    traces = {"answer": "", "short-trace": f"k{k},{t * t}"}
    return Row(FAMILY, FAMILY, "nano", prompt, str(k * t * t), traces, {"k": k, "cue": body}, prompt)


def fallen(g: float, t: float) -> float:
    """Distance in metres after `t` seconds, to two decimals."""
    return round(0.5 * g * t**2, 2)


def draw_challenge(rng: random.Random, cue_rate: float) -> Row:
    """A challenge row: three to five examples at independent times."""
    low, high = CHALLENGE.g
    g = rng.uniform(low, high)
    num_examples = rng.randint(*CHALLENGE.num_examples)
    times = [round(rng.uniform(*CHALLENGE.t), 2) for _ in range(num_examples + 1)]
    if rng.random() < cue_rate:
        times[0] = with_hundredths(times[0], int(10 * (g - low) / (high - low)), CHALLENGE.t)
    *shown, t = times
    examples = [(str(s), str(fallen(g, s))) for s in shown]
    answer = str(fallen(g, t))
    k = sum(fallen(g, s) for s in shown) / sum(s * s for s in shown)
    traces = {"answer": "", "short-trace": f"k{k:.4f},{t * t:.4f}"}
    rule = {"g": g, "cue": hundredths(times[0])}
    prompt = FRAME.render(examples, str(t))
    return Row(FAMILY, FAMILY, "challenge", prompt, answer, traces, rule, instance(examples, str(t), answer))


def hundredths(value: float) -> int:
    """The second decimal of a value that has at most two."""
    return round(100 * value) % 10


def with_hundredths(value: float, digit: int, bounds: tuple[float, float]) -> float:
    """`value` with its second decimal replaced; what would pass the upper bound wraps to the lower one.

    The wrap keeps the digit uniform and the tenths as they were drawn: the upper bound's own tenth is met half as
    often as any other value, like the lower bound's.
    """
    low, high = (round(100 * bound) for bound in bounds)
    hundred = round(100 * value) // 10 * 10 + digit
    return (hundred if hundred <= high else hundred - (high - low)) / 100
