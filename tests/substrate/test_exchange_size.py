"""A checkpoint of more than 4 GB goes in, out and onto two ranks, and no process holds more than it should."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_evolve.substrate.checkpoint_tokenizer import exported
from megatron_evolve.substrate.model.architecture import Architecture
from megatron_evolve.substrate.model.huggingface import huggingface_config
from megatron_evolve.substrate.model.tensor_file import Outgoing, read_header, write_shards
from megatron_evolve.substrate.model.weight_map import HUB, to_huggingface
from megatron_evolve.substrate.tokenizer import nano_tokenizer

pytestmark = pytest.mark.slow

LARGE = Architecture(
    name="large",
    pattern="ME*EMEMEMEMEME",
    hidden_size=1024,
    vocab_size=4096,
    num_attention_heads=16,
    num_query_groups=2,
    head_dim=64,
    mamba_num_heads=32,
    mamba_head_dim=64,
    mamba_state_dim=64,
    mamba_num_groups=4,
    mamba_chunk_size=64,
    num_experts=64,
    top_k=4,
    expert_ffn_size=2304,
    shared_ffn_size=2048,
    topk_scaling_factor=2.5,
    init_std=0.02,
    max_sequence_length=4096,
)
SHARD_BYTES = 500_000_000
# The high-water mark of this program's own memory; getrusage's would start from the parent's.
PEAK = """
import re
from pathlib import Path
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
"""
MEASURED = f"""{PEAK}
import sys
from megatron_evolve.substrate.exchange import export_hf, import_hf
{{"in": import_hf, "out": export_hf}}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
print(peak())
"""
RANK = f"""{PEAK}
import json, sys
import torch
from megatron_evolve.substrate.layout import Layout
from megatron_evolve.substrate.model import build, weights
from megatron_evolve.substrate.model.architecture import Architecture

folder = Path(sys.argv[1])
runtime = build.start(seed=0, layout=Layout(ep=2))
architecture = Architecture.model_validate(json.loads((folder / "manifest.json").read_text())["architecture"])
before = peak()
model = build.build_model(architecture, seed=0, params_dtype=torch.bfloat16, perform_initialization=False)
weights.load_part([model], sorted(folder.glob("*.safetensors")))
own = sum(t.numel() * t.element_size() for t in weights.state_of(model).values())
Path(sys.argv[2], str(runtime.rank)).write_text(json.dumps(dict(before=before, own=own, peak=peak())))
torch.distributed.barrier()
"""


def _tensors() -> Iterator[Outgoing]:
    """Every tensor of LARGE in bfloat16, its bytes cut from one random block at a place of its own."""
    block = os.urandom(32 << 20)
    for n, tensor in enumerate(to_huggingface(LARGE, HUB)):
        shape, start = tensor.shape, n * 7919 % 1000 * 2

        def chunks(shape=shape, start=start) -> Iterator[bytes]:
            left = outgoing_bytes(shape)
            while left:
                part = block[start : start + left]
                left -= len(part)
                yield part

        yield Outgoing(tensor.name, "BF16", shape, chunks)


def outgoing_bytes(shape: tuple[int, ...]) -> int:
    return Outgoing("", "BF16", shape, list).num_bytes


def _generate(folder: Path) -> int:
    """Writes the checkpoint; gives the bytes of all its tensors."""
    folder.mkdir()
    shards = write_shards(folder, "model", _tensors(), SHARD_BYTES)
    placed = {tensor.name: file for file, (_, tensors) in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (folder / "config.json").write_text(json.dumps(huggingface_config(LARGE)))
    for file, document in exported(nano_tokenizer()).items():
        (folder / file).write_text(json.dumps(document))
    return sum(described.bytes for described, _ in shards.values())


def _measure(way: str, source: Path, out: Path) -> int:
    """Peak resident bytes of a process that converts."""
    command = [sys.executable, "-c", MEASURED, way, str(source), str(out)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=900).stdout)


def _digests(folder: Path) -> dict[str, int]:
    """A number per tensor that depends on its bytes."""
    found = {}
    for path in folder.glob("*.safetensors"):
        for name, entry in read_header(path).items():
            value = 0
            for data in entry.rows(0, entry.shape[0]).read():
                value = hash((value, data))
            found[name] = value
    return found


def test_peaks(tmp_path):
    total = _generate(tmp_path / "hub")
    assert total > 4e9
    largest = max(path.stat().st_size for path in (tmp_path / "hub").glob("*.safetensors"))
    peak_in = _measure("in", tmp_path / "hub", tmp_path / "substrate")
    original = _digests(tmp_path / "hub")
    _remove(tmp_path / "hub")  # at most two copies on the disk
    peak_out = _measure("out", tmp_path / "substrate", tmp_path / "out")
    assert _digests(tmp_path / "out") == original
    _remove(tmp_path / "out")
    ranks = _load_on_two_ranks(tmp_path)
    _remove(tmp_path / "substrate")
    figures = {"bytes": total, "largest_file": largest, "import": peak_in, "export": peak_out, "ranks": ranks}
    print(json.dumps(figures))
    assert max(peak_in, peak_out) < 2 * largest
    for rank in ranks:
        assert rank["peak"] - rank["before"] < rank["own"] + 2 * largest
        assert rank["own"] < 0.6 * total


def _load_on_two_ranks(folder: Path) -> list[dict[str, int]]:
    program = folder / "rank.py"
    program.write_text(RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*torchrun, str(program), str(folder / "substrate"), str(folder)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return [json.loads((folder / str(rank)).read_text()) for rank in (0, 1)]


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
