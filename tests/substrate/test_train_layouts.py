"""Training on several ranks is training on one: same losses, gradient norms and weights in every layout; resharding.

Real processes on gloo. All layouts of one number of ranks share one start of the processes, which costs more than they.
"""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.weights import save_weights
from tests.substrate.rank_program import architecture_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="checks what is supplied where no GPU is present"),
]
PROGRAM = Path(__file__).with_name("rank_program.py")
ROOT = Path(__file__).resolve().parents[2]

LAYOUTS = {
    1: {"alone": {"layout": ""}},
    2: {
        "data": {"layout": ""},
        "tensor and sequence": {"layout": "tp=2"},
        "expert": {"layout": "ep=2"},
        "expert-tensor": {"layout": "etp=2"},
        "pipeline": {"layout": "pp=2", "micro_rows": 16},
    },
    3: {"virtual stages": {"layout": "pp=3,vp=2", "micro_rows": 8}},
    4: {
        "tensor, expert": {"layout": "tp=2,ep=2"},
        "tensor, expert, expert-tensor": {"layout": "tp=2,ep=2,etp=2"},
        "tensor, pipeline": {"layout": "tp=2,pp=2", "micro_rows": 16},
        "expert, pipeline": {"layout": "ep=2,pp=2", "micro_rows": 16},
        "stages of unequal length": {"layout": "pp=4", "micro_rows": 8},
    },
}
LORA = ", LoRA"


def both(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each case in full and with an adapter, but for expert tensor parallelism, which refuses one on experts."""
    adapted = {name + LORA: {**case, "adapter": True} for name, case in cases.items() if "etp" not in case["layout"]}
    return {**cases, **adapted}


ALL = [(ranks, name) for ranks, cases in LAYOUTS.items() for name in both(cases) if ranks > 1]
BF16 = {
    1: {"alone, bf16": {"layout": "", "bf16": True}},
    2: {"tensor, bf16": {"layout": "tp=2", "bf16": True}},
}
PACKED = {  # rows end to end, in packs of 1 or 8 rows' room; ranks cut their own rows into packs
    1: {"alone, packed": {"layout": "", "packed": True}},
    2: {
        "data, packed": {"layout": "", "packed": True, "micro_rows": 8},
        "tensor and sequence, packed": {"layout": "tp=2", "packed": True, "micro_rows": 8},
        "expert, packed": {"layout": "ep=2", "packed": True, "micro_rows": 8},
        "pipeline, packed": {"layout": "pp=2", "packed": True, "micro_rows": 8},
        "data, packed" + LORA: {"layout": "", "packed": True, "micro_rows": 8, "adapter": True},
    },
    3: {"virtual stages, packed": {"layout": "pp=3,vp=2", "packed": True, "micro_rows": 8}},
}
RECOMPUTED = {
    2: {
        "tensor and sequence, recomputed": {"layout": "tp=2", "recompute": "full"},
        "pipeline, recomputed" + LORA: {"layout": "pp=2", "micro_rows": 4, "recompute": "selective", "adapter": True},
    },
}
THREE = {
    "num_attention_heads": 6,
    "num_query_groups": 3,
    "mamba_num_heads": 6,
    "mamba_num_groups": 3,
    "shared_ffn_size": 96,
}


def thirds(name: str, layout: str) -> dict[str, dict[str, Any]]:
    """Of the widths, all multiples of 4, tp=3 splits some and not others, as tp=8 does; so it does packs."""
    case = {"layout": layout, "architecture": THREE}
    packed = {**case, "packed": True, "micro_rows": 8}
    return {name: case, name + LORA: {**case, "adapter": True}, name + ", packed": packed}


THIRDS = {1: thirds("alone, thirds", ""), 3: thirds("tensor, thirds", "tp=3")}
SAVED = {"tensor and sequence", "tensor and sequence" + LORA, "expert", "tensor, bf16"}  # after half of the steps
RESUMED = {  # where what those cases saved is gone on with
    2: {
        "tensor to expert, bf16": {"layout": "ep=2", "bf16": True, "restore": "tensor, bf16"},
        "tensor to data": {"layout": "", "restore": "tensor and sequence"},
        "tensor to data" + LORA: {"layout": "", "restore": "tensor and sequence" + LORA, "adapter": True},
        "tensor to pipeline": {"layout": "pp=2", "micro_rows": 16, "restore": "tensor and sequence"},
        "expert to expert": {"layout": "ep=2", "restore": "expert"},
        "expert to tensor": {"layout": "tp=2", "restore": "expert"},
    },
    4: {
        "tensor to tensor, pipeline": {"layout": "tp=2,pp=2", "micro_rows": 16, "restore": "tensor and sequence"},
        "tensor to pipeline" + LORA: {
            "layout": "pp=4",
            "micro_rows": 8,
            "restore": "tensor and sequence" + LORA,
            "adapter": True,
        },
        "expert to expert, pipeline": {"layout": "ep=2,pp=2", "micro_rows": 16, "restore": "expert"},
    },
}


def free_ports(number: int) -> list[int]:
    """Ports below those that the system gives to whoever asks for any: a case's port must be free until its turn.

    By the system's own chance: Hypothesis seeds the module's generator, so that two test processes drew the same ports.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 40 * number):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == number:
            break
    return found


def codes_of(processes: list[subprocess.Popen], seconds: float) -> list[int]:
    """Exit codes of all. Once one has failed the others wait for it in vain, and are killed."""
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes) or time.monotonic() > end:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    return [process.wait() for process in processes]


