"""A byte-level BPE with the chat format's special tokens, trained on puzzles: it stands in for a checkpoint's own."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_evolve.substrate.chat import END, THINK, THOUGHT, TURN
from megatron_evolve.substrate.puzzles import families

VOCAB_SIZE = 800


def write_chat_tokenizer(folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`; a turn's end ends a text."""
    rng = random.Random(0)
    rows = [families.draw(family, rng, difficulty="challenge") for family in families.FAMILIES for _ in range(20)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["</s>", TURN, END, THINK, THOUGHT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([row.prompt for row in rows], trainer)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "pad_token": "</s>"}))
