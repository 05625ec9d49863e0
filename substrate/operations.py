"""Which implementation each operation takes on a machine, and why: one answer for who builds and for who reports.

    here = machine(gpu=bool(gpu_names()))
    optimizer(here)         Choice(path="Apex FusedAdam", why="apex 0.1 is importable, and a GPU is there")

Nothing is imported to find out, and torch is not needed: a package is there if its module can be found, and its version
is what its metadata say. One that is there and broken is taken for good here; who imports it tells its error.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from types import MappingProxyType

from megatron_evolve.kernels import backend

# module: the distribution that brings it
PACKAGES = {
    "triton": "triton",
    "transformer_engine": "transformer-engine",
    "mamba_ssm": "mamba-ssm",
    "causal_conv1d": "causal-conv1d",
    "fla": "fla-core",
    "apex": "apex",
    "nvidia_resiliency_ext": "nvidia-resiliency-ext",
}
# Megatron takes these wherever they can be imported, and their kernels run on a GPU alone: see `model.cpu`.
MEGATRON_TAKES = ("transformer_engine", "apex")
# Megatron 0.19 looks for this package's version while it is imported, and does not get past one that is older.
LEAST_RESILIENCY = (0, 6)
NO_GPU = "no GPU on this machine"
REFUSED = "refused"
TRANSFORMER_ENGINE = "transformer-engine"
# What a run may ask for its norms and dense linear layers.
LAYERS = ("auto", "pytorch", TRANSFORMER_ENGINE)


@dataclass(frozen=True)
class Choice:
    """The implementation taken, and the reason."""

    path: str
    why: str

    @property
    def serves(self) -> bool:
        """Whether there is any."""
        return self.path != REFUSED


@dataclass(frozen=True)
class Machine:
    """All that the choices depend on: whether there is a GPU, and the version of each package that is there."""

    gpu: bool
    versions: Mapping[str, str]  # by module
    block_bytes: int | None = None  # shared memory of a block, of the GPU that has least; None: not known

    def has(self, *modules: str) -> bool:
        """Whether there is a GPU, and every one of these modules."""
        return self.gpu and all(module in self.versions for module in modules)

    def names(self, *modules: str) -> str:
        """Those that are there, with their versions."""
        return " and ".join(f"{PACKAGES[name]} {self.versions[name]}" for name in modules)

    def lacks(self, *modules: str) -> str:
        """Why `has` is false."""
        missing = " and ".join(PACKAGES[module] for module in modules if module not in self.versions)
        return f"{missing} not installed" if self.gpu else NO_GPU


def machine(gpu: bool, *, ask_driver: bool = False) -> Machine:
    """This process's machine. `gpu` is the caller's finding: the driver's list, or torch's once it is loaded.

    Who tells the form of the experts asks the CUDA driver too: not a process whose forked children use a GPU.
    """
    versions = {name: _version(distribution) for name, distribution in PACKAGES.items() if util.find_spec(name)}
    if "apex" in versions and not is_nvidia_apex():
        del versions["apex"]
    return Machine(gpu, MappingProxyType(versions), backend.block_bytes() if gpu and ask_driver else None)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of unknown version"  # a source tree on the path, as Apex often is


def is_nvidia_apex() -> bool:
    """Whether the module `apex` is NVIDIA's: the package of that name on PyPI is a web toolkit."""
    found = util.find_spec("apex")
    place = Path(next(iter((found and found.submodule_search_locations) or []), ""))
    return found is not None and (place / "optimizers").is_dir()


