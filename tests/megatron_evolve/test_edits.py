"""What edits and dead ends cite: RFC 6901 pointers to values within the evidence."""

import pytest

from megatron_evolve.edits import check_edits
from megatron_evolve.meta import next_policy
from megatron_evolve.policy import resolve_pointer
from tests.megatron_evolve.test_meta import DOWN, RULES, UP, explorer, round_of, start

# The document and the pointers of RFC 6901, section 5, and what its sections 3 and 4 refuse.
DOCUMENT = {"foo": ["bar", "baz"], "": 0, "a/b": 1, "c%d": 2, "e^f": 3, 'k"l': 6, " ": 7, "m~n": 8, "01": 9}
FOUND = {"": DOCUMENT, "/foo": ["bar", "baz"], "/foo/0": "bar", "/": 0, "/a~1b": 1, "/c%d": 2, "/e^f": 3, '/k"l': 6}
FOUND |= {"/ ": 7, "/m~0n": 8, "/01": 9}
NOWHERE = ("foo", "0", "candidates/0", "/foo/-1", "/foo/+1", "/foo/01", "/foo/ 1", "/foo/1_0", "/foo/\u0661", "/foo/-")
NOWHERE += ("/foo/2", "/foo/", "/foo/0/b", "/m~n", "/m~2n", "/a/b", "/none", "//")


def test_a_pointer_is_one_of_rfc_6901_or_resolves_nowhere() -> None:
    assert {pointer: resolve_pointer(DOCUMENT, pointer) for pointer in FOUND} == FOUND
    for pointer in NOWHERE:
        with pytest.raises(ValueError, match="does not resolve"):
            resolve_pointer(DOCUMENT, pointer)


def test_edits_and_dead_ends_cite_something_within_the_evidence() -> None:
    policy = start()
    evidence = round_of(policy, explorer(policy, "lr", DOWN), explorer(policy, "steps", UP))
    following, edits = next_policy(RULES, policy, evidence)
    for vague, said in (("", "cites the evidence as a whole"), ("/candidates/-1", "does not resolve")):
        with pytest.raises(ValueError, match=said):
            check_edits(policy, following, (edits[0].replace(evidence=(vague,)), *edits[1:]), evidence)
        entry = following.dead_ends[0].replace(evidence=(vague,))
        told = {"dead_ends.0": entry.model_dump(mode="json")}
        written = tuple(one.replace(after=told.get(one.path, one.after)) for one in edits)
        with pytest.raises(ValueError, match=said):
            check_edits(policy, following.replace(dead_ends=(entry,)), written, evidence)
