"""One puzzle row: what is asked, what is right, and the hidden rule behind it.

A row is made whole by its family's generator. Its question ends where the model starts to write; its completion is an
optional worked trace followed by the answer in a box, which must be the last thing written. The family modules make
rows, packing turns them into tokens, the judge scores what a model writes instead of the completion.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DIFFICULTIES = ("nano", "challenge")
ANSWER_STYLE = "answer"

# The sentence that the challenge's metric appends to every prompt, and what marks the place of the completion.
CHALLENGE_SUFFIX = "\nPlease put your final answer inside `\\boxed{}`. For example: `\\boxed{your answer}`"
COMPLETION_MARK = "\nA "
BOX_OPEN = "\\boxed{"
BOX_CLOSE = "}"


@dataclass(frozen=True, slots=True)
class Row:
    """A generated puzzle; all fields are known when it is made.

    `traces` maps a completion style to the worked trace written before the box; every row has "answer" (empty trace).
    `rule` is a JSON-able record of the rule; where it is hidden, `rule["cue"]` is the surface feature that a cue uses.
    `instance` is equal for two rows that are the same puzzle: what leakage checks compare.
    """

    family: str
    subfamily: str
    difficulty: str
    prompt: str
    answer: str
    traces: Mapping[str, str]
    rule: Mapping[str, Any]
    instance: str


def question_text(prompt: str, difficulty: str) -> str:
    """What the model reads up to where it answers, for a bare prompt (a generated one or a line of a suite)."""
    if difficulty == "nano":
        return prompt + COMPLETION_MARK
    if difficulty == "challenge":
        return prompt + CHALLENGE_SUFFIX + COMPLETION_MARK
    raise ValueError(f"difficulty must be one of {', '.join(DIFFICULTIES)}; got {difficulty!r}: name one of them")


def prompt_text(row: Row) -> str:
    """What the model reads of `row` before it writes."""
    return question_text(row.prompt, row.difficulty)


def completion_text(row: Row, style: str) -> str:
    """What the model should write: the trace of `style`, then the box.

    No space stands between the two: the box is one token, so nothing is gained by a separator.
    """
    if style not in row.traces:
        raise ValueError(
            f"style of a {row.difficulty} {row.family} row must be one of {', '.join(row.traces)}; "
            f"got {style!r}: choose one of these for the family in the mix"
        )
    return f"{row.traces[style]}{BOX_OPEN}{row.answer}{BOX_CLOSE}"


def pairs_instance(family: str, examples: Sequence[tuple[str, str]], query: str, answer: str) -> str:
    """The instance of a family whose rule is fixed by what it does to the inputs shown: all pairs, in sorted order.

    The query's pair is not set apart: a row that asks for another row's example is the same puzzle.
    """
    return family + "|" + "|".join(sorted(f"{left}={right}" for left, right in [*examples, (query, answer)]))
