"""Other people's experts as providers, held to the oracle that ours are held to.

Their products need a GPU or a package that is not here, so plain ones with the same interface stand in: what is proven
is this side of it, that operands, order, weights and gradients make the same layer. Where ScatterMoE is installed its
own kernels are run as well.
"""

import os
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from megatron_evolve.kernels.bench import run
from megatron_evolve.kernels.bench.cases import Case, case_of, counted, experts
from megatron_evolve.kernels.bench.megatron import te_grouped_mlp
from megatron_evolve.kernels.bench.providers import PEERS, PROVIDERS, Provider
from megatron_evolve.kernels.bench.quack import quack
from megatron_evolve.kernels.bench.rows import measure
from megatron_evolve.kernels.bench.scattermoe import scattermoe
from megatron_evolve.kernels.roofline import Shape
from megatron_evolve.substrate.model import build
from tests.kernels.expert_cases import DEVICE

TINY = Shape("tiny", 24, 5, 2, 16, 24)
MODES = (("frozen", "float32"), ("full", "float32"), ("full", "bfloat16"))


def rows_of(name: str, mode: str, dtype: str) -> list[dict]:
    """Of a small layer with one expert that takes most."""
    shape = TINY._replace(rank=4) if mode == "lora" else TINY
    problem, prepare = experts(Case(shape, mode, 1.5, dtype), DEVICE, (name,))
    return measure(problem, prepare, DEVICE, rounds=1, warm=0)


def check(name: str) -> None:
    for mode, dtype in MODES:
        rows = rows_of(name, mode, dtype)
        assert [row["pass"] for row in rows] == ["forward", "backward", "both"], rows
        assert all("reason" not in row and row["bitwise_repeat"] for row in rows)
    (refused,) = rows_of(name, "lora", "float32")
    assert refused["median_ms"] is None and refused["kind"] == "refused" and "adapter" in refused["reason"]


@pytest.fixture
def megatron():
    """What Megatron takes for granted of CUDA."""
    build.start(seed=1)
    yield
    build.stop()


def test_sequential_mlp(megatron):
    check("sequential-mlp")


class GroupedLinear(nn.Module):
    """Transformer Engine's, as Megatron builds and calls it: `weight{i}`, rows and their number for each expert."""

    def __init__(
        self, num_experts: int, inputs: int, outputs: int, *, config, bias: bool, is_expert: bool, **_
    ) -> None:
        super().__init__()
        assert is_expert and not bias and not config.gradient_accumulation_fusion
        self.num_experts = num_experts
        for e in range(num_experts):
            setattr(self, f"weight{e}", nn.Parameter(torch.full((outputs, inputs), torch.nan)))

    def forward(self, x: Tensor, num_rows: list[int]) -> tuple[Tensor, None]:
        matrices = [getattr(self, f"weight{e}") for e in range(self.num_experts)]
        return torch.cat([part @ W.t() for part, W in zip(x.split(num_rows), matrices, strict=True)]), None


def test_te_grouped_mlp(megatron, monkeypatch):
    """Megatron's own class; Transformer Engine's products replaced."""
    own = lambda v: te_grouped_mlp(v, (GroupedLinear, GroupedLinear))  # noqa: E731
    monkeypatch.setitem(PROVIDERS, "te-grouped-mlp", Provider(lambda: "stand-in", own))
    check("te-grouped-mlp")


