"""Edits: the next policy as a list of typed changes, each with its reason and where in the evidence that stands.

A draft is written edit by edit; the policy that follows is the old one with the edits applied, so nothing can change
without an edit. Paths are dotted; an entry of a list is named by its `name` where it has one, by its index otherwise.
"""

import json
from typing import Any

from megatron_evolve.dead_ends import MOST_DEAD_ENDS
from megatron_evolve.evidence import Evidence
from megatron_evolve.policy import Edit, SearchPolicy, policy_digest, resolve_pointer


class Draft:
    """A policy being edited."""

    def __init__(self, policy: SearchPolicy) -> None:
        self._tree = _tree(policy)
        self._edits: list[Edit] = []

    def write(self, path: str, value: Any, reason: str, *pointers: str) -> None:
        """Sets `path`, and notes the edit; a value that stands there already is no edit. Raises ValueError."""
        value = json.loads(json.dumps(value))
        before = _write(self._tree, path, value)
        if before != value:
            cited = tuple(dict.fromkeys(pointers))
            self._edits.append(Edit(path=path, before=before, after=value, reason=reason, evidence=cited))

    def finished(self) -> tuple[SearchPolicy, tuple[Edit, ...]]:
        """The policy as edited, and its edits in the order they were made."""
        return SearchPolicy.parse(self._tree, where="next policy"), tuple(self._edits)


def apply_edits(policy: SearchPolicy, edits: tuple[Edit, ...]) -> SearchPolicy:
    """The policy after the edits. Raises ValueError if one has another `from` than stands there, or changes nothing."""
    tree = _tree(policy)
    for edit in edits:
        before = _write(tree, edit.path, edit.after)
        if before != edit.before:
            raise ValueError(
                f"edit of {edit.path}: expected {before!r} as `from`, got {edit.before!r}: write what stands there"
            )
        if before == edit.after:
            raise ValueError(f"edit of {edit.path} changes nothing: {before!r} stands there already; leave it out")
    return SearchPolicy.parse(tree, where="policy after the edits")


def check_edits(policy: SearchPolicy, following: SearchPolicy, edits: tuple[Edit, ...], evidence: Evidence) -> None:
    """Checks that the edits are exactly what differs and that each points at values within the evidence.

    Raises ValueError.
    """
    document = evidence.model_dump(mode="json", by_alias=True)
    paths = [edit.path for edit in edits]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ValueError(f"expected one edit per path, got more for {', '.join(twice)}: join them")
    for edit in edits:
        _check_cited(document, f"edit of {edit.path}", edit.evidence)
    old, new = policy.dead_ends, following.dead_ends
    written = [place for place, entry in enumerate(new) if place >= len(old) or entry != old[place]]
    for place in written:
        _check_cited(document, f"dead end {place}", new[place].evidence)
    replaced = len(new) < len(old) or any(place < len(old) for place in written)
    if replaced and len(new) < MOST_DEAD_ENDS:
        raise ValueError("dead ends may only be added: an old one was changed or dropped; restore it")
    if policy_digest(apply_edits(policy, edits)) != policy_digest(following):
        raise ValueError("the edits don't give the next policy: something changed without an edit; write it down")


def _check_cited(document: dict[str, Any], what: str, pointers: tuple[str, ...]) -> None:
    for cited in pointers:
        if not cited:
            raise ValueError(f"{what} cites the evidence as a whole, which shows nothing: point at a value within")
        resolve_pointer(document, cited)


def _tree(policy: SearchPolicy) -> dict[str, Any]:
    return policy.model_dump(mode="json", by_alias=True)


def _write(tree: Any, path: str, value: Any) -> Any:
    """Sets `path` in the tree and returns what stood there; a new entry of a list or mapping stood for None."""
    node, rest = tree, path
    while True:
        key, rest, known = _step(node, rest, path)
        if rest and not known:
            raise ValueError(f"edit of {path}: there is no {key!r} to edit; name a field of the policy")
        if rest:
            node = node[key]
        elif known:
            before, node[key] = node[key], value
            return before
        else:
            _insert(node, key, value)
            return None


def _step(node: Any, rest: str, path: str) -> tuple[Any, str, bool]:
    """The key that `rest` starts with, what remains after it, and whether the node has the key."""
    if isinstance(node, list):
        first, _, remaining = rest.partition(".")
        named = [index for index, item in enumerate(node) if isinstance(item, dict) and item.get("name") == first]
        key: Any = named[0] if named else int(first) if first.isdigit() else first
        return key, remaining, isinstance(key, int) and key < len(node)
    if isinstance(node, dict):
        # A key may hold dots itself (a domain's label), so the longest one that fits is taken.
        fitting = [key for key in node if rest == key or rest.startswith(f"{key}.")]
        key = max(fitting, key=len, default=rest)
        return key, rest[len(key) + 1 :], bool(fitting)
    raise ValueError(f"edit of {path}: nothing can be set below {node!r}; name a field of the policy")


def _insert(node: Any, key: Any, value: Any) -> None:
    """A new entry: a named one goes first in its list (it was opened for a reason of this round), others last."""
    if not isinstance(node, list):
        node[key] = value
    elif isinstance(key, str):
        node.insert(0, value)
    else:
        node.append(value)
