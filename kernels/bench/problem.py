"""One thing to compute, with what it should give: the same tensors for every provider.

Experts get exactly the skew that is asked for: MaxVio = largest load / mean load - 1 (Nemotron-3 reports 1.3 for Nano
in training, 5 in validation, up to 12 in Ultra's first expert layer). One expert takes that load and the others share
the rest evenly; tokens and experts are then shuffled. An expert can be chosen once by a token, so that E / K - 1 is the
most there is, and what came of it stands in the shape of the row.

Letters as in `reference`: T tokens, E experts, K chosen, H width, F hidden width, R adapter rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_evolve.kernels.reference import GroupedLora, RoutePlan, route_plan, weighted_squared_relu
from megatron_evolve.kernels.roofline import Pass, Shape

Prepared = Callable[[], Tensor]
SLICE = 8192  # rows of a matrix: of an output table 131,072 x 2,688 a float64 copy is 2.8 GB, and an error makes three


class Problem(NamedTuple):
    op: str
    shape: dict[str, object]  # as a row tells it
    leaves: dict[str, Tensor]  # these want gradients
    dout: Tensor | None  # the gradient of the output; None where there is no backward pass
    fresh: tuple[Tensor, ...]  # get new numbers before every timed run
    given: tuple[Tensor, ...]  # all that the caller holds anyway, which no provider is charged for keeping
    want: Callable[[], dict[str, Tensor]]  # `out` and d<leaf> of each leaf, in float64 or float32
    predicted: dict[str, dict[str, tuple[Pass, ...]]]  # provider -> forward, backward -> its passes


class Experts(NamedTuple):
    """The tensors of one layer's routed experts."""

    x_TH: Tensor
    p_TK: Tensor
    idx_TK: Tensor
    plan: RoutePlan
    W1_EFH: Tensor
    W2_EHF: Tensor
    loras: tuple[GroupedLora, ...]  # of fc1 and fc2, or none
    dout_TH: Tensor

    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x_TH, "p": self.p_TK, "W1": self.W1_EFH, "W2": self.W2_EHF}
        for n, lora in enumerate(self.loras, 1):
            named |= {f"A{n}": lora.A_ERI, f"B{n}": lora.B_EOR}
        return {name: tensor for name, tensor in named.items() if tensor.requires_grad}

    def tensors(self) -> tuple[Tensor, ...]:
        adapters = (tensor for lora in self.loras for tensor in lora[:2])
        return (self.x_TH, self.p_TK, self.idx_TK, *self.plan, self.W1_EFH, self.W2_EHF, *adapters, self.dout_TH)


def choices(tokens: int, experts: int, chosen: int, max_vio: float, seed: int = 0) -> Tensor:
    """(T, K) int64 on the CPU, each token's experts distinct, of the skew asked for or the most there is."""
    rng = torch.Generator().manual_seed(seed)
    hot = min(tokens, round((1 + max_vio) * tokens * chosen / experts)) if max_vio > 0 else 0
    if hot == 0:
        idx_TK = torch.arange(tokens * chosen).view(tokens, chosen) % experts
    else:
        is_hot_T = torch.arange(tokens) < hot
        num_others_T = chosen - is_hot_T.long()
        first_T = num_others_T.cumsum(0) - num_others_T
        slot_TK = torch.arange(chosen)[None, :] - is_hot_T[:, None].long()
        idx_TK = (first_T[:, None] + slot_TK) % max(experts - 1, 1) + 1
        idx_TK[:hot, 0] = 0
    idx_TK = torch.randperm(experts, generator=rng)[idx_TK]
    return idx_TK[torch.randperm(tokens, generator=rng)]


def skew_of(plan: RoutePlan) -> float:
    """MaxVio of the plan; 0 without rows."""
    counts_E = plan.counts_E.double()
    return round((counts_E.max() / counts_E.mean() - 1).item(), 3) if len(plan.choice_of_row_M) else 0.0