def parallel_linear(
    x: Tensor,
    W: Tensor,
    k: int,
    expert_of_row: Tensor,
    choice_of_row: Tensor,
    stop_of_expert: Tensor,
    gates: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> Tensor:
    """ScatterMoE's: rows sorted, or read by choice // k; the result sorted, or by choice and weighed over a token's."""
    assert torch.equal(torch.bincount(expert_of_row, minlength=len(W)).cumsum(0), stop_of_expert)
    rows = x if grouped_in else x[choice_of_row // k]
    y = torch.einsum("mi,mio->mo", rows, W[expert_of_row])
    if grouped_out:
        return y
    y = torch.empty_like(y).index_copy(0, choice_of_row, y)
    return y if gates is None else torch.einsum("tk,tko->to", gates, y.view(*gates.shape, -1))


def test_scattermoe(monkeypatch):
    monkeypatch.setitem(PROVIDERS, "scattermoe", Provider(lambda: "stand-in", lambda v: scattermoe(v, parallel_linear)))
    check("scattermoe")


def parts(start: Tensor) -> list[slice]:
    return [slice(a, b) for a, b in zip(start[:-1].tolist(), start[1:].tolist(), strict=True)]


def gemm(A, B, out=None, *, cu_seqlens_m=None, cu_seqlens_k=None, A_idx=None):
    """QuACK's: rows of each expert times its matrix, or summed over the rows of each expert."""
    if cu_seqlens_m is not None:
        rows = A if A_idx is None else A[A_idx]
        return torch.cat([rows[part] @ W for part, W in zip(parts(cu_seqlens_m), B, strict=True)])
    columns = A[:, A_idx]
    for into, part in zip(out, parts(cu_seqlens_k), strict=True):
        into.copy_(columns[:, part] @ B[part])
    return out


def gemm_act(A, B, *, activation, cu_seqlens_m, A_idx):
    assert activation == "relu_sq"
    h = gemm(A, B, cu_seqlens_m=cu_seqlens_m, A_idx=A_idx)
    return h, h.relu().square()


def gemm_dact(A, B, PreAct, *, activation, colvec_scale, colvec_reduce, cu_seqlens_m, A_idx):
    """The gradient times the row's weight; the activation times it; and the sum of activation times gradient."""
    assert activation == "relu_sq" and colvec_reduce
    da, r, weight = (
        gemm(A, B, cu_seqlens_m=cu_seqlens_m, A_idx=A_idx).float(),
        PreAct.relu().float(),
        colvec_scale[:, None],
    )
    dh, a = (2 * weight * r * da).to(A.dtype), (weight * r.square()).to(A.dtype)
    return dh, a, (r.square() * da).sum(-1)


def test_quack(monkeypatch):
    products = SimpleNamespace(gemm=gemm, gemm_act=gemm_act, gemm_dact=gemm_dact)
    monkeypatch.setitem(PROVIDERS, "quack", Provider(lambda: "stand-in", lambda v: quack(v, products)))
    check("quack")


@pytest.mark.slow
def test_scattermoes_own_kernels():
    """Its kernels under the interpreter, in float32: it knows nothing of the interpreter's bfloat16."""
    pytest.importorskip("scattermoe", reason="scattermoe is not installed")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        pytest.skip("its kernels need a GPU, or TRITON_INTERPRET=1")
    for mode in ("frozen", "full"):
        rows = rows_of("scattermoe", mode, "float32")
        assert [row["pass"] for row in rows] == ["forward", "backward", "both"], rows
        assert rows[0]["version"] == f"scattermoe {metadata.version('scattermoe')}"


def test_a_package_that_is_not_here_is_a_row_with_its_kind(monkeypatch):
    monkeypatch.setattr(run, "peers", lambda: dict.fromkeys(PEERS) | {"quack": "0.6.5"})
    rows = {row["provider"]: row for row in run.without_time("cpu")}
    assert set(rows) == set(PEERS)
    assert rows["liger"]["kind"] == "missing" and rows["liger"]["reason"] == "liger-kernel is not installed"
    assert (rows["quack"]["kind"], rows["quack"]["version"]) == ("refused", "0.6.5")
    assert all(row["median_ms"] is None for row in rows.values())
    assert run.installed() == ("quack",)
    assert run.providers_on("cuda") == ("triton", "unfused", "eager", "loop", "quack")


@pytest.mark.parametrize("name", ["te-grouped-mlp", "scattermoe", "quack"])
def test_one_that_is_asked_for_without_its_package_says_so(name):
    if run.peers()[name] is not None:
        pytest.skip(f"{PEERS[name]} is installed")
    (row,) = rows_of(name, "full", "bfloat16")
    assert row["median_ms"] is None and row["kind"] == "missing" and row["reason"], row
    assert row["version"].endswith("none")


def test_everybody_is_charged_the_operations_of_the_same_layer():
    by_provider = counted(case_of("nano", 8192, 8, "full"))
    assert set(by_provider) == set(PROVIDERS)
    for part in ("forward", "backward"):
        flops = {name: sum(p.flops for p in passes[part]) for name, passes in by_provider.items()}
        assert len(set(flops.values())) == 1, flops
    assert not any(p.bytes_moved for p in by_provider["quack"]["forward"])
