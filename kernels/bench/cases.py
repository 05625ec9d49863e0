"""What is measured: the routed experts by shape, mode and skew, and the ops around them that only move memory.

The default lists are short: what an H100 does in minutes, and what a CPU core finishes. Everything between (any of the
three models, 1 to 32,768 tokens, any number of expert-parallel ranks) is asked for by options of the command.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_evolve.kernels import eager, reference, roofline
from megatron_evolve.kernels.backend import backend
from megatron_evolve.kernels.bench import problem as problems
from megatron_evolve.kernels.bench.problem import Prepared, Problem
from megatron_evolve.kernels.bench.providers import PROVIDERS, own_version
from megatron_evolve.kernels.roofline import BF16, Pass, Shape, shape_of

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
Prepare = dict[str, tuple[str, Callable[[], Prepared]]]  # provider -> its version, and what makes its run


class Case(NamedTuple):
    """One layer's routed experts."""

    shape: Shape
    mode: str  # frozen, full or lora
    max_vio: float = 0.0
    dtype: str = "bfloat16"


def case_of(model: str, tokens: int, ep: int, mode: str, max_vio: float = 0.0) -> Case:
    """`mode` may name the adapter's rank: lora8, lora32."""
    kind, rank = ("lora", mode.removeprefix("lora") or "32") if mode.startswith("lora") else (mode, "0")
    if kind not in roofline.MODES or not rank.isdigit() or (kind == "lora" and rank == "0"):
        raise ValueError(f"mode must be frozen, full, lora8 or lora32; got {mode!r}: name one of them")
    return Case(shape_of(model, tokens, ep, int(rank)), kind, max_vio)


def _largest_vio(model: str) -> float:
    """All T tokens at one of E experts, over the mean of T K / E, less 1."""
    whole = shape_of(model, 1)
    return whole.experts / whole.chosen - 1


def asked(
    model: str, tokens: list[int] | None, ep: list[int] | None, modes: list[str] | None, max_vio: list[float] | None
) -> list[Case]:
    """Every combination of what is named, and of the usual where nothing is. ValueError for a skew that is none."""
    most = _largest_vio(model)
    for vio in max_vio or ():
        if not 0 <= vio <= most:  # not a number compares false as well
            raise ValueError(
                f"max-vio must be from 0 to {most:.1f}, where every token chooses one and the same expert of {model}; "
                f"got {vio}: choose one between"
            )
    return [
        case_of(model, t, ranks, mode, vio)
        for mode in modes or ("frozen", "lora32")
        for ranks in ep or (1, 8)
        for t in tokens or (8192,)
        for vio in max_vio or (0.0,)
    ]


GPU_CASES = (
    *(case_of("nano", 8192, 8, mode) for mode in ("frozen", "full", "lora32", "lora8")),
    *(case_of("nano", 8192, 1, "frozen", max_vio) for max_vio in (0, 1.3, 5, 12)),
    *(case_of("nano", tokens, 1, "frozen") for tokens in (128, 2048, 32768)),
    case_of("nano", 2048, 8, "lora32"),
    case_of("super", 4096, 8, "full"),
    case_of("super", 4096, 8, "lora32"),
    case_of("super", 4096, 1, "frozen"),
    case_of("ultra", 4096, 8, "frozen"),
    case_of("ultra", 2048, 1, "frozen"),  # 21.5 GB of matrices
)
# 64 experts, where slices of sorted rows are to beat a loop by 1.5: at the widths of the nano-cpu preset's experts, and
# at wider ones, where the products themselves weigh more.
CPU_CASES = (
    Case(Shape("nano-cpu widths", 512, 64, 6, 64, 128), "frozen", 0.0, "float32"),
    Case(Shape("nano-cpu widths", 512, 64, 6, 64, 128), "full", 0.0, "float32"),
    Case(Shape("nano-cpu widths", 512, 64, 6, 64, 128), "full", 5.0, "float32"),
    Case(Shape("nano-cpu widths", 512, 64, 6, 64, 128, rank=8), "lora", 0.0, "float32"),
    Case(Shape("wider", 512, 64, 6, 256, 256), "full", 0.0, "float32"),
)


