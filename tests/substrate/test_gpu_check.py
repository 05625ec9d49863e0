"""The model's check of a GPU, as far as a CPU can check it: the sentence without one, and the rows of a tiny model."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_evolve.substrate import gpu_check, gpu_steps
from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.architecture import NANO_CPU, NEMOTRON3_NANO

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = gpu_check.shortened(NANO_CPU, "ME*")
REFERENCE = f"""
from pathlib import Path
from megatron_evolve.substrate import gpu_check
from megatron_evolve.substrate.model.architecture import NANO_CPU
gpu_check.reference(gpu_check.shortened(NANO_CPU, {ARCHITECTURE.pattern!r}), Path(%r))
"""


@pytest.fixture(scope="module")
def megatron():
    yield build.start(seed=1)
    build.stop()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, str(ROOT / "substrate" / "gpu_check.py"), "--out", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    told = done.stderr.strip().splitlines()[-1]
    assert told == "gpu_check: needs a CUDA device, and torch finds none: run it on a machine with one"
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.slow
def test_every_layer_in_bfloat16_is_near_float32_of_another_process(megatron, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LENGTH", 32)
    head, *rows = gpu_check.compared(ARCHITECTURE, tmp_path, (sys.executable, "-c", REFERENCE % str(tmp_path)))
    assert head["reference"] == "float32, CPU"
    names = {row["compared"] for row in rows}
    assert {
        "losses",
        "layer 0 output",
        "layer 1 input gradient",
        "layer 1 mlp.router.weight",
        "layer 2 output",
        "table losses",
        "table weight",
    } <= names
    assert all(row["ok"] for row in rows), [row for row in rows if not row["ok"]]
    assert all(0 < row["eager"] < gpu_check.MOST for row in rows)


@pytest.mark.slow
def test_a_wrong_layer_is_seen(megatron, tmp_path, monkeypatch):
    """The GPU's side computes with another weight than it handed over."""
    monkeypatch.setattr(gpu_check, "LENGTH", 32)
    losses_of = gpu_check.losses_of

    def spoilt(model, *given):
        with torch.no_grad():
            model.decoder.layers[2].self_attention.linear_proj.weight.mul_(1.2)
        return losses_of(model, *given)

    monkeypatch.setattr(gpu_check, "losses_of", spoilt)
    command = (sys.executable, "-c", REFERENCE % str(tmp_path))
    wrong = {row["compared"] for row in gpu_check.compared(ARCHITECTURE, tmp_path, command) if not row.get("ok", True)}
    assert any(name.startswith("layer 2") for name in wrong)
    assert not any(name.startswith(("layer 0", "layer 1")) for name in wrong)


def test_the_fused_form_is_put_in_and_taken_out(megatron):
    from megatron_evolve.kernels import eager, fused
    from megatron_evolve.substrate.model.experts import GroupedExperts
    from megatron_evolve.substrate.model.mamba_ssm import GatedRMSNorm

    model = build.build_model(ARCHITECTURE, seed=1, experts="eager")
    kinds = {kind: [m for m in model.modules() if isinstance(m, kind)] for kind in (GroupedExperts, GatedRMSNorm)}
    assert all(kinds.values())
    for name, form in (("triton", fused), ("eager", eager)):
        gpu_check.take_form(model, name)
        assert model.linear_cross_entropy is form.linear_cross_entropy
        assert all(module.compute is form.grouped_experts for module in kinds[GroupedExperts])
        norm = fused.gated_rms_norm if name == "triton" else None
        assert all(module.fused is norm for module in kinds[GatedRMSNorm])


def test_no_training_begins_after_its_time_and_the_unknown_ones_come_first(monkeypatch):
    clock = iter([0.0, 0.0, 99.0, 101.0, 131.0])
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: next(clock))
    begun = []
    ran = [lambda n=n: iter([gpu_check.named(n)]) for n in range(5)]
    comparison, *rows = gpu_check.told(ran, 100.0, -1, begun.append)
    assert comparison == {"compared": "all"} and begun == [0, 1, 2]
    assert [(row["steps"], row["experts"]) for row in rows] == list(gpu_check.TRAININGS)
    assert rows[0]["steps"] == "sft" and [row.get("reason") for row in rows[:2]] == [None, None]
    assert rows[2]["reason"] == "not begun: 1 s after the last second given" and "31 s" in rows[3]["reason"]


