"""The tokenizer of the puzzle scales: fixed pieces, longest match first.

Text is cut by one compiled regular expression whose alternatives are the pieces, longest first; every piece of one
character is its own fallback. So the fixed text of a puzzle costs one or two tokens, numbers are read digit by digit,
and decoding is joining. Nothing is learned from data, so the whole tokenizer is its list of pieces.

Digits are single tokens at both difficulties: a small model then learns ten digits by their place instead of a
hundred two-digit names with a hundredth of the examples each, and no number has two spellings. Words of four bits are
one token, as columns of a table are: single bits are not learned in a nano budget (accuracy .14 against .16-.33 at 500
steps of a stand-in model).
"""

import json
import re
import string
from collections.abc import Iterable, Sequence
from functools import cache

from megatron_evolve.substrate.digest import digest_bytes
from megatron_evolve.substrate.puzzles import bit_manipulation, cipher, equation, families, gravity, unit_conversion
from megatron_evolve.substrate.puzzles.row import BOX_CLOSE, BOX_OPEN, CHALLENGE_SUFFIX, COMPLETION_MARK

PAD = "<pad>"
EOS = "<eos>"
# The output layer divides by tensor-parallel sizes up to 16.
VOCAB_MULTIPLE = 16

# A piece that is a word matches whole words only, or a cipher text could hide one.
_WORD = re.compile(" ?[a-z]{2,}")


class PieceTokenizer:
    """Ids 0 and 1 are padding and end of sequence, then the pieces in order, then reserved ids up to a multiple of 16.

    Pieces must be distinct and not empty. Two tokenizers with the same pieces are equal. `pattern` is the regular
    expression that cuts text, for whoever writes this tokenizer in another program's format.
    """

    pad_id = 0
    eos_id = 1

    def __init__(self, pieces: Sequence[str]) -> None:
        doubled = sorted({piece for piece in pieces if pieces.count(piece) > 1})
        if doubled or "" in pieces:
            raise ValueError(
                f"pieces must be distinct and not empty; got {doubled or ['']} twice or empty: remove them"
            )
        self.pieces = tuple(pieces)
        named = (PAD, EOS, *self.pieces)
        reserved = tuple(f"<reserved-{i}>" for i in range(-len(named) % VOCAB_MULTIPLE))
        self.texts = named + reserved  # by id
        self._ids = {piece: i + 2 for i, piece in enumerate(self.pieces)}
        longest_first = sorted(
            (piece for piece in self.pieces if len(piece) > 1), key=lambda piece: (-len(piece), piece)
        )
        self.pattern = "|".join([*map(_alternative, longest_first), r"[\s\S]"])
        self._cut = re.compile(self.pattern).findall

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PieceTokenizer) and self.pieces == other.pieces

    def __hash__(self) -> int:
        return hash(self.pieces)

    @property
    def vocab_size(self) -> int:
        """Number of ids, reserved ones included; a multiple of 16."""
        return len(self.texts)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without end of sequence. Raises ValueError for a character that no piece covers."""
        try:
            return [self._ids[piece] for piece in self._cut(text)]
        except KeyError as error:
            raise ValueError(
                f"text must consist of the tokenizer's {len(self.pieces)} pieces; got the character {error.args[0]!r} "
                "outside them: remove it, or use the tokenizer of the text's difficulty"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first end of sequence, padding left out; a reserved id shows as its name."""
        texts = []
        for token in ids:
            if token == self.eos_id:
                break
            if token != self.pad_id:
                texts.append(self.texts[token])
        return "".join(texts)

    def to_json(self) -> str:
        """The one canonical JSON form: ASCII, sorted keys, no spaces."""
        return json.dumps({"pieces": self.pieces}, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> "PieceTokenizer":
        """The tokenizer that `to_json` wrote. Raises ValueError for other text."""
        value = json.loads(text)
        pieces = value.get("pieces") if isinstance(value, dict) else None
        if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
            raise ValueError('a tokenizer must be {"pieces": [strings]}; got something else: write it with `to_json`')
        return cls(pieces)

    def digest(self) -> str:
        """sha256 of the canonical form."""
        return digest_bytes(self.to_json().encode())


def _alternative(piece: str) -> str:
    escaped = re.escape(piece)
    if not _WORD.fullmatch(piece):
        return escaped
    return f"{'' if piece[0] == ' ' else '(?<![a-z])'}{escaped}(?![a-z])"


_NIBBLES = tuple(f"{word:04b}" for word in range(16))


@cache
def nano_tokenizer() -> PieceTokenizer:
    """The tokenizer of nano rows."""
    headers = ("numeral\n", "gravity on ", "units\n", "cipher by ", "bits\n", "equation\n")
    marks = ("\nQ ", COMPLETION_MARK, BOX_OPEN, BOX_CLOSE, "\n", " = ", "\nFor t = ", "s, distance = ")
    arrows = tuple(f" {arrow} " for arrow in bit_manipulation.ARROWS)
    units = tuple(f" {unit} becomes " for unit in unit_conversion.UNITS)
    senders = tuple(f"{sender}\n" for sender in cipher.SENDERS)
    # The letters of the numerals, of the cipher's words, and of the traces (f of the factor is one of the words').
    characters = tuple(string.digits + "IVXLC" + cipher.NANO.alphabet + equation.NANO.glyphs + "knrs,")
    return PieceTokenizer([*headers, *marks, *arrows, *units, *gravity.BODIES, *senders, *_NIBBLES, *characters])


@cache
def challenge_tokenizer() -> PieceTokenizer:
    """The tokenizer of challenge rows: their fixed phrases, the cipher's words and every printable ASCII character."""
    phrases = [CHALLENGE_SUFFIX + COMPLETION_MARK, BOX_OPEN]
    for frame in families.FRAMES.values():
        before, between, after = re.split(r"\{\w+\}", frame.example)
        query_before, query_after = re.split(r"\{\w+\}", frame.query)
        # What stands between two values is one piece, line breaks included.
        phrases += [f"{frame.header}\n{before}", between, f"{after}\n{before}", f"{after}\n{query_before}", query_after]
    vocabulary = sorted({word for form in cipher.FORMS for slot in form for word in slot})
    words = [*cipher.OPENING_WORDS, *(f" {word}" for word in vocabulary)]
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    return PieceTokenizer([piece for piece in dict.fromkeys([*phrases, *words, *_NIBBLES, *characters]) if piece])