def gpu_names() -> list[str]:
    """NVIDIA GPUs as the driver lists them, without loading CUDA."""
    root = Path("/proc/driver/nvidia/gpus")
    names = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        lines = (folder / "information").read_text().splitlines()
        names.append(next((line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")), "NVIDIA GPU"))
    return names


def experts(here: Machine) -> Choice:
    """The routed experts' maths, as `kernels.backend` resolves `auto`."""
    if not here.has("triton"):
        return Choice("eager", here.lacks("triton"))
    if reason := backend.too_small(here.block_bytes):
        return Choice("eager", reason)
    return Choice("triton", "fused kernels; `launch.training.experts: eager` is plain PyTorch")


def loss(here: Machine) -> Choice:
    """Output table and loss together (`model.head`); the experts' setting decides both."""
    taken = experts(here)
    return Choice(taken.path, "in chunks of logits; Megatron's own for an adapted table, or a trained one's few logits")


def gated_norm(here: Machine) -> Choice:
    """What follows the scan of Mamba layers: gate and norm in one pass, or two where mamba-ssm's scan gates."""
    scan, taken = mamba_scan(here), experts(here)
    if scan.path == "mamba-ssm":
        return Choice("mamba-ssm", "its scan applies the gate, its norm follows")
    if taken.path == "triton":
        return Choice("triton", "gate and norm in one kernel after the PyTorch scan")
    return Choice("pytorch", taken.why)


def mamba_scan(here: Machine) -> Choice:
    """The scan of Mamba layers: mamba-ssm's calls causal-conv1d, so both or neither."""
    if here.has("mamba_ssm", "causal_conv1d"):
        return Choice("mamba-ssm", f"{here.names('mamba_ssm', 'causal_conv1d')} installed, and a GPU is there")
    return Choice("pytorch", here.lacks("mamba_ssm", "causal_conv1d"))


def convolution(here: Machine) -> Choice:
    """The convolution before the scan; flash-linear-attention's where this package's own kernels follow the scan."""
    if mamba_scan(here).path == "mamba-ssm":
        return Choice("causal-conv1d", "mamba-ssm's scan calls it")
    if here.has("triton", "fla"):
        return Choice("flash-linear-attention", f"{here.names('fla')}'s Triton kernel before the PyTorch scan")
    return Choice("pytorch", here.lacks("triton", "fla"))


def attention(here: Machine) -> Choice:
    """Core attention on one context-parallel rank."""
    return Choice("pytorch", "also for packed sequences; Transformer Engine's serves context parallelism alone")


def context_parallel(here: Machine) -> Choice:
    """Core attention where the sequence is split over ranks, which torch's does not do."""
    if here.has("transformer_engine"):
        return Choice(TRANSFORMER_ENGINE, f"{here.names('transformer_engine')} installed, and a GPU is there")
    return Choice(REFUSED, here.lacks("transformer_engine"))


def norm(here: Machine, asked: str = "auto") -> Choice:
    """Norms between layers; `asked` is one of LAYERS."""
    return _layers(here, asked, "torch's, one kernel on a GPU too")


def linear(here: Machine, asked: str = "auto") -> Choice:
    """Dense matrix products outside the experts; `asked` is one of LAYERS."""
    return _layers(here, asked, "Megatron's own layers over torch's products")


def _layers(here: Machine, asked: str, why: str) -> Choice:
    """Transformer Engine's only where they are asked for: nobody of this project has seen them run.

    What they would add is not open here: 8-bit arithmetic is refused by the experts, norms are not fused with products
    lest weights change their names, and communication is not overlapped. Left is the same product of the same library.
    """
    if asked == TRANSFORMER_ENGINE:
        if here.has("transformer_engine"):
            return Choice(TRANSFORMER_ENGINE, f"asked for, {here.names('transformer_engine')} installed")
        return Choice(REFUSED, here.lacks("transformer_engine"))
    if asked == "auto" and "transformer_engine" in here.versions:
        why += "; `launch.training.layers: transformer-engine` takes those, which this project never ran on a GPU"
    return Choice("pytorch", why)


def check_layers(here: Machine, asked: str) -> None:
    """Raises ValueError unless `asked` is one of LAYERS and can be had here."""
    if asked not in LAYERS:
        raise ValueError(f"layers must be one of {', '.join(LAYERS)}; got {asked!r}: name one of them")
    if not (choice := linear(here, asked)).serves:
        raise ValueError(f"layers {asked} cannot be had, {choice.why}: take layers pytorch")


def optimizer(here: Machine) -> Choice:
    """Adam as Megatron takes it: what it can import, in this order."""
    if here.has("transformer_engine"):
        return Choice("Transformer Engine FusedAdam", f"Megatron prefers it; {here.names('transformer_engine')}")
    if here.has("apex"):
        return Choice("Apex FusedAdam", f"Megatron takes it without Transformer Engine; {here.names('apex')}")
    return Choice("torch AdamW", NO_GPU if not here.gpu else here.lacks("transformer_engine", "apex"))


def restarts(here: Machine) -> Choice:
    """Who starts a lost run again."""
    why = "from its last resume checkpoint, in a process of its own"
    if "nvidia_resiliency_ext" in here.versions:
        why += (
            f"; {here.names('nvidia_resiliency_ext')} is not used: its restarts happen inside a job, and the process "
            "that writes its checkpoints outlives a killed rank and writes where the next attempt does"
        )
    if unfit(here):
        why += "; it is hidden from Megatron, which asks for 0.6.0 and cannot be imported beside an older one"
    return Choice("launcher", why)


def unfit(here: Machine) -> tuple[str, ...]:
    """Modules that keep Megatron from being imported: nvidia-resiliency-ext of a version before 0.6."""
    version = here.versions.get("nvidia_resiliency_ext")
    if version is None or tuple(map(int, re.findall(r"\d+", version)[:2])) >= LEAST_RESILIENCY:
        return ()
    return ("nvidia_resiliency_ext",)


OPERATIONS = {
    "experts": experts,
    "loss": loss,
    "mamba scan": mamba_scan,
    "convolution": convolution,
    "gated norm": gated_norm,
    "attention": attention,
    "context parallel": context_parallel,
    "norm": norm,
    "linear": linear,
    "optimizer": optimizer,
    "restarts": restarts,
}
