"""What the expert tests of every backend share: cases, inputs, the whole layer with its gradients, and one error."""

import torch
from torch import Tensor

# Largest `error` of a float32 kernel against float64, for every op but pure copies: eps is 1.2e-7, sums are float32 of
# up to 5,000 terms; measured at most 7.0e-7 (slope of a clamp; experts 4.1e-7, loss 3.8e-7, router 1.8e-7).
# What bfloat16 is held to stands beside each test: plain PyTorch's own error on the same inputs, and how many times.
FLOAT32 = 2e-6

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# T, E, K, H, F and which experts a token may choose
CASES = {
    "plain": (24, 4, 2, 16, 24, None),
    "odd": (13, 7, 3, 7, 5, None),
    "one choice": (17, 5, 1, 8, 12, None),
    "all chosen": (9, 4, 4, 8, 6, None),
    "empty experts": (20, 6, 2, 8, 12, (1, 3, 4)),
    "one expert takes all": (20, 5, 1, 8, 12, (2,)),
    "no rows": (0, 4, 2, 8, 12, None),
}


# The kernels' own edges. Tiles are 128 columns wide and 16, 32, 64 or 128 rows high, by the mean rows per expert.
TILE_CASES = {
    "plain": (40, 4, 2, 64, 128, None),  # 20 rows per expert: tiles of 32
    "odd": (35, 7, 3, 97, 47, None),  # 15: tiles of 16; nothing divides by 16, so no wide loads either
    "a tile and a half": (24, 2, 1, 48, 192, None),  # F = 1856 is 14.5 tiles of 128; here 1.5
    "one token": (1, 5, 2, 32, 48, None),
    "one choice": (33, 5, 1, 32, 48, None),
    "all chosen": (9, 4, 4, 32, 48, None),
    "empty experts": (40, 6, 2, 48, 32, (1, 3, 4)),
    "one expert takes all": (60, 5, 1, 32, 48, (2,)),
    "tiles of 64": (70, 2, 1, 48, 80, None),
    "tiles of 128": (90, 1, 1, 40, 144, None),
    "two tiles of 128": (75, 2, 2, 24, 40, None),
    "no rows": (0, 4, 2, 32, 48, None),
}


def inputs(
    case: str, dtype: torch.dtype, *, cases: dict = CASES, rank: int = 3, seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Chosen experts (T, K) and leaf tensors; weights are scaled so that every product is of order one."""
    T, E, K, H, F, allowed = cases[case]
    rng = torch.Generator().manual_seed(seed)
    pool = torch.tensor(allowed if allowed is not None else range(E))
    idx = pool[torch.rand(T, len(pool), generator=rng).argsort(-1)[:, :K]]
    shapes = {
        "x": (T, H),
        "p": (T, K),
        "W1": (E, F, H),
        "W2": (E, H, F),
        "A1": (E, rank, H),
        "B1": (E, F, rank),
        "A2": (E, rank, F),
        "B2": (E, H, rank),
    }
    values = {n: torch.randn(*s, generator=rng) / (s[-1] ** 0.5 if len(s) == 3 else 1) for n, s in shapes.items()}
    values["p"] = values["p"].sigmoid()
    return idx.to(DEVICE), {n: v.to(DEVICE, dtype).requires_grad_() for n, v in values.items()}


def layer(backend, idx: Tensor, v: dict[str, Tensor], *, lora: bool, clamp: float | None = None) -> Tensor:
    plan = backend.route_plan(idx, len(v["W1"]))
    rows, p_rows = backend.permute(v["x"], v["p"], plan)
    adapters = [backend.GroupedLora(v["A1"], v["B1"], 0.5), backend.GroupedLora(v["A2"], v["B2"], 0.5)] if lora else []
    y = backend.grouped_experts(rows, plan.counts_E, p_rows, v["W1"], v["W2"], *adapters, clamp=clamp)
    return backend.unpermute(y, plan)


def routed(backend, idx: Tensor, v: dict[str, Tensor], *, lora: bool, clamp: float | None = None) -> Tensor:
    """The layer by the other door (fused only), with the experts as separate matrices."""
    plan = backend.route_plan(idx, len(v["W1"]))
    adapters = [backend.GroupedLora(v["A1"], v["B1"], 0.5), backend.GroupedLora(v["A2"], v["B2"], 0.5)] if lora else []
    return backend.routed_experts(v["x"], v["p"], plan, v["W1"].unbind(), v["W2"].unbind(), *adapters, clamp=clamp)


def run(
    backend, idx: Tensor, v: dict[str, Tensor], *, lora: bool, layer=layer, clamp: float | None = None
) -> dict[str, Tensor]:
    """The output and the gradient of every leaf that wants one."""
    out = layer(backend, idx, v, lora=lora, clamp=clamp)
    wanted = {n: t for n, t in v.items() if t.requires_grad and (lora or n[0] not in "AB")}
    rng = torch.Generator().manual_seed(99)
    dout = torch.randn(out.shape, generator=rng).to(out)
    grads = torch.autograd.grad(out, list(wanted.values()), dout)
    return {"out": out.detach()} | {f"d{n}": g for n, g in zip(wanted, grads, strict=True)}


def widened(v: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values in float64, for the definition."""
    return {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in v.items()}


def error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, or ||got|| where nothing is wanted."""
    assert got.shape == want.shape
    scale = want.norm().item()
    error = (got.double() - want).norm().item()
    return error / scale if scale > 0 else error
