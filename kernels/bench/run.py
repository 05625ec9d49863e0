"""A whole benchmark: which providers a machine can be asked for, case after case, rows as they come."""

from collections.abc import Iterable, Iterator

import torch

from megatron_evolve.kernels.bench import gated
from megatron_evolve.kernels.bench.cases import Case, experts, memory_bound, predicted, told
from megatron_evolve.kernels.bench.clock import Clock
from megatron_evolve.kernels.bench.providers import PEERS, PROVIDERS, own_version, peers
from megatron_evolve.kernels.bench.rows import (
    FAILURES,
    MISSING,
    REFUSED,
    commit,
    counted,
    device_name,
    measure,
    untimed,
)
from megatron_evolve.kernels.roofline import CHIPS, Chip, Pass, Shape, others
from megatron_evolve.kernels.tile_table import chosen

# torch._grouped_mm has no fast form on a CPU, interpreted kernels tell no time, and other people's packages want a GPU
CPU_PROVIDERS = ("eager", "loop")
GPU_PROVIDERS = ("triton", "unfused", "eager", "loop")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def providers_on(device: str) -> tuple[str, ...]:
    """Ours, PyTorch's, and on a GPU other people's that are installed."""
    return (*GPU_PROVIDERS, *installed()) if device.startswith("cuda") else CPU_PROVIDERS


def installed() -> tuple[str, ...]:
    """Providers of the same layer from packages that are here."""
    return tuple(name for name, version in peers().items() if version is not None and name in PROVIDERS)


def bench(
    cases: Iterable[Case], device: str, names: tuple[str, ...], *, rounds: int = 20, chip: Chip | None = None
) -> Iterator[dict]:
    """Rows of every case, for each provider."""
    unknown = set(names) - set(PROVIDERS)
    if unknown:
        raise ValueError(f"providers are {', '.join(PROVIDERS)}; got {', '.join(sorted(unknown))}: name some of them")
    clock = Clock(device)
    for case in cases:
        base = {"op": "experts", "pass": "both", "shape": told(case), "median_ms": None, "error": None, "ratio_to": {}}
        base |= {"device": device_name(device), "commit": commit()}
        try:
            problem, prepare = experts(case, device, names)
            for row in measure(problem, prepare, device, clock=clock, rounds=rounds, chip=chip):
                yield row | ({"tiles": tiles_of(case)} if row["provider"] == "triton" else {})
        except FAILURES as failure:  # the tensors or the oracle do not fit this GPU
            for name in names:
                yield base | {"provider": name, "version": PROVIDERS[name].version()} | untimed(failure)


def tiles_of(case: Case) -> dict[str, tuple[int, ...]]:
    """What the kernels take for that layer: a row whose tiles nobody wrote down cannot be explained afterwards."""
    s = case.shape
    return {kind: tuple(tile) for kind, tile in chosen(s.hidden, s.width, s.rows, s.experts)._asdict().items()}


def bench_gated(shapes: Iterable[Shape], device: str, *, rounds: int = 20, chip: Chip | None = None) -> Iterator[dict]:
    """Liger's fused experts, where Liger is installed and a GPU is there; nothing otherwise."""
    version = peers()["liger"]
    if version is None or not device.startswith("cuda"):
        return
    for shape in shapes:
        problem, prepare = gated.liger(shape, f"liger-kernel {version}", device)
        yield from measure(problem, prepare, device, rounds=rounds, chip=chip)


def without_time(device: str) -> Iterator[dict]:
    """A row for each package of others that this machine cannot ask, with why."""
    row = {"op": "experts", "pass": "both", "shape": {}, "median_ms": None, "error": None, "ratio_to": {}}
    row |= {"device": device_name(device), "commit": commit()}
    for name, version in peers().items():
        if version is None:
            yield row | {
                "provider": name,
                "version": None,
                "kind": MISSING,
                "reason": f"{PEERS[name]} is not installed",
            }
        elif not device.startswith("cuda"):
            reason = "other people's packages are asked on a GPU, and torch finds none"
            yield row | {"provider": name, "version": version, "kind": REFUSED, "reason": reason}


def bench_memory_bound(
    device: str, *, tokens: int = 16384, rounds: int = 20, chip: Chip | None = None
) -> Iterator[dict]:
    """The ops that only move memory."""
    clock = Clock(device)
    for problem, prepare in memory_bound(device, tokens, triton=device.startswith("cuda")):
        yield from measure(problem, prepare, device, clock=clock, rounds=rounds, chip=chip)


def model(cases: Iterable[Case], chip: str) -> Iterator[dict]:
    """Rows without a measurement: what the roofline predicts for the fused and the unfused path."""
    _check_chip(chip)
    for case in cases:
        for provider, by_part in predicted(case).items():
            both = by_part["forward"] + by_part["backward"]
            for part, passes in (by_part | {"both": both}).items():
                yield _predicted("experts", part, provider, told(case), passes, chip)


def model_others(chip: str, *, tokens: int = 16384) -> Iterator[dict]:
    """The same for the ops beside the experts."""
    _check_chip(chip)
    for op, by_part in others(tokens).items():
        for part, passes in by_part.items():
            yield _predicted(op, part, "triton", {"model": "nano", "tokens": tokens}, passes, chip)


def _check_chip(chip: str) -> None:
    if chip not in CHIPS:
        raise ValueError(f"the chip must be one of {', '.join(CHIPS)}; got {chip!r}: name one of them")


def _predicted(op: str, part: str, provider: str, shape: dict, passes: tuple[Pass, ...], chip: str) -> dict:
    row = {"op": op, "pass": part, "provider": provider, "version": own_version(), "shape": shape}
    row |= {"median_ms": None, "reason": "predicted, not measured", "error": None, "ratio_to": {}, "predicted": True}
    return row | counted(passes, CHIPS[chip]) | {"device": CHIPS[chip].name, "commit": commit()}
