"""A backend is chosen by name in one place, and one that cannot run says so in a sentence."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_evolve.kernels import eager, fused, reference
from megatron_evolve.kernels.backend import AUTO, backend, resolved


def test_each_name_is_its_module():
    assert [backend(name) for name in ("reference", "eager", "triton")] == [reference, eager, fused]


def test_every_backend_has_the_same_functions():
    shared = {"router", "route_plan", "experts_of_chunks", "permute", "unpermute", "grouped_linear", "grouped_experts"}
    shared |= {"linear_cross_entropy", "GroupedLora", "RoutePlan"}
    for module in (reference, eager, fused):
        assert shared <= set(dir(module))


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


def test_auto_is_the_fused_form_where_a_device_is(monkeypatch):
    assert resolved("reference") == "reference"
    for there, name in ((True, "triton"), (False, "eager")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert resolved(AUTO) == name
