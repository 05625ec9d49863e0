"""Rows as lines of JSON: written so that a strict reader takes them, read past whatever else a process prints."""

import json
import math


def line_of(row: dict) -> str:
    """One line; a number that is none (NaN, infinite) is null, for JSON has no word for it."""
    return json.dumps(_sayable(row), allow_nan=False)


def _sayable(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _sayable(one) for key, one in value.items()}
    return [_sayable(one) for one in value] if isinstance(value, list | tuple) else value


def row_of(line: str) -> dict | None:
    """The row in a line of another process; None where it has none: half a line, or a compiler's own printing.

    Triton prints the whole PTX where ptxas fails, and one line of that is a brace.
    """
    if not line.startswith("{"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
