"""Which implementation each operation takes, for the right reason. Packages and GPUs are feigned, none of them run."""

import json
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_evolve import doctor
from megatron_evolve.kernels import backend
from megatron_evolve.substrate import operations
from megatron_evolve.substrate.operations import NO_GPU, OPERATIONS, PACKAGES, Machine

EVERYTHING = dict.fromkeys(PACKAGES, "9.1")


def chosen(gpu: bool, *modules: str) -> dict[str, operations.Choice]:
    return {name: choose(Machine(gpu, dict.fromkeys(modules, "9.1"))) for name, choose in OPERATIONS.items()}


def test_without_a_gpu_every_operation_is_plain_pytorch_whatever_is_installed() -> None:
    for found in (chosen(False), chosen(False, *PACKAGES)):
        paths = {name: choice.path for name, choice in found.items()}
        assert paths == {
            "experts": "eager",
            "loss": "eager",
            "mamba scan": "pytorch",
            "convolution": "pytorch",
            "gated norm": "pytorch",
            "attention": "pytorch",
            "context parallel": operations.REFUSED,
            "norm": "pytorch",
            "linear": "pytorch",
            "optimizer": "torch AdamW",
            "restarts": "launcher",
        }
        for name in ("experts", "mamba scan", "convolution", "gated norm", "context parallel", "optimizer"):
            assert found[name].why.startswith(NO_GPU), name


@pytest.mark.parametrize(
    ("modules", "operation", "path", "why"),
    [
        ((), "experts", "eager", "triton not installed"),
        (("triton",), "experts", "triton", "fused kernels"),
        ((), "mamba scan", "pytorch", "mamba-ssm and causal-conv1d not installed"),
        (("mamba_ssm",), "mamba scan", "pytorch", "causal-conv1d not installed"),
        (("causal_conv1d", "fla"), "mamba scan", "pytorch", "mamba-ssm not installed"),
        (("mamba_ssm", "causal_conv1d", "triton", "fla"), "convolution", "causal-conv1d", "mamba-ssm's scan calls it"),
        (("triton", "fla"), "convolution", "flash-linear-attention", "fla-core 9.1's Triton kernel"),
        (("causal_conv1d", "fla"), "convolution", "pytorch", "triton not installed"),
        (("triton",), "convolution", "pytorch", "fla-core not installed"),
        ((), "norm", "pytorch", "torch's, one kernel on a GPU too"),
        (("transformer_engine",), "norm", "pytorch", "`launch.training.layers: transformer-engine` takes those"),
        ((), "linear", "pytorch", "Megatron's own layers over torch's products"),
        (("transformer_engine",), "linear", "pytorch", "which this project never ran on a GPU"),
        (("mamba_ssm", "causal_conv1d"), "mamba scan", "mamba-ssm", "mamba-ssm 9.1 and causal-conv1d 9.1 installed"),
        ((), "loss", "eager", "in chunks of logits; Megatron's own for an adapted table"),
        (("triton",), "loss", "triton", "or a trained one's few logits"),
        ((), "gated norm", "pytorch", "triton not installed"),
        (("triton",), "gated norm", "triton", "one kernel after the PyTorch scan"),
        (("triton", "mamba_ssm", "causal_conv1d"), "gated norm", "mamba-ssm", "its scan applies the gate"),
        ((), "optimizer", "torch AdamW", "transformer-engine and apex not installed"),
        (("apex",), "optimizer", "Apex FusedAdam", "Megatron takes it without Transformer Engine; apex 9.1"),
        (("apex", "transformer_engine"), "optimizer", "Transformer Engine FusedAdam", "transformer-engine 9.1"),
        ((), "context parallel", "refused", "transformer-engine not installed"),
        (("transformer_engine",), "context parallel", "transformer-engine", "transformer-engine 9.1 installed"),
        (("nvidia_resiliency_ext",), "restarts", "launcher", "nvidia-resiliency-ext 9.1 is not used: it"),
    ],
)
def test_on_a_gpu_the_packages_decide(modules: tuple[str, ...], operation: str, path: str, why: str) -> None:
    found = chosen(True, *modules)[operation]
    assert found.path == path and why in found.why


def test_layers_of_transformer_engine_are_taken_where_they_are_asked_for_and_there() -> None:
    there = {"transformer_engine": "9.1"}
    for choose in (operations.norm, operations.linear):
        assert choose(Machine(True, there), "transformer-engine").why == "asked for, transformer-engine 9.1 installed"
        assert choose(Machine(True, there), "pytorch").path == choose(Machine(True, there)).path == "pytorch"
        for here, why in ((Machine(True, {}), "transformer-engine not installed"), (Machine(False, there), NO_GPU)):
            assert choose(here, "transformer-engine") == operations.Choice(operations.REFUSED, why)


