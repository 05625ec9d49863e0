"""What several ranks hand on is one file, written a tensor at a time: the same bytes as of the model gathered first."""

from pathlib import Path

import pytest
import torch

from megatron_evolve.substrate.digest import digest_file
from megatron_evolve.substrate.train.checkpoint import load_checkpoint
from tests.substrate.test_train_layouts import run

PROGRAM = Path(__file__).with_name("hand_on_program.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="measures the path of a machine without a GPU"),
]


def test_writing_takes_the_memory_of_two_tensors_not_of_the_model(tmp_path: Path) -> None:
    """Of the largest tensor the pieces that arrived and their whole; of a model gathered first three models, or two."""
    told = run(2, {"wide": {"layout": "tp=2"}}, Path("none"), tmp_path, PROGRAM)["wide"]
    print({name: told[name] for name in ("bytes", "largest", "streamed", "gathered")})
    assert told["bytes"] > 25 * told["largest"]
    assert told["streamed"] < 2 * told["largest"] + 4e6  # what Python and gloo take besides
    assert told["gathered"] > 2 * told["bytes"]
    # safetensors' own writer made the second; load_checkpoint hashes both again
    for name in ("streamed", "gathered"):
        assert load_checkpoint(tmp_path / name).files["weights.safetensors"].bytes > told["bytes"]
    first, second = (tmp_path / name / "weights.safetensors" for name in ("streamed", "gathered"))
    assert digest_file(first) == digest_file(second)
    assert told["refused"].startswith("cannot make the folder") and told["waited"] < 60
