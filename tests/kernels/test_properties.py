"""Every op at every edge: each value and gradient against float64, the same bits twice, and NaN where it belongs.

The files beside this one test each op in depth; here is the matrix of ops and edges, on the smallest shapes that have
the edge. The whole layer goes through its edges in `test_experts`, by both doors, and is here for its bits and its NaN
(all of it here took four minutes more). What only a router has (ties, a bias that hides scores) is in `test_router`;
waits of the host and CUDA graphs show where kernels are compiled without storage (`test_offline`) and on a GPU
(`bench.checks`).
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_evolve.kernels import fused, reference
from tests.kernels.expert_cases import DEVICE, FLOAT32, error, layer, routed, widened

# T, E, K, H, F and which experts a token may choose
EDGES = {
    "plain": (11, 4, 2, 16, 32, None),
    "odd sizes": (9, 7, 3, 13, 29, None),  # F = 1856 is 14.5 blocks of 128: nothing divides by 16 here
    "one token": (1, 5, 2, 16, 16, None),
    "K = 1": (11, 5, 1, 16, 16, None),
    "K = E": (6, 3, 3, 16, 16, None),
    "empty experts": (11, 6, 2, 16, 16, (1, 3, 4)),
    "one expert takes all": (19, 4, 1, 16, 16, (2,)),
    "no rows": (0, 4, 2, 16, 16, None),
}
VOCABULARY = 61


class Op(NamedTuple):
    """Its leaves by name, and what it computes from a backend, chosen experts and leaves."""

    leaves: tuple[str, ...]
    run: Callable[..., Tensor]


def grouped_linear(backend, idx: Tensor, v: dict[str, Tensor], *, adapter: bool) -> Tensor:
    plan = backend.route_plan(idx, len(v["W1"]))
    lora = backend.GroupedLora(v["A1"], v["B1"], 0.5) if adapter else None
    return backend.grouped_linear(v["x"][plan.token_of_row_M.long()], plan.counts_E, v["W1"], lora)


def whole(backend, idx: Tensor, v: dict[str, Tensor], *, lora: bool) -> Tensor:
    """From tokens, by the door that only the fused form has."""
    return (routed if backend is fused else layer)(backend, idx, v, lora=lora)


def head(v: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A frozen table of outputs and targets."""
    rng, H = torch.Generator().manual_seed(5), v["x"].size(1)
    W, target = torch.randn(VOCABULARY, H, generator=rng), torch.randint(VOCABULARY, (len(v["x"]),), generator=rng)
    return W.to(v["x"]) / H**0.5, target.to(DEVICE)


MATRICES, ADAPTERS = ("W1", "W2"), ("A1", "B1", "A2", "B2")
OPS = {
    "router": Op(("logits",), lambda b, idx, v: b.router(v["logits"], v["bias"].detach(), idx.size(1), 2.5)[1]),
    "router from tokens": Op(("x", "Wr"), lambda b, idx, v: _from_tokens(b, idx, v)),
    "permute": Op(("x", "p"), lambda b, idx, v: _rows(b, idx, v)),
    "unpermute": Op(("y",), lambda b, idx, v: b.unpermute(v["y"], b.route_plan(idx, len(v["W1"])))),
    "grouped_linear": Op(("x", "W1"), lambda b, idx, v: grouped_linear(b, idx, v, adapter=False)),
    "grouped_linear, adapter": Op(("x", "W1", "A1", "B1"), lambda b, idx, v: grouped_linear(b, idx, v, adapter=True)),
    "experts from rows": Op(("x", "p", *MATRICES), lambda b, idx, v: layer(b, idx, v, lora=False)),
    "experts from tokens": Op(("x", "p", *MATRICES), lambda b, idx, v: whole(b, idx, v, lora=False)),
    "experts, adapters": Op(("x", "p", *ADAPTERS), lambda b, idx, v: whole(b, idx, v, lora=True)),
    "gated_norm": Op(("x", "z", "w"), lambda b, idx, v: b.gated_rms_norm(v["x"], v["z"], v["w"], 1)),
    "linear_cross_entropy": Op(("x",), lambda b, idx, v: b.linear_cross_entropy(v["x"], *head(v))),
}


