"""Whether the compiled kernels are right on a GPU: what Triton's interpreter on a CPU cannot know.

Every op forward and backward against float64 on the same device, in bfloat16 and float32; the experts over every tile
that the table has for their shape, and at its edges; what Megatron's layers call besides (`doors`); the same bits
twice; no wait of the host; and each op's forward and backward captured in one CUDA graph and replayed on new numbers. A
check is a row with `ok`; nothing here is timed.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_evolve.kernels import reference
from megatron_evolve.kernels.bench import doors
from megatron_evolve.kernels.bench import problem as problems
from megatron_evolve.kernels.bench.cases import DTYPES, Case, Prepare, experts, memory_bound
from megatron_evolve.kernels.bench.problem import Prepared, Problem
from megatron_evolve.kernels.bench.rows import FAILURES, TOLERANCE, examined, outcome, parts_of, settle, stopped
from megatron_evolve.kernels.bench.shares import Turn, everything
from megatron_evolve.kernels.linear_cross_entropy import linear_cross_entropy
from megatron_evolve.kernels.roofline import Shape, shape_of
from megatron_evolve.kernels.tile_table import entries, mean_rows, shape_key

# bfloat16 is held to what plain PyTorch loses on the same inputs and device, and half more
TIMES_EAGER = 1.5
MOVING = ("route_plan", "permute", "unpermute", "router", "gated_norm")  # of `cases.memory_bound`


class Sizes(NamedTuple):
    """How large the checks are; the widths of Nemotron-3-Nano unless a test asks for less."""

    width: int = 2688
    hidden: int = 1856
    vocabulary: int = 131_072
    tokens: int = 512
    rows_per_expert: tuple[int, ...] = ()  # mean rows; where none are named, one for each entry of the tile table
    graph_rows: int = 768  # of a captured layer: an entry whose matrices come by the copy engine
    dtypes: tuple[str, ...] = ("bfloat16", "float32")

    def rows(self) -> tuple[int, ...]:
        key = shape_key(self.hidden, self.width)
        key = key if any(entry.shape == key for entry in entries()) else None  # those for any other shape
        return self.rows_per_expert or tuple(mean_rows(entry) for entry in entries() if entry.shape == key)


def poison(device: str) -> None:
    """Fill memory with NaN and leave it to torch's allocator: what a kernel leaves unwritten may then show.

    What else this process keeps and does not use goes back to the GPU first: a trained head takes 6 GB of it
    beside its own tensors, and a dozen processes share it.
    """
    settle(device)
    torch.full((2**27,), float("nan"), device=device)


def expert_shapes(sizes: Sizes) -> Iterator[tuple[str, Shape, float]]:
    """Name, shape and skew: each tile, and the edges."""
    H, F = sizes.width, sizes.hidden
    for rows in sizes.rows():
        yield f"{rows} rows an expert", Shape("check", rows * 8 // 4, 8, 4, H, F), 0.5
    yield "odd sizes", Shape("check", 35, 7, 3, 97, 47), 0.0
    yield "one choice, one expert takes all", Shape("check", 60, 5, 1, H // 4, F // 4), 4.0
    yield "all chosen", Shape("check", 9, 4, 4, H // 4, F // 4), 0.0
    yield "no rows", Shape("check", 0, 4, 2, H // 4, F // 4), 0.0


def judged(name: str, dtype: str, check: Callable[[], dict]) -> dict:
    """The row of a check: what it found, or what stopped it."""
    row = {"check": name, "dtype": dtype, "ok": False}
    try:
        found = check()
    except FAILURES as failure:
        return row | stopped(failure)
    return row | {"ok": "reason" not in found} | found


def beyond(run: Prepared, problem: Problem, device: str, plain: Prepared | None = None) -> dict:
    """Error, bits of a second run and waits of the host; `reason` where one of them is not as it must be."""
    want = problem.want()
    found, got = examined(run, problem, want, device)
    if "reason" in found:
        return found
    if plain is not None and got["out"].dtype == torch.bfloat16:
        eager = outcome(parts_of(plain, problem), problem)
        for name, value in want.items():
            mine, theirs = found["errors"][name], problems.error(eager[name], value)
            if mine > TIMES_EAGER * theirs:
                return found | {"reason": f"{name} is off by {mine:.2g}, plain PyTorch in bfloat16 by {theirs:.2g}"}
    if not found["bitwise_repeat"]:
        return found | {"reason": "a second run gave other bits"}
    if found["syncs"]:
        return found | {"reason": f"the host waited for the GPU {found['syncs']} times"}
    return found


def check_experts(device: str, sizes: Sizes, mine: Turn = everything) -> Iterator[dict]:
    for dtype in sizes.dtypes:
        for name, shape, max_vio in expert_shapes(sizes):
            # compiling in float32 takes a second a kernel: adapters alone take it through each
            for mode in ("full", "lora") if dtype == "bfloat16" or shape.width < sizes.width else ("lora",):
                case = Case(shape._replace(rank=16 if mode == "lora" else 0), mode, max_vio, dtype)

                def check(case: Case = case) -> dict:
                    problem, prepare = experts(case, device, ("triton", "eager"))
                    # plain PyTorch is asked only where there is something to compute: an empty embedding bag is its own
                    plain = prepare["eager"][1]() if case.shape.tokens else None
                    return beyond(prepare["triton"][1](), problem, device, plain)

                if mine():
                    yield judged(f"experts: {name}, {mode}", dtype, check)


def moving(op: str, device: str, sizes: Sizes, dtype: str) -> tuple[Problem, Prepare]:
    """That one of the ops that move memory; making it runs the route plan."""
    made = memory_bound(device, sizes.tokens, triton=True, dtype=DTYPES[dtype])
    return next((problem, prepare) for problem, prepare in made if problem.op == op)


def check_memory_bound(device: str, sizes: Sizes, mine: Turn = everything) -> Iterator[dict]:
    for dtype in sizes.dtypes:
        for op in MOVING:

            def check(op: str = op, dtype: str = dtype) -> dict:
                problem, prepare = moving(op, device, sizes, dtype)
                return beyond(prepare["triton"][1](), problem, device)

            if mine():
                yield judged(op, dtype, check)


def loss(device: str, sizes: Sizes, dtype: str) -> tuple[Problem, Prepared]:
    rng = torch.Generator(device).manual_seed(2)
    new = {"generator": rng, "device": device}
    x_TH = torch.randn(sizes.tokens, sizes.width, dtype=DTYPES[dtype], **new).requires_grad_()
    W_VH = torch.randn(sizes.vocabulary, sizes.width, dtype=DTYPES[dtype], **new) * sizes.width**-0.5
    target_T = torch.randint(sizes.vocabulary, (sizes.tokens,), **new)
    dloss_T = torch.rand(sizes.tokens, **new)

    def want() -> dict[str, Tensor]:
        wide = x_TH.detach().double().requires_grad_()
        loss_T = reference.linear_cross_entropy(wide, W_VH.double(), target_T)
        return {"out": loss_T.detach(), "dx": torch.autograd.grad(loss_T, wide, dloss_T.double())[0]}

    held = (x_TH, W_VH, target_T, dloss_T)
    problem = Problem("linear_cross_entropy", {}, {"x": x_TH}, dloss_T, (x_TH,), held, want, {})
    return problem, lambda: linear_cross_entropy(x_TH, W_VH, target_T)


def check_loss(device: str, sizes: Sizes, mine: Turn = everything) -> Iterator[dict]:
    for dtype in sizes.dtypes:

        def check(dtype: str = dtype) -> dict:
            problem, run = loss(device, sizes, dtype)
            return beyond(run, problem, device)

        def trained(dtype: str = dtype) -> dict:
            problem, _ = loss(device, sizes, dtype)
            _, W_VH, target_T, _ = problem.given
            problem, run = doors.trained_head(problem, W_VH, target_T)
            return beyond(run, problem, device)

        for name, ask in (("linear_cross_entropy", check), ("linear_cross_entropy, trained head", trained)):
            if mine():
                yield judged(name, dtype, ask)


def check_doors(device: str, sizes: Sizes, mine: Turn = everything) -> Iterator[dict]:
    """Experts from rows, into main gradients and clamped, and the router from logits."""
    for dtype in sizes.dtypes:

        def clamped(dtype: str = dtype) -> dict:
            problem, run = doors.clamped(doors.layer(device, sizes.width, sizes.hidden, DTYPES[dtype]))
            return beyond(run, problem, device)

        def accumulated(dtype: str = dtype) -> dict:
            return doors.into_main_grads(doors.layer(device, sizes.width, sizes.hidden, DTYPES[dtype]))

        named = {"experts from rows, clamped": clamped, "experts from rows, into main gradients": accumulated}
        for name, check in named.items():
            if mine():
                yield judged(name, dtype, check)

    def from_logits() -> dict:
        problem, run = doors.router(device, sizes.tokens, shape_of("nano", sizes.tokens))
        return beyond(run, problem, device)

    if mine():
        yield judged("router from logits", "float32", from_logits)


def graph_problems(device: str, sizes: Sizes) -> Iterator[tuple[str, Callable[[], tuple[Problem, Prepared]]]]:
    """Every op once, in bfloat16, by name: the experts trained whole and with adapters, then those beside them."""
    shape = Shape("check", sizes.graph_rows * 2, 8, 4, sizes.width, sizes.hidden)

    def layer(case: Case) -> tuple[Problem, Prepared]:
        problem, prepare = experts(case, device, ("triton",))
        return problem, prepare["triton"][1]()

    def beside(op: str) -> tuple[Problem, Prepared]:
        problem, prepare = moving(op, device, sizes, "bfloat16")
        return problem, prepare["triton"][1]()

    for case in (Case(shape, "full"), Case(shape._replace(rank=16), "lora")):
        yield f"experts, {case.mode}", lambda case=case: layer(case)
    for op in MOVING:
        yield op, lambda op=op: beside(op)
    yield "linear_cross_entropy", lambda: loss(device, sizes, "bfloat16")


def replayed(problem: Problem, run: Prepared) -> dict:
    """Forward and backward captured in one CUDA graph and replayed on other numbers: the bits of a plain run."""
    parts = parts_of(run, problem)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            outcome(parts, problem)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outcome(parts, problem)
    with torch.no_grad():
        for tensor in problem.fresh:
            tensor.normal_()
    graph.replay()
    torch.cuda.synchronize()
    plain = outcome(parts, problem)
    other = [name for name, value in plain.items() if not torch.equal(value, captured[name])]
    return {"reason": f"replayed, {', '.join(other)} differ from a plain run"} if other else {}


def check_graph(device: str, sizes: Sizes, mine: Turn = everything) -> Iterator[dict]:
    for name, make in graph_problems(device, sizes):
        if mine():
            yield judged(f"{name} in a CUDA graph", "bfloat16", lambda make=make: replayed(*make()))


def checks(device: str, sizes: Sizes, mine: Turn = everything) -> Iterator[dict]:
    """Every check in turn, or a share of them; the graphs last, for a failed capture may leave a device unusable."""
    poison(device)
    for check in (check_experts, check_memory_bound, check_loss, check_doors, check_graph):
        for row in check(device, sizes, mine):
            yield row
            poison(device)


def tolerances() -> dict[str, float]:
    return {str(dtype).removeprefix("torch."): most for dtype, most in TOLERANCE.items()}
