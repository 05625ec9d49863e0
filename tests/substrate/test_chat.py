"""The chat format: the text itself, and token equality with nemo-toolkit's own formatter where that is installed."""

import importlib.util
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_evolve.substrate.chat import (
    END,
    THINK,
    TURN,
    chat_prompt,
    puzzle_parts,
    puzzle_prompt,
)
from megatron_evolve.substrate.checkpoint_tokenizer import CheckpointTokenizer
from megatron_evolve.substrate.manifest import Construction
from megatron_evolve.substrate.mix import Mix
from megatron_evolve.substrate.packing import Packer, Tally
from megatron_evolve.substrate.puzzles import families
from megatron_evolve.substrate.recipe import Recipe
from tests.substrate.chat_tokenizer import write_chat_tokenizer

# nemo's formatter over the tokenizer of argv[1], for the dialogs on stdin: their tokens on stdout.
NEMO = """
import json, sys
from tokenizers import Tokenizer
from nemo.collections.common.prompts.nemotron_nano_v3 import NemotronNanoV3PromptFormatter

class Adapter:
    def __init__(self, path):
        self.tokenizer = Tokenizer.from_file(path)

    def text_to_ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

formatter = NemotronNanoV3PromptFormatter(Adapter(sys.argv[1]))
ids = [formatter.encode_dialog(turns, **options) for turns, options in json.load(sys.stdin)]
print("TOKENS" + json.dumps([{name: value.tolist() for name, value in one.items()} for one in ids]))
"""


def test_the_text():
    assert chat_prompt("2+2?") == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert chat_prompt("2+2?", system="Be brief.", thinking=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>"
    )


def test_a_puzzle_ends_with_its_box():
    row = families.draw("cipher", random.Random(1), difficulty="challenge")
    assert puzzle_prompt(row.prompt).count("\\boxed{your answer}`<|im_end|>\n<|im_start|>assistant\n<think>\n") == 1
    for style in row.traces:
        prompt, thought, answer = puzzle_parts(row, style)
        assert prompt == puzzle_prompt(row.prompt) and answer == f"\\boxed{{{row.answer}}}"
        assert thought == ("" if style == "answer" else row.traces[style].strip()) + "\n</think>\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    write_chat_tokenizer(folder)
    return folder


def test_a_checkpoints_tokenizer_reads_the_format(tokenizer):
    fast = CheckpointTokenizer.read(tokenizer)
    text = chat_prompt("Grüße: 3 × 4 = ?") + "12"
    ids = fast.encode(text)
    assert fast.decode(ids[:1]) == TURN and ids.count(fast.eos_id) == 2
    assert fast.eos_id != fast.pad_id
    first = ids.index(fast.eos_id)
    assert fast.decode(ids) == "<|im_start|>system\n" == fast.decode(ids[:first])


def test_rows_are_packed_in_the_format(tokenizer):
    """Of a checkpoint's tokenizer a batch decodes to prompt, thinking, box and end, with the weights of each."""
    fast = CheckpointTokenizer.read(tokenizer)
    style = next(style for style in families.styles_of("gravity", "challenge") if style != "answer")
    mix = Mix(weight={"gravity": 1.0}, style={"gravity": style}, difficulty="challenge")
    pool = Construction(families=("gravity",), difficulty="challenge", styles={"gravity": (style,)})
    recipe = Recipe(batch_size=2, steps=1, warmup_steps=0, sequence_length=4096, trace_loss_weight=0.5)
    packer = Packer(mix, pool, fast, recipe, seed=1)
    rows = packer._draw_step(0, Counter(), Tally())
    batch = packer.pack(rows, Tally())
    for n, (row, _) in enumerate(rows):
        prompt, thought, box = puzzle_parts(row, style)
        labels = batch.labels_BT[n][batch.weights_BT[n] > 0].tolist()
        assert labels == [*fast.encode(thought), *fast.encode(box), fast.eos_id]
        assert batch.tokens_BT[n].tolist()[: len(fast.encode(prompt))] == fast.encode(prompt)
        assert set(batch.weights_BT[n].tolist()) == {0.0, 0.5, 1.0}


@pytest.mark.slow
def test_token_for_token_nemo_toolkits_formatter(tokenizer):
    if importlib.util.find_spec("nemo") is None:
        pytest.skip("nemo-toolkit is not installed (extra `nemo`)")
    rng = random.Random(3)
    rows = [families.draw(family, rng, difficulty="challenge") for family in families.FAMILIES]
    dialogs, texts = [], []
    for row in rows:
        question = {"role": "user", "content": puzzle_prompt(row.prompt).split(f"{TURN}user\n")[1].split(END)[0]}
        dialogs.append(([question], {}))
        texts.append((puzzle_prompt(row.prompt), ""))
        for style in row.traces:
            prompt, thought, box = puzzle_parts(row, style)
            dialogs.append(([question, {"role": "assistant", "content": f"{THINK}\n{thought}{box}"}], {}))
            texts.append((prompt, f"{thought}{box}{END}\n"))
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    dialogs.append((plain, {"enable_thinking": False}))
    texts.append((chat_prompt("2+2?", system="Be brief.", thinking=False), ""))
    dialogs.append(([*plain, {"role": "assistant", "content": "4"}], {}))
    texts.append((chat_prompt("2+2?", system="Be brief.", thinking=False), f"4{END}\n"))
    run = subprocess.run(
        [sys.executable, "-c", NEMO, str(tokenizer / "tokenizer.json")],
        input=json.dumps(dialogs),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if "ModuleNotFoundError" in run.stderr:
        pytest.skip(f"nemo-toolkit is installed without what it imports: {run.stderr.strip().splitlines()[-1]}")
    assert run.returncode == 0, run.stderr
    theirs = json.loads(run.stdout.split("TOKENS")[1])
    fast = CheckpointTokenizer.read(tokenizer)
    for (prompt, completion), tokens in zip(texts, theirs, strict=True):
        assert fast.encode(prompt + completion) == tokens["input_ids"]