def test_what_fails_is_a_row_and_what_follows_runs():
    """As does the memory of a GPU that is too small, which is no error of ours."""

    def fails(failure):
        raise failure
        yield

    parts = [
        lambda: fails(RuntimeError("CUDA error: an illegal memory access")),
        lambda: fails(torch.cuda.OutOfMemoryError("out of memory\nmore")),
        lambda: iter([{"steps": "lora"}]),
    ]
    failed, full, ran = gpu_check.told(parts, float("inf"), -1, lambda _: None)
    assert failed["compared"] == "all" and failed["ok"] is False and "in fails" in failed["traceback"]
    assert full == {"steps": "sft", "experts": "triton", "reason": "out of memory"} and ran == {"steps": "lora"}
    assert list(gpu_check.told(parts, float("inf"), 1, lambda _: None)) == [ran]


def test_the_folder_is_one_with_room(tmp_path, monkeypatch):
    small, large = tmp_path / "shm", tmp_path / "tmp"
    for folder in (small, large):
        folder.mkdir()
    free = {str(small): 64 << 20, str(large): 10 << 30}
    disk = SimpleNamespace(disk_usage=lambda folder: SimpleNamespace(free=free[str(folder)]))
    monkeypatch.setattr(gpu_check, "shutil", disk)
    needed = gpu_check.needed_bytes(gpu_check.shortened(NEMOTRON3_NANO, gpu_check.PATTERN))
    assert needed / gpu_check.ROOM == pytest.approx(4.2e9, rel=0.02)  # 2.1 billion weights in bfloat16
    folders = (str(small), str(large))
    assert gpu_check.roomiest(needed, folders) == str(large)
    assert gpu_check.roomiest(1 << 20, folders) == str(small)
    assert gpu_check.roomiest(1 << 40, folders) == str(large)
    with pytest.raises(ValueError, match=r"need 6\.\d GB in .*; got 0.1: set TMPDIR"):
        gpu_check.check_room(small, needed)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "sys.exit('no memory')", "time.sleep(60)"])
def test_a_float32_process_that_ends_badly_or_hangs_is_told(megatron, tmp_path, monkeypatch, end):
    monkeypatch.setattr(gpu_check, "REFERENCE_S", 1)
    model, tokens = torch.nn.Linear(2, 2), torch.zeros(2, 1, 4, dtype=torch.long)
    command = (sys.executable, "-c", f"import os, sys, time\n{end}")
    with pytest.raises((RuntimeError, subprocess.TimeoutExpired), match=r"status -9|status 1: no memory|timed out"):
        gpu_check.wanted(model, tokens, tmp_path, command)


FAKE = """
import os, sys
after = int(sys.argv[-1]) if "--after" in sys.argv else -1
for number in range(after + 1, 5):
    print('{"step": %d}' % number, flush=True)
    if number == 1:
        os.abort()
    print('{"part": %d}' % number, flush=True)
"""


def test_a_process_that_dies_is_named_and_another_goes_on(monkeypatch, tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(gpu_check, "__file__", str(tmp_path / "fake.py"))
    monkeypatch.setattr("megatron_evolve.kernels.bench.rows.device_name", lambda _: "none")
    machine, *rows = gpu_check.report(ARCHITECTURE, time.monotonic() + 60)
    assert machine["model"] == ARCHITECTURE.name and [row.get("part") for row in rows] == [0, None, 2, 3, 4]
    assert (rows[1]["steps"], rows[1]["experts"], rows[1]["ok"]) == (*gpu_check.TRAININGS[0], False)


@pytest.mark.slow
def test_steps_are_told_with_their_plan(megatron):
    row = gpu_steps.trained(ARCHITECTURE, "lora", "eager", rows=2, length=32)
    assert row["ok"] and len(row["losses"]) == gpu_steps.STEPS and row["planned_gib"] > 0
