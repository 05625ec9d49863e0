"""Every kernel and tile compiles for sm_90a and sm_100, runs on the tensor cores, spills nothing and fits the chip."""

import json
import os
import subprocess
import sys

import pytest

from megatron_evolve.kernels.offline import CHIPS, MAX_REGISTERS, MAX_SHARED_BYTES, Compiled
from megatron_evolve.kernels.tile_table import entries

WANTED = {"sm_90a": "wgmma", "sm_100": "tcgen05"}
# bytes a thread, of the gradient through fc2 with a clamp and an adapter: 16 at rank 32, 32 at 64
CLAMP_SPILLS = {"sm_90a": 0, "sm_100": 32}


@pytest.fixture(scope="module", params=CHIPS)
def compiled(request) -> tuple[str, list[Compiled]]:
    """Compiled in a process of its own: this one may have Triton's interpreter in the compiler's place."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_evolve.kernels.offline", request.param],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return request.param, [Compiled(**json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_every_tile_was_compiled(compiled):
    found = [c.constants for c in compiled[1] if c.operands == "bf16"]
    for tile in {tile for entry in entries() for tile in entry.tiles[:3]}:
        want = {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "num_warps": tile.warps}
        assert any(want.items() <= constants.items() for constants in found), want
    for kind in ("fc1", "fc2_gradient"):
        for tile in {getattr(entry.tiles, kind) for entry in entries()}:
            want = {"BM": tile.rows, "BN": tile.columns, "num_warps": tile.warps, "num_stages": tile.stages}
            mine = [c for c in compiled[1] if c.kernel == f"{kind}.{kind}" and want.items() <= c.constants.items()]
            assert any(c.copy_engine == tile.fetched for c in mine), (kind, tile)


@pytest.mark.slow
def test_matrix_products_run_on_the_tensor_cores(compiled):
    chip, kernels = compiled
    for c in kernels:
        if c.operands == "bf16":  # float32 is multiplied as such, for checks: its tensor cores know only tf32
            # wgmma and tcgen05 want blocks of 64 rows; below, the products are bound by reading memory anyway
            narrow = min(c.constants[name] for name in ("BM", "BN", "BT", "BE") if name in c.constants) < 64
            assert c.tensor_core == WANTED[chip] or (narrow and c.tensor_core != "none"), c


@pytest.mark.slow
def test_nothing_spills_and_all_fits(compiled):
    chip, kernels = compiled
    assert {c.operands for c in kernels} == {"", "bf16", "f32"}
    assert {c.kernel for c in kernels if c.clamped} == {"fc1.fc1", "fc2_gradient.fc2_gradient"}
    for c in kernels:
        assert c.spilled_bytes <= CLAMP_SPILLS[chip] * c.clamped or c.operands == "f32", c
        assert c.shared_bytes <= MAX_SHARED_BYTES, c
        assert c.registers * c.threads <= MAX_REGISTERS, c