def told(case: Case, max_vio: float | None = None) -> dict[str, object]:
    """The shape as a row has it; `max_vio` as it came out."""
    got = case.max_vio if max_vio is None else max_vio
    shape = case.shape._asdict()
    del shape["gradient_bytes"]
    return shape | {"mode": case.mode, "max_vio": got, "dtype": case.dtype}


def predicted(case: Case) -> dict[str, dict[str, tuple[Pass, ...]]]:
    """By provider: the fused path, and the unfused one without the dispatcher's chunk sort, which is not run here."""
    at = case.shape._replace(gradient_bytes=BF16, ep=1)
    return {
        provider: {part: roofline.passes_of(path, part, at, case.mode) for part in ("forward", "backward")}
        for provider, path in (("triton", "fused"), ("unfused", "unfused"))
    }


def counted(case: Case) -> dict[str, dict[str, tuple[Pass, ...]]]:
    """`predicted`, and for everybody else the operations of the same layer: their bytes are not known here."""
    known = predicted(case)
    products = {part: (Pass("products", sum(p.flops for p in passes), 0),) for part, passes in known["triton"].items()}
    return dict.fromkeys(PROVIDERS, products) | known


def experts(case: Case, device: str, names: tuple[str, ...]) -> tuple[Problem, Prepare]:
    """The routed experts, tokens to tokens."""
    v = problems.experts(case.shape, case.mode, case.max_vio, DTYPES[case.dtype], device)
    found = Problem(
        op="experts",
        shape=told(case, problems.skew_of(v.plan)),
        leaves=v.leaves(),
        dout=v.dout_TH,
        fresh=(v.x_TH, v.dout_TH),
        given=v.tensors(),
        want=lambda: problems.oracle(v),
        predicted=counted(case) if case.dtype == "bfloat16" else {},
    )
    return found, {name: (PROVIDERS[name].version(), lambda name=name: PROVIDERS[name].prepare(v)) for name in names}


def _moved(op: str, shape: dict, values: dict[str, Tensor], dout: Tensor | None, passes, *, fresh, runs) -> tuple:
    """A problem whose oracle is the definition: `runs` maps a provider to a function of the values."""
    leaves = {name: tensor for name, tensor in values.items() if tensor.requires_grad}

    def want() -> dict[str, Tensor]:
        wide = {n: t.detach().double() if t.is_floating_point() else t for n, t in values.items()}
        wide |= {n: wide[n].requires_grad_() for n in leaves}
        out = runs["reference"](wide)
        if dout is None:
            return {"out": out.detach()}
        grads = torch.autograd.grad(out, [wide[n] for n in leaves], dout.to(out.dtype))
        return {"out": out.detach()} | {f"d{n}": grad for n, grad in zip(leaves, grads, strict=True)}

    given = (*values.values(), *(() if dout is None else (dout,)))
    found = Problem(op, shape, leaves, dout, fresh, given, want, {"triton": passes})
    prepared = {name: (own_version(), lambda run=run: lambda: run(values)) for name, run in runs.items()}
    return found, {("plain" if name == "reference" else name): prepared[name] for name in prepared}


