"""Every writer of weights and checkpoints leaves files whose bytes and names are on disk (the law: `durability`)."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_evolve.substrate.model.tensor_file import Outgoing, write_shards, write_tensors
from megatron_evolve.substrate.model.weights import save_weights
from megatron_evolve.substrate.train.checkpoint import load_checkpoint, save_checkpoint
from tests.durability import recorded


def checkpoint(root: Path, step: int = 1) -> None:
    tensors = {"weights": {"a": torch.arange(3.0)}, "more": [outgoing("b")]}
    save_checkpoint(root / "checkpoint", kind="weights", step=step, run="r", tensors=tensors, state={})


def checkpoint_over_another(root: Path) -> None:
    checkpoint(root)
    checkpoint(root, 2)
    assert load_checkpoint(root / "checkpoint").step == 2


def outgoing(name: str) -> Outgoing:
    return Outgoing(name, "F32", (2,), lambda: [bytes(8)])


def tensor_file(root: Path) -> None:
    write_tensors(root / "one.safetensors", [outgoing("a")])


def shards(root: Path) -> None:
    write_shards(root, "weights", [outgoing("a"), outgoing("b")], 8)


def weights(root: Path) -> None:
    save_weights(torch.nn.Linear(2, 2), root / "weights.safetensors")


WRITERS = (checkpoint, checkpoint_over_another, tensor_file, shards, weights)


@pytest.mark.parametrize("write", WRITERS, ids=lambda one: one.__name__)
def test_what_is_written_is_on_disk(tmp_path: Path, monkeypatch, write: Callable[[Path], None]) -> None:
    with recorded(monkeypatch) as calls:
        write(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()]
    assert calls.broken(tmp_path) == []