def _from_tokens(backend, idx: Tensor, v: dict[str, Tensor]) -> Tensor:
    """Shares by the router that makes its own logits, which only the fused form has."""
    bias, K = v["bias"].detach(), idx.size(1)
    if backend is fused:
        return fused.router_from_tokens(v["x"], v["Wr"], bias, K, 2.5)[1]
    return backend.router(v["x"] @ v["Wr"].t(), bias, K, 2.5)[1]


def _rows(backend, idx: Tensor, v: dict[str, Tensor]) -> Tensor:
    """Rows and their probabilities side by side."""
    rows, p_rows = backend.permute(v["x"], v["p"], backend.route_plan(idx, len(v["W1"])))
    return torch.cat((rows, p_rows.unsqueeze(-1)), -1)


def inputs(edge: str, op: Op) -> tuple[Tensor, dict[str, Tensor]]:
    """Chosen experts, and float32 tensors of which the op's leaves want gradients."""
    T, E, K, H, F, allowed = EDGES[edge]
    rng, R = torch.Generator().manual_seed(0), 3
    pool = torch.tensor(allowed if allowed is not None else range(E))
    idx = pool[torch.rand(T, len(pool), generator=rng).argsort(-1)[:, :K]]
    sizes = {"x": (T, H), "y": (T * K, H), "z": (T, H), "w": (H,), "p": (T, K), "logits": (T, E), "bias": (E,)}
    sizes |= {"Wr": (E, H), "W1": (E, F, H), "W2": (E, H, F)}
    sizes |= {"A1": (E, R, H), "B1": (E, F, R), "A2": (E, R, F), "B2": (E, H, R)}
    values = {n: torch.randn(*s, generator=rng) / (s[-1] ** 0.5 if len(s) == 3 else 1) for n, s in sizes.items()}
    return idx.to(DEVICE), {n: t.to(DEVICE).requires_grad_(n in op.leaves) for n, t in values.items()}


def outcome(op: Op, backend, idx: Tensor, v: dict[str, Tensor]) -> list[Tensor]:
    out = op.run(backend, idx, v)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return [out.detach(), *torch.autograd.grad(out, [v[name] for name in op.leaves], dout)]


@pytest.mark.parametrize(
    ("name", "edge"), [(n, e) for n in OPS for e in EDGES if e == "plain" or not n.startswith("experts")]
)
def test_values_gradients_and_bits(name, edge):
    op = OPS[name]
    idx, values = inputs(edge, op)
    got, again = (outcome(op, fused, idx, values) for _ in range(2))
    want = outcome(op, reference, idx, widened(values))
    for part, a, b, c in zip(("out", *op.leaves), got, want, again, strict=True):
        assert error(a, b) <= FLOAT32, part
        assert torch.equal(a, c), part


# A router from tokens has its own test of NaN: where all of a token's logits are NaN, the definition makes the gradient
# of every expert NaN, the kernel that of the chosen ones.
NAN_IN = {name: op.leaves[0] for name, op in OPS.items() if name != "router from tokens"}


@pytest.mark.parametrize("name", NAN_IN)
def test_nan_stays_nan_and_in_its_place(name):
    """Exactly the numbers of the result and of each gradient that the definition makes NaN."""
    op = OPS[name]
    idx, values = inputs("plain", op)
    with torch.no_grad():
        values[NAN_IN[name]][5, 3] = torch.nan
    got, want = outcome(op, fused, idx, values), outcome(op, reference, idx, widened(values))
    assert got[0].isnan().any()
    for part, a, b in zip(("out", *op.leaves), got, want, strict=True):
        assert torch.equal(a.isnan(), b.isnan()), part
