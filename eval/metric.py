r"""The metric: from a completion to an answer, and from an answer to right or wrong.

This is the released metric of the NVIDIA Nemotron Model Reasoning Challenge (Kaggle competition 129716) as revised in
May 2026: the last box wins, braces inside an answer are kept, and binary answers are compared as text. The rules are
kept exactly, odd ones included, because a score is only worth comparing if everybody computes it alike. Beside the
official score stand two of our own: exact text (the tolerance of one per cent hides off-by-one rules) and whether
there was a box at all.
"""

import math
import re

# Part of every comparison key. Change it with any change of behaviour below.
METRIC_VERSION = "nemotron-reasoning/2026-05"

NOT_FOUND = "NOT_FOUND"
RELATIVE_TOLERANCE = 1e-2
ABSOLUTE_TOLERANCE = 1e-5

_BOX = re.compile(r"\\boxed\{")
_BINARY = re.compile(r"[01]+")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
# Tried in this order; only the last knows the full-width colon. `\s*` may run over a line break, as it does there.
_PHRASES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"The final answer is:\s*([^\n]+)",
        r"Final answer is:\s*([^\n]+)",
        r"Final answer\s*[:：]\s*([^\n]+)",
    )
)


def has_box(text: str) -> bool:
    r"""Whether `text` opens a `\boxed{` at all; without one the answer is guessed from phrases and numbers."""
    return _BOX.search(text) is not None


def extract(text: str | None) -> str:
    r"""The answer a completion gives, `NOT_FOUND` if it gives none.

    A box reaches from `\boxed{` to the last `}` before the next `\boxed{` (or the end of the text), so any brace after
    the final box becomes part of the answer: the box must be the last thing emitted. The last non-empty box counts.
    Without a box: the last "final answer" phrase, else the last number, else the last line that is not blank.
    """
    if text is None:
        return NOT_FOUND
    boxes = [_inside(segment) for segment in _BOX.split(text)[1:]]
    if boxes:
        return next((box for box in reversed(boxes) if box), "")
    for phrase in _PHRASES:
        if found := phrase.findall(text):
            return found[-1].strip()
    if numbers := _NUMBER.findall(text):
        return numbers[-1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else NOT_FOUND


def _inside(segment: str) -> str:
    end = segment.rfind("}")
    return (segment if end < 0 else segment[:end]).strip()


def verify(gold: str, prediction: str) -> bool:
    """The official comparison of an extracted answer with the right one.

    A gold of zeros and ones only is compared as text, width included. Otherwise two texts that Python reads as floats
    ('1e3' and '1000', '03' and '3'; not the Unicode minus) agree within one per cent, and any others ignoring case.
    """
    gold, prediction = gold.strip(), prediction.strip()
    if _BINARY.fullmatch(gold):
        return prediction == gold
    try:
        numbers = float(gold), float(prediction)
    except ValueError:
        return prediction.lower() == gold.lower()
    return math.isclose(*numbers, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)


def exact(gold: str, prediction: str) -> bool:
    """Character for character, apart from surrounding blanks. Stricter than the official score; reported beside it."""
    return gold.strip() == prediction.strip()