def experts(s: Shape, mode: str, max_vio: float, dtype: torch.dtype, device: str, seed: int = 0) -> Experts:
    """Random tensors; every product is of order one. Probabilities are float32, as Megatron's router gives them."""
    rng = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, wants: bool, scale: float = 1.0) -> Tensor:
        values = torch.randn(*size, generator=rng, device=device, dtype=dtype)
        return values.mul_(scale).requires_grad_(wants)

    E, H, F, R = s.experts, s.width, s.hidden, s.rank
    idx_TK = choices(s.tokens, E, s.chosen, max_vio, seed).to(device)
    p_TK = torch.rand(idx_TK.shape, generator=rng, device=device).requires_grad_()
    loras = ()
    if mode == "lora":
        loras = tuple(
            GroupedLora(normal(E, R, i, wants=True, scale=i**-0.5), normal(E, o, R, wants=True, scale=R**-0.5), 0.5)
            for i, o in ((H, F), (F, H))
        )
    return Experts(
        normal(s.tokens, H, wants=True),
        p_TK,
        idx_TK,
        route_plan(idx_TK, E),
        normal(E, F, H, wants=mode == "full", scale=H**-0.5),
        normal(E, H, F, wants=mode == "full", scale=F**-0.5),
        loras,
        normal(s.tokens, H, wants=False),
    )


def oracle(v: Experts, clamp: float | None = None) -> dict[str, Tensor]:
    """The output and every gradient that is wanted, one expert at a time in float64; `clamp` as in `reference`.

    Only sums over experts stay in float64; gradients of matrices are kept in float32, which is far below any tolerance.
    """
    wanted, K = v.leaves(), v.p_TK.size(1)
    want = {"out": torch.zeros_like(v.x_TH, dtype=torch.float64)}
    want |= {
        f"d{n}": torch.zeros_like(t, dtype=torch.float64 if n in "xp" else torch.float32) for n, t in wanted.items()
    }
    stop_E = v.plan.counts_E.cumsum(0).tolist()
    for e, (start, stop) in enumerate(zip([0, *stop_E[:-1]], stop_E, strict=True)):
        choice_M = v.plan.choice_of_row_M[start:stop]
        token_M = choice_M // K
        own = {"x": v.x_TH[token_M], "p": v.p_TK.flatten()[choice_M], "W1": v.W1_EFH[e], "W2": v.W2_EHF[e]}
        for n, lora in enumerate(v.loras, 1):
            own |= {f"A{n}": lora.A_ERI[e], f"B{n}": lora.B_EOR[e]}
        own = {name: tensor.detach().double().requires_grad_(name in wanted) for name, tensor in own.items()}
        y_MH = _one_expert(own, [lora.scale for lora in v.loras], clamp)
        grads = torch.autograd.grad(y_MH, [own[name] for name in wanted], v.dout_TH[token_M].double())
        want["out"].index_add_(0, token_M, y_MH.detach())
        for name, grad in zip(wanted, grads, strict=True):
            if name == "x":
                want["dx"].index_add_(0, token_M, grad)
            elif name == "p":
                want["dp"].view(-1)[choice_M] = grad
            else:
                want[f"d{name}"][e] = grad
    return want


def _one_expert(own: dict[str, Tensor], scales: list[float], clamp: float | None) -> Tensor:
    def linear(n: int, x: Tensor) -> Tensor:
        y = x @ own[f"W{n}"].t()
        return y + scales[n - 1] * (x @ own[f"A{n}"].t()) @ own[f"B{n}"].t() if scales else y

    return linear(2, weighted_squared_relu(linear(1, own["x"]), own["p"], clamp))


def error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, or ||got|| where nothing is wanted, summed slice by slice to spare memory."""
    if got.shape != want.shape:
        raise ValueError(f"a result must have the shape {tuple(want.shape)}; got {tuple(got.shape)}: mend the provider")
    pairs = zip(*(t.unbind() if t.dim() == 3 else t.split(SLICE) if t.dim() else [t] for t in (got, want)), strict=True)
    off, size = 0.0, 0.0
    for g, w in pairs:
        w = w.double()
        off += (g.double() - w).square().sum().item()
        size += w.square().sum().item()
    return (off / size) ** 0.5 if size > 0 else off**0.5
