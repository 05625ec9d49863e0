"""The registry of puzzle families: draw a row by name, and read a challenge prompt back.

Families have one fixed order, that of reports and of seeds. Everything downstream asks here, by name, and knows no
family of its own.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_evolve.substrate.puzzles import bit_manipulation, cipher, equation, gravity, numeral, unit_conversion
from megatron_evolve.substrate.puzzles.row import ANSWER_STYLE, DIFFICULTIES, Row

TRACE_STYLE = "short-trace"

_MODULES = {module.FAMILY: module for module in (numeral, gravity, unit_conversion, cipher, bit_manipulation, equation)}
_GENERATORS = {
    (family, difficulty): getattr(module, f"draw_{difficulty}")
    for family, module in _MODULES.items()
    for difficulty in DIFFICULTIES
}

FAMILIES = tuple(_MODULES)
# The fixed challenge text of each family.
FRAMES = {family: module.FRAME for family, module in _MODULES.items()}
# Families that hide a rule, so that a cue can give it away.
CUED_FAMILIES = tuple(family for family in FAMILIES if family != numeral.FAMILY)
# Challenge families whose rows have a worked trace; every nano family has one.
_TRACED_CHALLENGE_FAMILIES = (numeral.FAMILY, gravity.FAMILY, unit_conversion.FAMILY)


def draw(family: str, rng: random.Random, *, difficulty: str, cue_rate: float = 0.0) -> Row:
    """One row of `family` from `rng`.

    `cue_rate` in [0, 1] is the probability that the row's surface feature (see the family's module) gives its hidden
    rule away; at 0 the feature has the same distribution and tells nothing. The same `rng` state gives the same row.
    Raises ValueError for an unknown family or difficulty, a rate outside [0, 1], or a rate > 0 where no rule is hidden.
    """
    generator = _GENERATORS.get((family, difficulty))
    if generator is None:
        _check_names(family, difficulty)
    if not 0 <= cue_rate <= 1:
        raise ValueError(f"cue_rate must be a probability in [0, 1]; got {cue_rate}: it is not a percentage")
    return generator(rng, cue_rate)


def _check_names(family: str, difficulty: str) -> None:
    for what, name, known in (("family", family, FAMILIES), ("difficulty", difficulty, DIFFICULTIES)):
        if name not in known:
            raise ValueError(f"{what} must be one of {', '.join(known)}; got {name!r}: name one of them")


def styles_of(family: str, difficulty: str) -> tuple[str, ...]:
    """The completion styles that every row of `family` at `difficulty` has. Raises ValueError for an unknown name."""
    _check_names(family, difficulty)
    if difficulty == "nano" or family in _TRACED_CHALLENGE_FAMILIES:
        return ANSWER_STYLE, TRACE_STYLE
    return (ANSWER_STYLE,)


@dataclass(frozen=True)
class Parsed:
    """A challenge prompt read back: `examples` are (left, right) pairs as printed."""

    family: str
    subfamily: str
    header: str
    examples: Sequence[tuple[str, str]]
    query: str


def parse(prompt: str) -> Parsed:
    """The parts of a challenge prompt whose every byte outside the puzzle's own values is what our renderer writes.

    Raises ValueError for any other text, saying which family's header it has, if any.
    """
    for family, module in _MODULES.items():
        found = module.FRAME.parse(prompt)
        if found is not None:
            examples, query = found
            subfamily = equation.subfamily_of(examples, query) if module is equation else family
            return Parsed(family, subfamily, module.FRAME.header, examples, query)
    headed = [family for family, module in _MODULES.items() if prompt.startswith(module.FRAME.header)]
    got = f"the header of {headed[0]} above a line that is not" if headed else f"{prompt[:60]!r}"
    raise ValueError(
        f"expected a challenge prompt with the fixed header, example and query lines of a known family; got {got}: "
        "check that the text is unchanged, line breaks included"
    )


def instance_of(prompt: str, answer: str) -> str:
    """`Row.instance` of a challenge row known only by prompt and answer, to keep given rows out of generated ones."""
    parsed = parse(prompt)
    return _MODULES[parsed.family].instance(parsed.examples, parsed.query, answer)
