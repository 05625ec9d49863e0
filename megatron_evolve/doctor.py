"""The doctor: what is installed, which path each operation will take and why, and what to do next.

Nothing is imported to find out (a broken package must not break the doctor): presence and versions come from package
metadata, devices from the operating system, the size of their blocks from the CUDA driver.
"""

import os
import platform
import shutil
from importlib import metadata, util
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_evolve.substrate.operations import NO_GPU, OPERATIONS, Machine, gpu_names, is_nvidia_apex, machine

REQUIRED = ("torch", "megatron-core", "triton", "numpy", "scipy", "pyarrow", "pydantic", "safetensors", "transformers")
OPTIONAL = {
    "transformer-engine": "Adam, context parallelism and layers on NVIDIA GPUs: pip install 'megatron-evolve[te]'",
    "mamba-ssm": "CUDA kernels of the Mamba-2 scan: pip install 'megatron-evolve[ssm]'",
    "causal-conv1d": "CUDA kernel of Mamba's convolution: pip install 'megatron-evolve[ssm]'",
    "fla-core": "Triton kernel of Mamba's convolution where mamba-ssm is not: pip install 'megatron-evolve[fla]'",
    "nemo-toolkit": "prompt formats of real checkpoints: pip install 'megatron-evolve[nemo]'",
    "openai": "the judge's engine openai, a language model as proposer: pip install 'megatron-evolve[llm]'",
    "vllm": "a server that the judge's engine openai can start; where its CUDA is, in this environment or on the path",
    "tensorboard": "event files of training: pip install 'megatron-evolve[track]'",
}
APEX_REMEDY = (
    "NVIDIA Apex is built from source (pip install --no-build-isolation git+https://github.com/NVIDIA/apex); the PyPI "
    "package called apex is an unrelated web toolkit"
)


def examine() -> dict[str, Any]:
    """What this machine has, as data."""
    gpus = gpu_names()
    packages = {name: version(name) for name in (*REQUIRED, *OPTIONAL)}
    return {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory_bytes() / 1e9, 1),
        "gpus": gpus,
        "packages": packages,
        "apex": apex(),
        "launchers": {
            "local": True,
            "slurm": shutil.which("sbatch") is not None,
            "kubernetes": util.find_spec("kubernetes") is not None,
        },
        "operations": operations(machine(bool(gpus), ask_driver=True), packages),
        "next": advice(packages),
    }


def version(name: str) -> str | None:
    """Installed version, none if absent."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def memory_bytes() -> int:
    """Physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def apex() -> str:
    """`absent`, `nvidia`, or `other`: the package of that name on PyPI is not NVIDIA's."""
    if util.find_spec("apex") is None:
        return "absent"
    return "nvidia" if is_nvidia_apex() else "other"


def operations(here: Machine, packages: dict[str, str | None]) -> dict[str, dict[str, str]]:
    """Which path each operation takes here, and why: what is built asks the same file."""
    taken = {name: choose(here) for name, choose in OPERATIONS.items()}
    return {
        **{name: path(choice.path, choice.why) for name, choice in taken.items()},
        "decoding": path("greedy, own state caches", "convolution, SSM and key-value state are kept between tokens"),
        **engines(packages, shutil.which("vllm") is not None),
        "communication": path("nccl", "a GPU is there") if here.gpu else path("gloo", NO_GPU),
    }


def engines(packages: dict[str, str | None], vllm_on_path: bool) -> dict[str, dict[str, str]]:
    """Which engines the judge can decode with here."""
    missing = [name for name in ("torch", "megatron-core") if packages[name] is None]
    kernels = " and ".join(name for name in ("mamba-ssm", "causal-conv1d") if packages[name])
    told = {"engine megatron": path("greedy, in process", "the run's own model, as `decoding` says")}
    if missing:
        told["engine megatron"] = path("none", f"{' and '.join(missing)} is missing")
    told["engine transformers"] = path("greedy, in process", f"with {kernels or 'its own PyTorch code'}")
    if missing or packages["transformers"] is None:
        told["engine transformers"] = path("none", "transformers, torch or megatron-core is missing")
    server = "and vllm is there to be started" if vllm_on_path else "an endpoint that runs, or a server's command line"
    told["engine openai"] = path("streamed HTTP", f"the client is installed, {server}")
    if packages["openai"] is None:
        told["engine openai"] = path("none", "openai is not installed")
    return told


def path(taken: str, why: str) -> dict[str, str]:
    """One row of `operations`."""
    return {"path": taken, "why": why}


def advice(packages: dict[str, str | None]) -> list[str]:
    """What to do next."""
    missing = [name for name in REQUIRED if packages[name] is None]
    said = [f"install what is missing: {', '.join(missing)} (pip install -e .)"] if missing else []
    if apex() == "other":
        said.append(f"the installed package `apex` is not NVIDIA's: remove it; {APEX_REMEDY}")
    return said or ["run `megatron-evolve run demo --dir runs/demo`"]


def show(found: dict[str, Any]) -> None:
    """The findings as tables."""
    console = Console(highlight=False)
    gpus = ", ".join(found["gpus"]) or "no GPU"
    console.print(f"Python {found['python']}, {found['cores']} cores, {found['memory_gb']} GB, {gpus}")
    packages = Table("package", "version", "what for", box=None)
    for name, got in found["packages"].items():
        packages.add_row(name, got or "-", "" if got else escape(OPTIONAL.get(name, "required: pip install -e .")))
    packages.add_row("apex", found["apex"], "" if found["apex"] == "nvidia" else APEX_REMEDY)
    console.print(packages)
    table = Table("operation", "path", "why", box=None)
    for name, one in found["operations"].items():
        table.add_row(name, one["path"], one["why"])
    console.print(table)
    for line in found["next"]:
        console.print(f"next: {line}")
