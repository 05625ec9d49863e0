"""Which scan Mamba layers run on: the package's where it can serve, else ours, on whatever device they are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_evolve.substrate.model import mamba, mamba_ssm

# A package of that name with the three names that Megatron imports, each knowing where it is from.
FAKE = {
    "mamba_ssm/__init__.py": "",
    "mamba_ssm/ops/__init__.py": "",
    "mamba_ssm/ops/triton/__init__.py": "",
    "mamba_ssm/ops/triton/layernorm_gated.py": "import torch\nclass RMSNorm(torch.nn.Module): pass\n",
    "mamba_ssm/ops/triton/ssd_combined.py": (
        "def mamba_chunk_scan_combined(): pass\ndef mamba_split_conv1d_scan_combined(): pass\n"
    ),
}
FAKE_CONV = {
    "causal_conv1d/__init__.py": "def causal_conv1d_fn(): pass\n",
    "causal_conv1d/causal_conv1d_varlen.py": "def causal_conv1d_varlen_states(): pass\n",
}
CASES = [  # packages on the path, whether a GPU is feigned, what was imported before: the scan that Megatron then has
    ({}, True, "", "ours"),
    (FAKE, True, "", "ours"),  # its convolution is the other package's
    (FAKE | FAKE_CONV, True, "", "theirs"),
    (FAKE | FAKE_CONV, False, "", "ours"),  # Triton kernels do not run there
    (FAKE | FAKE_CONV, False, "mamba_ssm.ops.triton.ssd_combined", "ours"),  # and who has imported it keeps it
]
# One child a case. A GPU can only be feigned once what a machine without one lacks has been supplied.
PROGRAM = """
import importlib
import json
import os
import sys

import torch
from megatron_evolve.substrate.model import cpu, mamba_ssm

cpu.install()
for folder, gpu, imported in json.loads(sys.argv[1]):
    if os.fork() == 0:
        sys.path.insert(0, folder)
        before = imported and importlib.import_module(imported)
        torch.cuda.is_available = lambda: gpu
        mamba_ssm.supply()
        from megatron.core.ssm import mamba_mixer

        modules = {mamba_mixer.mamba_split_conv1d_scan_combined.__module__, mamba_mixer.RMSNormGated.__module__}
        kept = sys.modules.get(imported) is before if imported else True
        print("ours" if modules == {mamba_ssm.__name__} else "theirs", kept, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="feigns a GPU")
def test_the_package_serves_only_where_it_can(tmp_path: Path) -> None:
    arguments = []
    for number, (packages, gpu, imported, _) in enumerate(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, text in packages.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        arguments.append((str(folder), gpu, imported))
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(arguments)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"{scan} True" for *_, scan in CASES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_made_on_another_device(dtype: torch.dtype) -> None:
    """On the meta device a single tensor made on the CPU is an error, as it would be on a GPU."""
    inner, state, heads, groups, tokens, rows = 32, 8, 4, 2, 37, 2

    def weight(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=True)

    channels = inner + 2 * groups * state
    zxBCdt, conv, bias = weight(rows, tokens, inner + channels + heads), weight(channels, 4), weight(channels)
    dt_bias, A, D = weight(heads), weight(heads, dtype=torch.float32), weight(heads, dtype=torch.float32)
    sequences = torch.empty(rows, tokens, dtype=torch.int32, device="meta")
    y = mamba_ssm.mamba_split_conv1d_scan_combined(
        zxBCdt, conv, bias, dt_bias, A, D, 16, sequences, (1e-3, 0.1), headdim=inner // heads, ngroups=groups
    )
    assert (y.shape, y.dtype, y.device.type) == ((rows, tokens, inner), dtype, "meta")
    norm = mamba_ssm.GatedRMSNorm(inner, group_size=16, device=torch.device("meta"), dtype=dtype)
    norm(y).sum().backward()
    for leaf in (zxBCdt, conv, bias, dt_bias, A, D, norm.weight):
        assert leaf.grad.device.type == "meta" and leaf.grad.dtype == leaf.dtype
    with torch.no_grad():
        out, memory = mamba.conv_step(zxBCdt[:, 0, inner:-heads], weight(3, rows, channels), conv, bias)
        x, B, C = out.split([inner, groups * state, groups * state], -1)
        ssm = torch.empty(rows, heads, inner // heads, state, device="meta")
        B, C = (t.unflatten(-1, (groups, -1)) for t in (B, C))
        after = mamba.scan_step(
            x.unflatten(-1, (heads, -1)), mamba.step_size(weight(rows, heads), dt_bias), A, B, C, D, ssm
        )
    assert (after.device.type, after.dtype, memory.dtype) == ("meta", dtype, dtype)
