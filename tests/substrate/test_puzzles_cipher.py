"""Cipher rows: decoded letter by letter with the recorded key."""

import random
from collections import Counter

from megatron_evolve.substrate.puzzles import cipher
from megatron_evolve.substrate.puzzles.families import draw, parse


def test_nano_rows_follow_their_shift():
    rng = random.Random(1)
    for _ in range(400):
        row = draw("cipher", rng, difficulty="nano")
        header, *lines, query = row.prompt.splitlines()
        assert header == f"cipher by {row.rule['cue']}"
        pairs = [line.split(" -> ") for line in lines] + [[query[2:], row.answer]]
        assert len(pairs) == len({left for left, _ in pairs}) == 5
        for left, right in pairs:
            # Every letter pair fixes the shift, so the answer is always forced.
            assert {(ord(a) - ord(b)) % 7 for a, b in zip(left, right, strict=True)} == {row.rule["shift"]}
            assert set(left + right) <= set("abcdefg")
        assert row.traces["short-trace"] == f"s{row.rule['shift']}"


def test_vocabulary_has_the_published_size():
    slots = [cipher.SUBJECTS, cipher.VERBS, cipher.ADJECTIVES, cipher.OBJECTS, cipher.PREPOSITIONS, cipher.LOCATIONS]
    assert [len(slot) for slot in slots] == [15, 14, 14, 15, 8, 14]
    # Four words stand in two lists.
    assert len({word for slot in slots for word in slot} | {"the"}) == 77


def test_challenge_rows_follow_their_key():
    rng = random.Random(2)
    num_words, unseen = Counter(), 0
    for _ in range(1200):
        row = draw("cipher", rng, difficulty="challenge")
        parsed = parse(row.prompt)
        key = row.rule["key"]
        assert sorted(key) == list("abcdefghijklmnopqrstuvwxyz")
        for left, right in [*parsed.examples, (parsed.query, row.answer)]:
            plain = "".join(" " if c == " " else chr(97 + key.index(c)) for c in left)
            assert plain == right
        assert 3 <= len(parsed.examples) <= 5
        num_words[len(row.answer.split())] += 1
        unseen += not set(parsed.query) <= set("".join(left for left, _ in parsed.examples)) | {" "}
    # Published: 182, 410, 198 of 790 answers have 3, 4, 5 words; 971 of 1,576 queries hold a letter no example shows
    # (61.6 %, and 60.5 % of simulated rows). Bounds are 4 sigma of 1,200.
    assert 0.20 < num_words[3] / 1200 < 0.30
    assert 0.44 < num_words[4] / 1200 < 0.56
    assert set(num_words) == {3, 4, 5}
    assert 0.54 < unseen / 1200 < 0.68


def test_cued_keys_differ_from_word_to_word():
    assert len({cipher.cued_key(word) for word in cipher.OPENING_WORDS}) == 16
