"""A backend is chosen by name in one place, and one that cannot run says so in a sentence."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from megatron_evolve.kernels import backend as forms
from megatron_evolve.kernels import eager, fused, reference
from megatron_evolve.kernels.backend import AUTO, TILE_BYTES, backend, block_bytes, resolved
from megatron_evolve.kernels.tile_table import entries

A100, L40, H100 = 166_912, 101_376, 232_448


def test_each_name_is_its_module():
    assert [backend(name) for name in ("reference", "eager", "triton")] == [reference, eager, fused]


def test_every_backend_has_the_functions_that_the_page_says():
    types = {"GroupedLora", "RoutePlan"}
    shared = {"router", "route_plan", "experts_of_chunks", "permute", "unpermute", "grouped_linear", "grouped_experts"}
    shared |= {"linear_cross_entropy"}
    alone = {"weighted_squared_relu"}, {"gated_rms_norm"}, {"routed_experts", "router_from_tokens"}
    assert set(eager.__all__) == types | shared | alone[0]
    assert set(fused.__all__) == types | shared | alone[1] | alone[2]
    assert types | shared | alone[0] | alone[1] <= set(dir(reference))
    assert set(re.findall(r"\w+", forms.__doc__)) >= shared.union(*alone)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"one of reference, eager, triton; got 'cuda': name one of them"):
        backend("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device runs the kernels")
def test_triton_without_a_device():
    program = "from megatron_evolve.kernels.backend import backend; backend('triton')"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "ValueError: the triton backend needs a CUDA device; torch finds none: use the eager backend, or set "
        "TRITON_INTERPRET=1 first (slow, for tests)"
    )


def test_an_interpreter_that_its_numpy_fails_is_refused(monkeypatch):
    versions = {"triton": "3.6.0+git1", "numpy": "2.4.0rc1"}
    monkeypatch.setattr(forms.metadata, "version", versions.get)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"before 3.7 needs numpy before 2.4; got triton 3.6.0\+git1 and numpy 2.4.0"):
        backend("triton")
    for change in ({"numpy": "2.3.5"}, {"triton": "3.7.0"}, {"triton": "3.10.1"}):
        monkeypatch.setattr(forms.metadata, "version", (versions | change).get)
        assert backend("triton") is fused
    monkeypatch.setattr(forms.metadata, "version", versions.get)
    assert backend("eager") is eager


def test_auto_is_the_fused_form_where_a_device_is(monkeypatch):
    assert resolved("reference") == "reference"
    monkeypatch.setattr(forms, "block_bytes", lambda: H100)
    for there, name in ((True, "triton"), (False, "eager")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert resolved(AUTO) == name


def test_auto_steps_aside_where_a_tile_does_not_fit_and_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for found, name in ((None, "triton"), (A100, "triton"), (H100, "triton")):
        monkeypatch.setattr(forms, "block_bytes", lambda found=found: found)
        assert resolved(AUTO) == name
    monkeypatch.setattr(forms, "block_bytes", lambda: L40)
    with pytest.warns(UserWarning, match=r"plain PyTorch: a block of this GPU has 101,376 bytes of shared memory"):
        assert resolved(AUTO) == "eager"


def test_the_largest_tile_of_the_table_is_the_one_that_auto_asks_room_for():
    """Both operands of bfloat16, in as many buffers as there are steps in flight."""
    tiles = [tile for entry in entries() for tile in entry.tiles]
    assert max((t.rows + t.columns) * t.depth * 2 * (t.stages - 1) for t in tiles) == TILE_BYTES


DRIVER = """
#include <cuda.h>
CUresult cuInit(unsigned flags) { return FAILS ? CUDA_ERROR_NO_DEVICE : CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = COUNT; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = 7 + ordinal; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute asked, CUdevice device) {
    if (asked != CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN) return CUDA_ERROR_INVALID_VALUE;
    *value = device == 7 ? 232448 : 101376;
    return CUDA_SUCCESS;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_driver_is_asked_for_the_least_of_the_gpus(monkeypatch, tmp_path):
    """A library of the driver's own header, so that names, types and the attribute's number are the driver's."""
    header = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    (tmp_path / "driver.c").write_text(DRIVER)
    load = ctypes.CDLL
    for count, fails, found in ((1, 0, H100), (2, 0, L40), (0, 0, None), (2, 1, None)):
        library = tmp_path / f"{count}{fails}.so"
        flags = ["-shared", "-fPIC", f"-DCOUNT={count}", f"-DFAILS={fails}", "-I", str(header)]
        subprocess.run(["cc", *flags, "-o", str(library), str(tmp_path / "driver.c")], check=True)
        monkeypatch.setattr(ctypes, "CDLL", lambda name, library=library: load(str(library)))
        assert block_bytes() == found
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(str(tmp_path / "none.so")))
    assert block_bytes() is None