def test_a_package_is_there_if_its_module_can_be_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = util.find_spec
    monkeypatch.setattr(operations.util, "find_spec", lambda name: None if name in PACKAGES else real(name))
    assert operations.machine(True).versions == {}
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(operations.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(operations.metadata, "version", lambda distribution: "9.1")
    assert operations.machine(True).versions == {name: "9.1" for name in PACKAGES if name != "apex"}  # a web toolkit
    (tmp_path / "optimizers").mkdir()
    assert operations.machine(True).versions == EVERYTHING


@pytest.mark.filterwarnings("ignore:experts are computed by plain PyTorch")
def test_the_doctor_and_the_kernels_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu, block_bytes in ((False, None), (True, None), (True, 232_448), (True, 101_376)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(backend, "block_bytes", lambda block_bytes=block_bytes: block_bytes)
        here = operations.machine(gpu, ask_driver=True)
        small = block_bytes == 101_376
        assert operations.loss(here).path == ("triton" if gpu and not small else "eager")
        assert small == ("101,376 bytes of shared memory" in operations.gated_norm(here).why)
        assert operations.experts(here).path == backend.resolved("auto")
        told = doctor.operations(here, dict.fromkeys((*doctor.REQUIRED, *doctor.OPTIONAL)))
        assert {name: told[name]["path"] for name in OPERATIONS} == {n: f(here).path for n, f in OPERATIONS.items()}


# Packages with the one thing that Megatron's optimizer asks of them.
FUSED = "class FusedAdam: pass\nclass FusedSGD: pass\n"
APEX = {"apex/__init__.py": "", "apex/optimizers/__init__.py": FUSED}
TE = {
    "transformer_engine/__init__.py": "__version__ = '2.9.0'\n",
    "transformer_engine/pytorch/__init__.py": "",
    "transformer_engine/pytorch/optimizers.py": FUSED,
}
WEB_TOOLKIT = {"apex/__init__.py": ""}
# Transformer Engine on a GPU is not among them: all of Megatron asks much more of it than a feigned one has.
CASES = [({}, True), (APEX, True), (WEB_TOOLKIT, True), (APEX, False), (TE | APEX, False)]
# One child a case: what will be taken, said before Megatron is imported, and what Megatron then took.
PROGRAM = """
import json
import os
import sys

import torch
import megatron_evolve.substrate.train.optimizer
from megatron_evolve.substrate import operations
from megatron_evolve.substrate.model import cpu
from megatron_evolve.substrate.recipe import Recipe

for folder, gpu in json.loads(sys.argv[1]):
    if os.fork() == 0:
        sys.path.insert(0, folder)
        said = operations.optimizer(operations.machine(gpu)).path
        torch.cuda.is_available = lambda: gpu
        cpu.install()  # nothing where a GPU is
        took = [megatron_evolve.substrate.train.optimizer.optimizer_taken(Recipe(optimizer=o)) for o in ("adam", "sgd")]
        print(json.dumps([said, *took]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.parametrize(("version", "fits"), [("0.4.1", False), ("0.5.0rc1", False), ("0.6.0", True), ("1.0", True)])
def test_a_resiliency_package_that_megatron_cannot_be_imported_beside_is_hidden(
    version: str, fits: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """0.4.1 has the modules that Megatron asks for and no `__version__`, as in its wheel."""
    from megatron_evolve.substrate.model import build

    build.prepare()
    from megatron.core.dist_checkpointing.strategies import nvrx

    asked = tmp_path / "nvidia_resiliency_ext" / "checkpointing" / "async_ckpt"
    asked.mkdir(parents=True)
    for name in ("core", "cached_metadata_filesystem_reader", "filesystem_async", "state_dict_saver"):
        (asked / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    here = Machine(True, {"nvidia_resiliency_ext": version})
    monkeypatch.setattr(operations, "machine", lambda gpu: here)
    assert bool(operations.unfit(here)) == ("hidden from Megatron" in operations.restarts(here).why) == (not fits)
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "nvidia_resiliency_ext", raising=False)
        build.prepare()
        assert ("nvidia_resiliency_ext" in sys.modules) == (not fits)
        if not fits:
            assert nvrx.has_nvrx_async_support() is False
        sys.modules.pop("nvidia_resiliency_ext", None)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="feigns a GPU")
def test_megatron_takes_the_optimizer_that_was_foretold(tmp_path: Path) -> None:
    arguments = []
    for number, (packages, gpu) in enumerate(CASES):
        folder = tmp_path / str(number)
        for name, text in packages.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        arguments.append((str(folder), gpu))
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(arguments)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    torch_s = ["torch AdamW", "torch.optim.adamw.AdamW", "torch.optim.sgd.SGD"]
    apex = ["Apex FusedAdam", "apex.optimizers.FusedAdam", "apex.optimizers.FusedSGD"]
    assert [json.loads(line) for line in run.stdout.splitlines()] == [torch_s, apex, torch_s, torch_s, torch_s]
