"""The doctor: what is installed, which path each operation will take and why, and what to do next.

Nothing is imported to find out (a broken package must not break the doctor): presence and versions come from package
metadata, devices from the operating system.
"""

import os
import platform
import shutil
from importlib import metadata, util
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

REQUIRED = ("torch", "megatron-core", "triton", "numpy", "scipy", "pyarrow", "pydantic", "safetensors", "transformers")
OPTIONAL = {
    "transformer-engine": "fused norms and linears on NVIDIA GPUs: pip install 'megatron-evolve[te]'",
    "mamba-ssm": "CUDA kernels of the Mamba-2 scan: pip install 'megatron-evolve[ssm]'",
    "causal-conv1d": "CUDA kernel of Mamba's convolution: pip install 'megatron-evolve[ssm]'",
    "nemo-toolkit": "prompt formats of real checkpoints: pip install 'megatron-evolve[nemo]'",
    "openai": "the judge's engine openai, a language model as proposer: pip install 'megatron-evolve[llm]'",
    "vllm": "a server that the judge's engine openai can start; where its CUDA is, in this environment or on the path",
    "megatron-bridge": "a second path for full-size checkpoints: pip install 'megatron-evolve[bridge]'",
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
        "launchers": {"local": True, "slurm": shutil.which("sbatch") is not None},
        "operations": operations(bool(gpus), packages),
        "next": advice(packages),
    }


def version(name: str) -> str | None:
    """Installed version, none if absent."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def gpu_names() -> list[str]:
    """NVIDIA GPUs as the driver lists them, without loading CUDA."""
    root = Path("/proc/driver/nvidia/gpus")
    names = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        lines = (folder / "information").read_text().splitlines()
        names.append(next((line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")), "NVIDIA GPU"))
    return names


def memory_bytes() -> int:
    """Physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def apex() -> str:
    """`absent`, `nvidia`, or `other`: the package of that name on PyPI is not NVIDIA's."""
    if util.find_spec("apex") is None:
        return "absent"
    found = util.find_spec("apex")
    place = Path(next(iter(found.submodule_search_locations or []), ""))
    return "nvidia" if (place / "optimizers").is_dir() else "other"


def operations(gpu: bool, packages: dict[str, str | None]) -> dict[str, dict[str, str]]:
    """Which path each operation takes here, and why."""
    lacking = [name for name in ("mamba-ssm", "causal-conv1d") if not packages[name]]
    why_cpu = "no GPU on this machine"
    return {
        "experts": path("triton", "fused kernels; `launch.training.experts: eager` is plain PyTorch")
        if gpu and packages["triton"]
        else path("eager", "triton is not installed" if gpu else why_cpu),
        "mamba scan": path("mamba-ssm", "installed with causal-conv1d, and a GPU is there")
        if gpu and not lacking
        else path("pytorch", f"{' and '.join(lacking)} not installed" if gpu else why_cpu),
        "attention": path("pytorch", "packed sequences too; Transformer Engine's is not wired in yet"),
        "norm": path("pytorch RMSNorm", "Transformer Engine's is not wired in yet"),
        "optimizer": path(
            "torch AdamW, fused", "NVIDIA Apex is not used on CPU" if not gpu else "Apex is not wired in yet"
        ),
        "decoding": path("greedy, own state caches", "convolution, SSM and key-value state are kept between tokens"),
        **engines(packages, shutil.which("vllm") is not None),
        "communication": path("nccl", "a GPU is there") if gpu else path("gloo", why_cpu),
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