def memory_bound(
    device: str, tokens: int, *, triton: bool, dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[Problem, Prepare]]:
    """Plan, permutation and its reverse, and in Triton the router and the gated norm, at Nano's widths.

    `plain` is their definition in PyTorch. The permutations move 37,632 bytes a token in bfloat16, the norm 24,576.
    """
    s = shape_of("nano", tokens)
    ops = backend("triton") if triton else eager
    name = "triton" if triton else "eager"
    rng = torch.Generator(device).manual_seed(1)

    def normal(*size: int, wants: bool = True) -> Tensor:
        return torch.randn(*size, generator=rng, device=device, dtype=dtype).requires_grad_(wants)

    shape = {"model": "nano", "tokens": tokens, "experts": s.experts, "chosen": s.chosen, "width": s.width}
    idx_TK = problems.choices(tokens, s.experts, s.chosen, 1.3).to(device)
    plan, own = reference.route_plan(idx_TK, s.experts), ops.route_plan(idx_TK, s.experts)
    x_TH, y_MH, p_TK = normal(tokens, s.width), normal(s.rows, s.width), torch.rand(tokens, s.chosen, device=device)

    runs = {"reference": lambda v: reference.route_plan(v["idx"], s.experts).choice_of_row_M}
    runs[name] = lambda v: ops.route_plan(v["idx"], s.experts).choice_of_row_M
    passes = roofline.others(tokens)
    yield _moved("route_plan", shape, {"idx": idx_TK}, None, passes["route_plan"], fresh=(), runs=runs)

    dout_MH, dout_TH = normal(s.rows, s.width, wants=False), normal(tokens, s.width, wants=False)
    runs = {"reference": lambda v: reference.permute(v["x"], p_TK, plan)[0]}
    runs[name] = lambda v: ops.permute(v["x"], p_TK, own)[0]
    yield _moved("permute", shape, {"x": x_TH}, dout_MH, passes["permute"], fresh=(x_TH, dout_MH), runs=runs)

    runs = {"reference": lambda v: reference.unpermute(v["y"], plan), name: lambda v: ops.unpermute(v["y"], own)}
    yield _moved("unpermute", shape, {"y": y_MH}, dout_TH, passes["unpermute"], fresh=(y_MH, dout_TH), runs=runs)
    if triton:
        yield from _router_and_norm(tokens, s, normal, device)


def _plain_router(x_TH: Tensor, W_EH: Tensor, bias_E: Tensor, num_chosen: int) -> Tensor:
    wide = torch.promote_types(x_TH.dtype, torch.float32)
    return reference.router(x_TH.to(wide) @ W_EH.to(wide).t(), bias_E, num_chosen, 2.5)[1]


def _router_and_norm(tokens: int, s: Shape, normal: Callable, device: str) -> Iterator[tuple[Problem, Prepare]]:
    from megatron_evolve.kernels.gated_norm import gated_rms_norm
    from megatron_evolve.kernels.router import router_from_tokens

    bias_E = torch.randn(s.experts, device=device) / 100
    # whole numbers, a power of two apart: every sum is exact, so that no rounding decides between two experts
    x_TH = normal(tokens, s.width).detach().round_().requires_grad_()
    W_EH = normal(s.experts, s.width, wants=False).round_() / 32
    dp_TK = torch.randn(tokens, s.chosen, device=device)
    shape = {"model": "nano", "tokens": tokens, "experts": s.experts, "chosen": s.chosen, "width": s.width}
    runs = {
        "reference": lambda v: _plain_router(v["x"], v["W"], bias_E, s.chosen),
        "triton": lambda v: router_from_tokens(v["x"], v["W"], bias_E, s.chosen, 2.5)[1],
    }
    passes = roofline.others(tokens)
    yield _moved("router", shape, {"x": x_TH, "W": W_EH}, dp_TK, passes["router"], fresh=(x_TH, dp_TK), runs=runs)

    D, G = 4096, 8
    y_TD, z_TD, dout_TD = normal(tokens, D), normal(tokens, D), normal(tokens, D, wants=False)
    w_D = torch.rand(D, device=device).requires_grad_()
    values = {"y": y_TD, "z": z_TD, "w": w_D}
    runs = {
        "reference": lambda v: reference.gated_rms_norm(v["y"], v["z"], v["w"], G),
        "triton": lambda v: gated_rms_norm(v["y"], v["z"], v["w"], G),
    }
    shape = {"tokens": tokens, "width": D, "groups": G}
    yield _moved("gated_norm", shape, values, dout_TD, passes["gated_norm"], fresh=(y_TD, z_TD, dout_TD), runs=runs)