def run(
    ranks: int, cases: dict[str, dict[str, Any]], weights: Path, folder: Path, program: Path = PROGRAM
) -> dict[str, Any]:
    """What a rank of the program measured in each case."""
    folder.mkdir(exist_ok=True)
    ports = free_ports(len(cases))
    cases = {
        name: {"adapter": False, **case, "port": port} for (name, case), port in zip(cases.items(), ports, strict=True)
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, str(program), str(weights), str(folder), str(folder / "cases.json")]
    common = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
    several = {"WORLD_SIZE": str(ranks), "MASTER_PORT": "0"} if ranks > 1 else {}
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        with open(folder / f"rank-{rank}.txt", "w") as log:
            env = os.environ | common | several | own
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env))
    codes = codes_of(processes, seconds=1200)  # minutes where other work shares the cores
    assert codes == [0] * ranks, "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("rank-*.txt")))
    return json.loads((folder / f"{ranks}.json").read_text())


def weights_of(case: dict[str, Any], path: Path) -> Path:
    """Weights for the case's architecture, enlarged so that the scan matters: with the default start a wrong one
    passes."""
    build.start(seed=1)
    model = build.build_model(architecture_of(case), seed=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() == 2 else 1)
    build.stop()
    return save_weights(model, path)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every case of every number of ranks, by name."""
    folder = tmp_path_factory.mktemp("measured")
    weights = weights_of({}, folder / "weights.safetensors")
    of_three = weights_of({"architecture": THREE}, folder / "of three.safetensors")
    found = {}
    for ranks, layouts in LAYOUTS.items():
        more = (kind.get(ranks, {}) for kind in (BF16, RESUMED, PACKED, RECOMPUTED, THIRDS))
        cases = {**both(layouts), **{name: case for kind in more for name, case in kind.items()}}
        cases = {name: {**case, "save": str(folder / name)} if name in SAVED else case for name, case in cases.items()}
        for case in cases.values():
            if "restore" in case:
                case["restore"] = str(folder / case["restore"])
            if "architecture" in case:
                case["weights"] = str(of_three)
        found |= run(ranks, cases, weights, folder / f"{ranks} ranks")
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Steps, held-out loss, and the weights by two sums of each tensor. Only the order of float32 sums differs."""
    assert "error" not in found, found
    steps = torch.tensor(expected["steps"])[-len(found["steps"]) :]
    torch.testing.assert_close(torch.tensor(found["steps"]), steps, rtol=2e-6, atol=0)  # measured 3e-7
    assert found["chosen_step"] == expected["chosen_step"]
    assert found["held_out"] == pytest.approx(expected["held_out"], rel=2e-6)
    for what in ("sums", "chosen"):
        assert found[what].keys() == expected[what].keys()
        for name, value in found[what].items():
            assert value == pytest.approx(expected[what][name], rel=1e-6, abs=2e-5), name  # measured 2e-6


@pytest.mark.parametrize(("ranks", "name"), ALL, ids=[name for _, name in ALL])
def test_every_layout_trains_as_one_process_does(ranks: int, name: str, measured: dict[str, Any]) -> None:
    assert len(measured[name]["steps"]) == 4
    assert_same(measured[name], measured["alone" + LORA if name.endswith(LORA) else "alone"])


@pytest.mark.parametrize("name", [name for cases in RECOMPUTED.values() for name in cases])
def test_what_is_computed_again_trains_the_same(name: str, measured: dict[str, Any]) -> None:
    assert_same(measured[name], measured["alone" + LORA if name.endswith(LORA) else "alone"])


@pytest.mark.parametrize("name", [name for cases in PACKED.values() for name in cases])
def test_packed_rows_train_as_one_process_does(name: str, measured: dict[str, Any]) -> None:
    """Under an adapter as padded rows, too; full fine-tuning moves the routing bias by a load without their padding."""
    assert_same(measured[name], measured["alone" + LORA if name.endswith(LORA) else "alone, packed"])


@pytest.mark.parametrize("name", THIRDS[3])
def test_a_width_that_its_ranks_cannot_split_is_padded_for_them(name: str, measured: dict[str, Any]) -> None:
    assert_same(measured[name], measured[name.replace("tensor", "alone")])


def test_bfloat16_is_near_one_process_and_goes_on_elsewhere(measured: dict[str, Any]) -> None:
    alone, spread, resumed = (
        torch.tensor(measured[name]["steps"]) for name in ("alone, bf16", "tensor, bf16", "tensor to expert, bf16")
    )
    torch.testing.assert_close(spread, alone, rtol=0.02, atol=0)  # partial sums are rounded to 8 bits
    torch.testing.assert_close(resumed, spread[2:], rtol=0.02, atol=0)


@pytest.mark.parametrize("name", [name for cases in RESUMED.values() for name in cases if "bf16" not in name])
def test_a_run_goes_on_in_another_layout(name: str, measured: dict[str, Any]) -> None:
    assert len(measured[name]["steps"]) == 2
    assert_same(measured[name], measured["alone" + LORA if name.endswith(LORA) else "alone"])


@pytest.mark.parametrize("name", sorted(SAVED))
def test_a_save_leaves_no_process_behind(name: str, measured: dict[str, Any]) -> None:
    """Megatron's would start one beside every rank, which outlives a killed rank."""
    assert measured[name]["children"] == 0
