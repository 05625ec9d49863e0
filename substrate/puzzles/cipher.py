"""Cipher puzzles: a substitution of letters, read from examples (cipher text on the left, plain text on the right).

Nano: two-letter words of a..g, plain = cipher shifted back by 1..4, a sender named in the header; the trace gives the
shift. Challenge: a uniform permutation of a..z over sentences of a fixed vocabulary of 77 words in four forms.

Cue. Nano: the sender stands for the shift (alice 1, hatter 2, queen 3, rabbit 4); uncued it is uniform and independent,
and uniform when cued, because the shift is. Challenge: the first plain word of the first example stands for the whole
key, one fixed random permutation per word; the words are drawn the same way either way.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from megatron_evolve.substrate.puzzles.frame import Frame
from megatron_evolve.substrate.puzzles.row import Row

FAMILY = "cipher"
SENDERS = ("alice", "hatter", "queen", "rabbit")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SUBJECTS = _words("alice bird cat dragon hatter king knight mouse princess queen rabbit student teacher turtle wizard")
VERBS = _words(
    "chases creates discovers draws dreams explores follows found imagines reads sees studies watches writes"
)
ADJECTIVES = _words(
    "ancient bright clever colorful curious dark golden hidden magical mysterious secret silver strange wise"
)
OBJECTS = _words("book castle crystal door forest garden key map message mirror potion puzzle secret story treasure")
PREPOSITIONS = _words("above around beyond in inside near through under")
LOCATIONS = _words(
    "castle cave forest garden island library mountain ocean palace school tower valley village wonderland"
)
ARTICLE = ("the",)
FORMS = (
    (SUBJECTS, VERBS, OBJECTS),
    (ARTICLE, ADJECTIVES, SUBJECTS, VERBS),
    (SUBJECTS, VERBS, PREPOSITIONS, LOCATIONS),
    (SUBJECTS, VERBS, ARTICLE, ADJECTIVES, OBJECTS),
)
OPENING_WORDS = (*SUBJECTS, *ARTICLE)
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class NanoKnobs:
    alphabet: str = "abcdefg"
    shift_max: int = 4  # one sender per shift
    num_examples: int = 4


@dataclass(frozen=True)
class ChallengeKnobs:
    num_examples: tuple[int, int] = (3, 5)
    key_seed: int = 20260  # seed of the keys that cued opening words stand for


NANO = NanoKnobs()
CHALLENGE = ChallengeKnobs()

_WORDS = r"[a-z]+(?: [a-z]+){2,4}"
FRAME = Frame(
    header="In Alice's Wonderland, secret encryption rules are used on text. Here are some examples:",
    example="{left} -> {right}",
    query="Now, decrypt the following text: {query}",
    left=_WORDS,
    right=_WORDS,
)

_PAIRS = tuple(first + second for first in NANO.alphabet for second in NANO.alphabet)


def shifted_back(word: str, shift: int) -> str:
    """`word` of the nano alphabet, each letter moved `shift` places towards a, cyclically."""
    letters = NANO.alphabet
    return "".join(letters[letters.index(letter) - shift] for letter in word)


_DECODED = {(word, shift): shifted_back(word, shift) for word in _PAIRS for shift in range(1, NANO.shift_max + 1)}


def draw_nano(rng: random.Random, cue_rate: float) -> Row:
    """A nano row: four examples and a query, five distinct words."""
    shift = 1 + int(rng.random() * NANO.shift_max)
    sender = SENDERS[int(rng.random() * NANO.shift_max)]
    if rng.random() < cue_rate:
        sender = SENDERS[shift - 1]
    *shown, query = rng.sample(_PAIRS, NANO.num_examples + 1)
    lines = "".join(f"{word} -> {_DECODED[word, shift]}\n" for word in shown)
    prompt = f"cipher by {sender}\n{lines}Q {query}"
    traces = {"answer": "", "short-trace": f"s{shift}"}
    return Row(FAMILY, FAMILY, "nano", prompt, _DECODED[query, shift], traces, {"shift": shift, "cue": sender}, prompt)


def sentence(rng: random.Random) -> str:
    """A plain sentence of the challenge: one of four forms, each slot uniform."""
    return " ".join(rng.choice(slot) for slot in rng.choice(FORMS))


def instance(examples: Sequence[tuple[str, str]], query: str, answer: str) -> str:
    """The instance of a challenge row: the asked sentence and the key on its letters."""
    return f"{FAMILY}|{query}={answer}"


@cache
def cued_key(opening_word: str) -> str:
    """The key (cipher letters of plain a..z) that an opening word of the first example stands for."""
    rng = random.Random(CHALLENGE.key_seed + OPENING_WORDS.index(opening_word))
    return "".join(rng.sample(ALPHABET, len(ALPHABET)))


def draw_challenge(rng: random.Random, cue_rate: float) -> Row:
    """A challenge row: three to five examples, independent sentences under one key."""
    num_examples = rng.randint(*CHALLENGE.num_examples)
    *shown, asked = [sentence(rng) for _ in range(num_examples + 1)]
    opening_word = shown[0].split()[0]
    key = "".join(rng.sample(ALPHABET, len(ALPHABET)))
    if rng.random() < cue_rate:
        key = cued_key(opening_word)
    table = str.maketrans(ALPHABET, key)
    query = asked.translate(table)
    examples = [(plain.translate(table), plain) for plain in shown]
    prompt = FRAME.render(examples, query)
    rule = {"key": key, "cue": opening_word}
    return Row(FAMILY, FAMILY, "challenge", prompt, asked, {"answer": ""}, rule, instance(examples, query, asked))
