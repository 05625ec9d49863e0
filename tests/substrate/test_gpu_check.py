"""The model's check of a GPU, as far as a CPU can check it: the sentence without one, and the rows of a tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_evolve.substrate import gpu_check
from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.architecture import NANO_CPU

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
    monkeypatch.setattr(gpu_check, "trained", lambda _, mode, experts, layers: {"steps": mode, "experts": experts})
    clock = iter([0.0, 99.0, 101.0, 131.0])
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: next(clock))
    rows = list(gpu_check.trainings(ARCHITECTURE, 100.0))
    assert [(row["steps"], row["experts"]) for row in rows] == list(gpu_check.TRAININGS)
    assert rows[0]["steps"] == "sft" and [row.get("reason") for row in rows[:2]] == [None, None]
    assert rows[2]["reason"] == "not begun: 1 s after the last second given" and "31 s" in rows[3]["reason"]


@pytest.mark.slow
def test_steps_are_told_with_their_plan(megatron):
    row = gpu_check.trained(ARCHITECTURE, "lora", "eager", rows=2, length=32)
    assert row["ok"] and len(row["losses"]) == gpu_check.STEPS and row["planned_gib"] > 0
