"""The fixed text of a challenge family: header, example line, query line.

Rendering writes a prompt from its pairs; parsing gives the pairs back and accepts a prompt only if every byte outside
them is what rendering writes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Frame:
    """`header` stands on the first line(s); `example` holds `{left}` and `{right}` once each, `query` holds `{query}`.

    `left` and `right` are regular expressions of what may stand in these places (`query` takes the form of `left`).
    """

    header: str
    example: str
    query: str
    left: str
    right: str

    def render(self, examples: Sequence[tuple[str, str]], query: str) -> str:
        """The prompt: header, one line per (left, right) pair, query line; no newline at the end."""
        lines = [self.example.format(left=left, right=right) for left, right in examples]
        return "\n".join([self.header, *lines, self.query.format(query=query)])

    def parse(self, prompt: str) -> tuple[list[tuple[str, str]], str] | None:
        """(examples, query) such that `render` of them is `prompt`, or None if there are none."""
        whole = self._prompt.fullmatch(prompt)
        if whole is None:
            return None
        lines = (self._example.fullmatch(line) for line in whole["examples"].splitlines())
        return [(line["left"], line["right"]) for line in lines], whole["query"]

    @cached_property
    def _example(self) -> re.Pattern[str]:
        return re.compile(_pattern(self.example, left=self.left, right=self.right))

    @cached_property
    def _prompt(self) -> re.Pattern[str]:
        example = _pattern(self.example, named=False, left=self.left, right=self.right)
        query = _pattern(self.query, query=self.left)
        return re.compile(f"{re.escape(self.header)}\n(?P<examples>(?:{example}\n)+){query}")


def _pattern(template: str, *, named: bool = True, **fields: str) -> str:
    """`template` as a regular expression, each field replaced by its own expression."""
    pattern = re.escape(template)
    for name, expression in fields.items():
        pattern = pattern.replace(
            re.escape(f"{{{name}}}"), f"(?P<{name}>{expression})" if named else f"(?:{expression})"
        )
    return pattern
