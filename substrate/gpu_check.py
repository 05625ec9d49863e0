"""The model on one GPU, in one command and a few minutes: is it right in bfloat16, and does it train.

    python substrate/gpu_check.py --out docs/results/gpu-model.jsonl

Needs this checkout and torch, triton, megatron-core and pydantic. A Nemotron-3-Nano cut to a few layers, all of full
width, is built on the GPU in bfloat16 and handed to a second process that has no GPU and computes in float32 (Megatron
and this package choose their device once a process). Compared are every layer alone, given the same input, the losses
and the gradients, once with the plain experts and once with the fused kernels: those may be off by what plain PyTorch
loses, and half more. Then a few steps of LoRA and of full training, with their time and memory beside the plan's.
One JSON line each, as they come. Status 1 where something is wrong, 2 without a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

PATTERN = "MEM*E"
ROWS, LENGTH = 2, 256
TIMES_EAGER = 1.5
# bfloat16 rounds to 2^-9 of a number, a layer a few times. A router's gradient is a difference of nearly equal terms
# and loses most; what is wrong is off by its whole size.
MOST = {"layer": 2e-2, "losses": 1e-2, "gradient": 0.25}
STEPS, WARM = 6, 2
WEIGHTS, GIVEN, FOUND = "weights.safetensors", "given.safetensors", "found.safetensors"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the JSON lines there too")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)  # the float32 process's folder
    options = parser.parse_args(argv)
    from megatron_evolve.substrate.model.architecture import NEMOTRON3_NANO

    architecture = shortened(NEMOTRON3_NANO, PATTERN)
    if options.reference:
        reference(architecture, options.reference)
        return 0
    import torch

    if not torch.cuda.is_available():
        print("gpu_check: needs a CUDA device, and torch finds none: run it on a machine with one", file=sys.stderr)
        return 2
    ok = True
    with (options.out or Path(os.devnull)).open("w", encoding="utf-8") as file:
        for row in report(architecture):
            ok = ok and row.get("ok", True)
            for sink in (sys.stdout, file):
                sink.write(json.dumps(row) + "\n")
                sink.flush()
    return 0 if ok else 1


def shortened(architecture: Any, pattern: str) -> Any:
    """The same widths with these layers."""
    return type(architecture).model_validate(architecture.model_dump() | {"name": f"{pattern}", "pattern": pattern})


def report(architecture: Any) -> Iterator[dict]:
    """The machine, the model against float32, the training steps."""
    import torch

    from megatron_evolve.kernels.bench.rows import commit, device_name
    from megatron_evolve.substrate.model import build

    build.start(seed=1)
    yield {"device": device_name("cuda"), "torch": torch.__version__, "commit": commit(), "model": architecture.name}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield from compared(architecture, Path(folder))
    for mode in ("lora", "sft"):
        for experts in ("triton", "eager"):
            torch.cuda.empty_cache()
            try:
                yield trained(architecture, mode, experts)
            except torch.cuda.OutOfMemoryError as failure:
                yield {"steps": mode, "experts": experts, "reason": str(failure).splitlines()[0]}
    build.stop()


def compared(architecture: Any, folder: Path, command: tuple[str, ...] = ()) -> Iterator[dict]:
    """Each layer, the losses and the gradients in bfloat16 here against float32 in a process without a GPU."""
    import torch
    from safetensors.torch import load_file, save_file

    from megatron_evolve.kernels.backend import backend
    from megatron_evolve.substrate.model import build, weights
    from megatron_evolve.substrate.model.experts import GroupedExperts

    start = time.monotonic()
    model = build.build_model(architecture, seed=1, experts="eager", params_dtype=torch.bfloat16)
    spread_bias(model)
    weights.save_weights(model, folder / WEIGHTS)
    tokens = torch.randint(0, architecture.vocab_size, (2, ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens[0].contiguous(), "labels": tokens[1].contiguous()}, folder / GIVEN)
    command = command or (sys.executable, str(Path(__file__).resolve()), "--reference", str(folder))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    want = load_file(folder / FOUND)
    yield {"reference": "float32, CPU", "seconds": round(time.monotonic() - start, 1)}

    errors: dict[str, dict[str, float]] = {}
    for name in ("eager", "triton"):
        for module in model.modules():
            if isinstance(module, GroupedExperts):
                module.compute = backend(name).grouped_experts
        found = outcome(model, tokens[0], tokens[1], inputs=want)
        errors[name] = {key: relative(value, want[key]) for key, value in found.items() if not key.startswith("input")}
    for key, eager in errors["eager"].items():
        fused = errors["triton"][key]
        yield {
            "compared": key,
            "eager": round(eager, 6),
            "triton": round(fused, 6),
            "ok": bool(eager <= MOST[key.split()[0]] and fused <= max(TIMES_EAGER * eager, 1e-3)),
        }


def reference(architecture: Any, folder: Path) -> None:
    """The second process: the same weights in float32 on all cores."""
    import torch
    from safetensors.torch import load_file, save_file

    from megatron_evolve.substrate.model import build, weights

    build.start(seed=1)
    torch.set_num_threads(os.cpu_count() or 1)
    model = build.build_model(architecture, seed=1, experts="eager", perform_initialization=False)
    weights.put_weights(model, load_file(folder / WEIGHTS))
    given = load_file(folder / GIVEN)
    found = outcome(model, given["tokens"], given["labels"])
    save_file({name: value.contiguous() for name, value in found.items()}, folder / FOUND)
    build.stop()


def spread_bias(model: "Module") -> None:
    """A routing bias as after training: at zero it would not be seen."""
    import torch

    rng = torch.Generator().manual_seed(3)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(torch.rand(buffer.shape, generator=rng) * 0.05)


def outcome(
    model: "Module", tokens: "Tensor", labels: "Tensor", inputs: "dict[str, Tensor] | None" = None
) -> "dict[str, Tensor]":
    """Losses, watched gradients and each layer's output, float32 on the CPU; each layer's input where none is given.

    With `inputs`, a layer's output is for the input recorded there, so that it carries no error of the layers before.
    """
    import torch

    device = next(model.parameters()).device
    kept: dict[str, Tensor] = {}

    def keep(name: str, value: "Tensor") -> None:
        kept[name] = value.detach().to("cpu", torch.float32, copy=True)  # two names may share memory

    hooks = []
    for number, layer in enumerate(model.decoder.layers):
        if inputs is None:

            def hook(_: Any, args: tuple, kwargs: dict, output: Any, number: int = number) -> None:
                keep(f"input {number}", kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
                keep(f"layer {number}", first(output))

            hooks.append(layer.register_forward_hook(hook, with_kwargs=True))
    watched = {name: p for name, p in model.named_parameters() if is_watched(name)}
    for name, p in model.named_parameters():
        p.requires_grad_(name in watched)
    losses = model(tokens.to(device), None, None, labels=labels.to(device))
    losses.mean().backward()
    keep("losses", losses)
    for name, p in watched.items():
        keep(f"gradient of {name}", p.grad)
        p.grad = None
    for hook in hooks:
        hook.remove()
    if inputs is not None:
        dtype = next(model.parameters()).dtype
        for number, layer in enumerate(model.decoder.layers):
            with torch.no_grad():
                hidden = inputs[f"input {number}"].to(device, dtype)
                keep(f"layer {number}", first(layer(hidden_states=hidden, attention_mask=None)))
    return kept


def first(output: Any) -> "Tensor":
    return output[0] if isinstance(output, tuple) else output


def is_watched(name: str) -> bool:
    """Every kind of weight, and of the experts the first two: all of them would be the size of the model."""
    if "embedding" in name or "output_layer" in name:
        return False
    return "experts.linear" not in name or name.endswith(("weight0", "weight1")) or "shared" in name


def relative(got: "Tensor", want: "Tensor") -> float:
    """||got - want|| / ||want||; a gradient that is zero in both is equal."""
    off, size = (got.double() - want.double()).norm().item(), want.double().norm().item()
    return off / size if size else off


def trained(architecture: Any, mode: str, experts: str, rows: int = 4, length: int = 2048) -> dict:
    """A few optimizer steps: losses, milliseconds a step, tokens a second, peak memory beside the plan's."""
    import numpy as np
    import torch

    from megatron_evolve.substrate.layout import Layout
    from megatron_evolve.substrate.model import build
    from megatron_evolve.substrate.model.lora import add_lora
    from megatron_evolve.substrate.packing import Batch
    from megatron_evolve.substrate.plan.job import Job
    from megatron_evolve.substrate.plan.memory import peak
    from megatron_evolve.substrate.recipe import Adapter, Recipe
    from megatron_evolve.substrate.train.step import Trainer

    job = Job(mode=mode, sequence_length=length, micro_batch=rows, batch_size=rows)
    adapter = job.adapter if mode == "lora" else None
    recipe = Recipe(adapter=adapter, lr=1e-4, batch_size=rows, steps=STEPS, warmup_steps=1, sequence_length=length)
    on_gpu = torch.cuda.is_available()
    settle = torch.cuda.synchronize if on_gpu else lambda: None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    (model,) = build.build_chunks(architecture, seed=1, experts=experts, params_dtype=torch.bfloat16)
    if isinstance(adapter, Adapter):
        add_lora(model, rank=adapter.rank, alpha=adapter.alpha, targets=adapter.targets, seed=0)
    trainer = Trainer([model], recipe)
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, architecture.vocab_size, (rows, length))
    batch = Batch(
        tokens_BT,
        np.roll(tokens_BT, -1, 1),
        np.ones((rows, length), np.float32),
        np.zeros((rows, length), bool),
        float(rows * length),
        ("none",) * rows,
    )
    losses, times = [], []
    for number in range(STEPS):
        settle()
        begun = time.perf_counter()
        losses.append(round(trainer.step(batch, number).loss, 5))
        settle()
        times.append(time.perf_counter() - begun)
    step_s = median(times[WARM:])
    planned = peak(architecture, Layout(), 1, job)
    return {
        "steps": mode,
        "experts": experts,
        "rows": rows,
        "length": length,
        "losses": losses,
        "step_ms": round(1e3 * step_s, 2),
        "step_ms_all": [round(1e3 * t, 2) for t in times],
        "tokens_per_s": round(rows * length / step_s),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if on_gpu else None,
        "planned_gib": round(planned.total / 2**30, 3),
        "ok": bool(losses[-1] < losses[0]),
    }


if __name__ == "__main__":
    # This folder comes first in the path of a script, and its files must not be taken for other people's modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(main())
