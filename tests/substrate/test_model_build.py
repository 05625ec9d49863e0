"""Building a model: bits from the seed, shapes from the architecture, a process that leaves nothing behind, forks."""

import os
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
import torch
from torch.overrides import TorchFunctionMode

from megatron_evolve.substrate.model import build, cpu, weights
from megatron_evolve.substrate.model.architecture import NANO_CPU, PRESETS


@pytest.fixture(scope="module")
def runtime() -> Iterator[build.Runtime]:
    yield build.start(seed=3)
    build.stop()


def _loss(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 77, (4, 20), generator=torch.Generator().manual_seed(0))
    return model(tokens, None, None, labels=tokens.roll(-1, 1)).mean()


def test_same_seed_same_bits(runtime: build.Runtime) -> None:
    first, losses = None, []
    for seed, disturbance in ((5, 0), (5, 3), (6, 0)):
        torch.rand(disturbance)  # generators elsewhere when the model is built
        model = build.build_model(NANO_CPU, seed=seed)
        state = weights.state_of(model)
        same = first is None or [torch.equal(first[name], state[name]) for name in state]
        first = first or {name: value.clone() for name, value in state.items()}
        loss = _loss(model)
        loss.backward()
        losses.append((loss.item(), model.embedding.word_embeddings.weight.grad.sum().item()))
        assert same is True or (all(same) if seed == 5 else not all(same))
    assert losses[0] == losses[1] != losses[2]


def test_parameters_are_counted_and_all_trained(runtime: build.Runtime) -> None:
    model = build.build_model(NANO_CPU, seed=1)
    assert sum(p.numel() for p in model.parameters()) == NANO_CPU.num_parameters()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    _loss(model).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


class OnMeta(TorchFunctionMode):
    """Every new tensor on the meta device: shapes without memory, also where Megatron names a device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = getattr(func, "__name__", "") in ("arange", "empty", "full", "ones", "rand", "tensor", "zeros")
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if made else {}))


@pytest.mark.parametrize("name", ["nemotron3-nano", "nemotron3-super", "nemotron3-ultra"])
def test_a_preset_is_as_large_as_it_says(name: str, runtime: build.Runtime) -> None:
    with OnMeta():
        model = build.build_model(PRESETS[name], seed=1, perform_initialization=False)
    counted = sum(p.numel() for p in model.parameters())
    assert counted == PRESETS[name].num_parameters() + PRESETS[name].num_mtp_parameters()


def test_learns(runtime: build.Runtime) -> None:
    """Next-token prediction of a fixed map: from the entropy of the alphabet to almost nothing."""
    model = build.build_model(NANO_CPU.with_vocab(16), seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rng = torch.Generator().manual_seed(0)
    following = torch.randperm(16, generator=rng)
    losses = []
    for _ in range(25):
        tokens = torch.randint(0, 16, (16, 12), generator=rng)
        loss = model(tokens, None, None, labels=following[tokens]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.5 and losses[-1] < 0.3


def test_right_padding_is_not_seen(runtime: build.Runtime) -> None:
    model = build.build_model(NANO_CPU, seed=1).eval()
    tokens = torch.randint(0, 77, (2, 20))
    longer = torch.cat([tokens, torch.randint(0, 77, (2, 30))], 1)
    with torch.no_grad():
        assert torch.allclose(model(longer, None, None)[:, :20], model(tokens, None, None), atol=1e-5)


def test_a_process_alone_opens_no_port_and_starts_no_thread(runtime: build.Runtime) -> None:
    assert (runtime.rank, runtime.world_size, runtime.device) == (
        0,
        1,
        "cpu" if not torch.cuda.is_available() else "cuda",
    )
    if runtime.device == "cpu":
        assert torch.distributed.get_backend() == "alone"
        assert not [c for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]


def test_start_twice_is_refused(runtime: build.Runtime) -> None:
    with pytest.raises(RuntimeError, match="process group exists already"):
        build.start(seed=1)


def test_transformers_does_not_see_the_stand_in(runtime: build.Runtime) -> None:
    assert not [name for name in sys.modules if name.startswith("mamba_ssm")]


FORKS = """
import os
import sys

from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.architecture import NANO_CPU, PRESETS

build.prepare()


def work(seed):
    import torch

    build.start(seed)
    model = build.build_model(NANO_CPU, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        tokens = torch.randint(0, 77, (8, 20))
        loss = model(tokens, None, None, labels=tokens).mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def child(seed):
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, repr(work(seed)).encode())
        os._exit(0)
    os.close(writer)
    return reader


results = [os.read(reader, 99).decode() for reader in [child(1), child(2), child(1)]]
for _ in results:
    assert os.wait()[1] == 0
print(*results, repr(work(1)))
"""


@pytest.mark.slow
def test_children_of_a_warm_parent_compute_what_a_cold_process_does() -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=300, env=env, check=False
    )
    assert run.returncode == 0, run.stderr
    first, second, third, in_parent = run.stdout.split()
    assert first == third == in_parent != second


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is installed where a GPU is present")
def test_megatron_imported_too_early_is_refused(runtime: build.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.install()  # again: nothing happens
    monkeypatch.setattr(cpu, "_installed", False)
    with pytest.raises(RuntimeError, match="must come before the first import"):
        cpu.install()
