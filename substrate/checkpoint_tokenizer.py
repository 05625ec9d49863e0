"""The tokenizer of a real checkpoint, and the puzzle scales' tokenizer in that form.

A checkpoint brings `tokenizer.json` of the tokenizers library and, beside it, which of its tokens ends a text. It
offers what `tokenizer.PieceTokenizer` offers, so whoever encodes rows need not know which of the two it holds:
`read_tokenizer` opens either. In the other direction `exported` writes the fixed pieces as such files, token for token
the same.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_evolve.launch.rundir import read_json
from megatron_evolve.substrate.tokenizer import EOS, PAD, PieceTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"


class CheckpointTokenizer:
    """A fast tokenizer from files. `eos_id` ends a text; `pad_id` fills rows up and is the former where there is none.

    Nothing is added to a text: no begin or end of sequence, no prefix space.
    """

    def __init__(self, tokenizer: "Tokenizer", eos_id: int, pad_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_id = eos_id
        self.pad_id = pad_id

    @classmethod
    def read(cls, folder: Path) -> "CheckpointTokenizer":
        """The tokenizer of the checkpoint in `folder`. Raises ValueError in one sentence if its files are not whole."""
        from tokenizers import Tokenizer

        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise ValueError(
                f"expected {TOKENIZER_FILE} beside the weights in {folder}; it is missing: download it too"
            )
        try:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:
            raise ValueError(
                f"{path} must be a tokenizer of the tokenizers library; got {error}: copy it again"
            ) from error
        settings = _settings(folder / SETTINGS_FILE)
        ends = _token(settings, "eos_token", folder)
        eos_id = tokenizer.token_to_id(ends) if ends is not None else None
        if eos_id is None:
            raise ValueError(
                f"{folder / SETTINGS_FILE}: expected an eos_token that {TOKENIZER_FILE} knows; got {ends!r}: copy both"
            )
        fills = _token(settings, "pad_token", folder)
        pad_id = tokenizer.token_to_id(fills) if fills is not None else None
        return cls(tokenizer, eos_id, eos_id if pad_id is None else pad_id)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without begin or end of sequence. Special tokens in the text count as such."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first end of sequence, padding left out; special tokens show as their names."""
        kept = []
        for token in ids:
            if token == self.eos_id:
                break
            if token != self.pad_id:
                kept.append(token)
        return self._tokenizer.decode(kept, skip_special_tokens=False)


def _settings(path: Path) -> dict[str, Any]:
    settings = read_json(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected a JSON object; got a {type(settings).__name__}: copy it again")
    return settings


def _token(settings: dict[str, Any], name: str, folder: Path) -> str | None:
    """A token's text: configs spell it as the text or as an object with it as `content`."""
    value = settings.get(name)
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str | None):
        raise ValueError(f"{folder / SETTINGS_FILE}: expected {name} as a text; got {text!r}: copy it again")
    return text


def read_tokenizer(folder: Path) -> PieceTokenizer | CheckpointTokenizer:
    """The tokenizer of a frozen substrate, whichever kind its `tokenizer.json` holds."""
    path = folder / TOKENIZER_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
    try:
        kind = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON; got {error}: restore it") from error
    if isinstance(kind, dict) and "pieces" in kind:
        return PieceTokenizer.from_json(text)
    return CheckpointTokenizer.read(folder)


def exported(tokenizer: PieceTokenizer) -> dict[str, dict[str, Any]]:
    """The fixed pieces as files of a checkpoint: name to JSON document.

    The text is cut by the same regular expression. A prompt is given to the model as it stands, so the chat template is
    the content of the last message: servers that speak chat only then ask the same question.
    """
    vocabulary = {text: token for token, text in enumerate(tokenizer.texts)}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    cut = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    fast = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocabulary[text], "content": text, **special} for text in (PAD, EOS)],
        "normalizer": None,
        "pre_tokenizer": cut,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unknown>"},  # not in it: an error, no token
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "<eos>" in a prompt is text there too
        "chat_template": "{{ messages[-1]['content'] }}",
    }
    return {TOKENIZER_FILE: fast, SETTINGS_FILE: settings}
