"""The model on one GPU, in one command and a few minutes: is it right in bfloat16, and does it train.

    python substrate/gpu_check.py --out docs/results/gpu-model.jsonl

Needs this checkout, torch, triton, megatron-core, pydantic, safetensors, einops and psutil. A Nemotron-3-Nano cut to a
few layers, all of full width, is built on the GPU in bfloat16 and handed to a second process that has no GPU and
computes in float32 (Megatron and this package choose their device once a process). Compared are every layer alone,
given the same input, its gradients, the losses, and the output table as it is trained, once in plain PyTorch and once
with the fused kernels (experts, gated norm, loss): those may be off by what plain PyTorch loses, and half more. Then a
few steps of full training and of LoRA, with their time and memory beside the plan's; the fused ones first, and none
begun after `--seconds`. `--layers transformer-engine` takes its norms and linears on the GPU's side.
One JSON line each, as they come. What fails is a row with its reason; a process that dies or hangs is one too, and
another goes on with the next training. Status 1 where something is wrong, 2 without a GPU.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

PATTERN = "MEM*"
ROWS, LENGTH = 2, 512
FORMS = ("eager", "triton")
TIMES_EAGER = 1.5
# bfloat16 rounds to 2^-9 of a number, a layer some ten times in a row; what is wrong is off by its whole size. Below
# LEAST a ratio of errors says nothing.
MOST, LEAST = 5e-2, 1e-3
FEW = 128  # numbers, one a Mamba head: of so few the errors of two forms differ by chance, 1.7 times seen of 8
MARGIN = 0.02  # of scores between 0 and 1, of which bfloat16 loses up to 0.004
# On an H100 the float32 process took 24 s and the first fused step 11, most of it to compile. The order is that of what
# is least known: a run that was cut at 75 s had no row of full training.
TRAININGS = (("sft", "triton"), ("lora", "triton"), ("lora", "eager"), ("sft", "eager"))
SECONDS = 300
GRACE_S = 60  # for the training that runs then
REFERENCE_S = 120  # of the float32 process, on however few cores; most of what is said meanwhile is nothing
SILENT_S = 180  # then a process hangs
ROOM = 1.5  # times the weights, 4.2 GB of them: what comes back in float32 is a third of that
WEIGHTS, GIVEN, FOUND = "weights.safetensors", "given.safetensors", "found.safetensors"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the JSON lines there too")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"begin no training after it ({SECONDS})")
    parser.add_argument("--layers", default="auto", help="norms and dense linears: auto, pytorch or transformer-engine")
    # what follows is for the processes that this one starts
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)  # the float32 process's folder
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # for what the two processes hand over
    parser.add_argument("--share", help=argparse.SUPPRESS)  # 0/1: the process on the GPU
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # by time.monotonic, which they share
    parser.add_argument("--after", type=int, default=-1, help=argparse.SUPPRESS)  # its part that ended another process
    options = parser.parse_args(argv)
    from megatron_evolve.kernels.bench.lines import line_of
    from megatron_evolve.substrate.model.architecture import NEMOTRON3_NANO

    architecture = shortened(NEMOTRON3_NANO, PATTERN)
    if options.reference:
        reference(architecture, options.reference)
        return 0
    import torch

    if not torch.cuda.is_available():
        print("gpu_check: needs a CUDA device, and torch finds none: run it on a machine with one", file=sys.stderr)
        return 2
    if options.share:
        for row in on_gpu(architecture, options):
            print(line_of(row), flush=True)
        return 0  # also where something is wrong, which its row says: any other status means that rows are missing
    ok = True
    with (options.out or Path(os.devnull)).open("w", encoding="utf-8") as file:
        for row in report(architecture, time.monotonic() + options.seconds, options.layers):
            ok = ok and row.get("ok", True)
            for sink in (file, sys.stdout):
                sink.write(line_of(row) + "\n")
                sink.flush()
    return 0 if ok else 1


def shortened(architecture: Any, pattern: str) -> Any:
    """The same widths with these layers."""
    return type(architecture).model_validate(architecture.model_dump() | {"name": f"{pattern}", "pattern": pattern})


def report(architecture: Any, until: float, layers: str = "auto") -> Iterator[dict]:
    """The machine, then what the process on the GPU tells; until then, by time.monotonic, it begins trainings."""
    import torch

    from megatron_evolve.kernels.bench import shares
    from megatron_evolve.kernels.bench.rows import commit, device_name

    machine = {"device": device_name("cuda"), "torch": torch.__version__, "commit": commit()}
    yield machine | {"model": architecture.name, "layers": layers, "cores": shares.usable_cores()}
    with tempfile.TemporaryDirectory(dir=roomiest(needed_bytes(architecture))) as folder:
        own = [str(Path(__file__).resolve()), "--folder", folder, "--layers", layers, "--until", str(until)]
        for row in shares.run(own, 1, until + GRACE_S, SILENT_S):
            yield row | (named(row["step"]) if "failed" in row and "step" in row else {})


def named(part: int) -> dict:
    """How a row names that part of `parts`."""
    if part == 0:
        return {"compared": "all"}
    mode, experts = TRAININGS[part - 1]
    return {"steps": mode, "experts": experts}


def needed_bytes(architecture: Any) -> int:
    """In the folder through which the two processes hand their tensors over."""
    from megatron_evolve.substrate.layout import Layout
    from megatron_evolve.substrate.plan.parameters import stage_share, stages

    (whole,) = stages(architecture, Layout())
    return int(ROOM * 2 * stage_share(architecture, Layout(), whole).total)


def roomiest(needed: int, folders: tuple[str, ...] | None = None) -> str:
    """The folder in memory where that many bytes fit, otherwise the usual one: a container's has 64 MB by default.

    Where neither has the room, the one with more of it, and `check_room` tells the rest.
    """
    folders = folders or ("/dev/shm", tempfile.gettempdir())
    free = {folder: shutil.disk_usage(folder).free for folder in folders if os.access(folder, os.W_OK)}
    return next((folder for folder in free if free[folder] >= needed), max(free, key=free.__getitem__))


def on_gpu(architecture: Any, options: argparse.Namespace) -> Iterator[dict]:
    """The process on the GPU: the comparison, then trainings, from the part that follows `options.after`."""
    from megatron_evolve.kernels.bench.shares import begin
    from megatron_evolve.substrate.gpu_steps import trained
    from megatron_evolve.substrate.model import build

    build.start(seed=1)
    parts = [partial(compared, architecture, options.folder, layers=options.layers)]
    parts += [lambda how=how: iter([trained(architecture, *how, options.layers)]) for how in TRAININGS]
    yield from told(parts, options.until, options.after, begin)
    build.stop()


def told(
    parts: list[Callable[[], Iterator[dict]]], until: float, after: int, begin: Callable[[int], None]
) -> Iterator[dict]:
    """The rows of each part; a reason in place of figures where there was no time or no memory for it, or it failed.

    Raises what a part did to the GPU: this process is then to end, and another to go on.
    """
    import torch

    from megatron_evolve.kernels.bench.rows import settle, stopped

    for number, part in enumerate(parts):
        late = time.monotonic() - until
        if number <= after:
            continue
        if late > 0:
            yield named(number) | {"reason": f"not begun: {late:.0f} s after the last second given"}
            continue
        begin(number)
        try:
            yield from part()
        except torch.cuda.OutOfMemoryError as failure:
            yield named(number) | {"reason": str(failure).splitlines()[0]}
        except Exception as failure:  # noqa: BLE001 - whatever it is, the parts that follow are asked
            yield named(number) | {"ok": False} | stopped(failure)
        settle("cuda" if torch.cuda.is_available() else "cpu")


def compared(architecture: Any, folder: Path, command: tuple[str, ...] = (), layers: str = "auto") -> Iterator[dict]:
    """The losses, each layer's and the table's output and gradients: bfloat16 here against float32 without a GPU."""
    import torch

    from megatron_evolve.kernels.bench.rows import stopped
    from megatron_evolve.substrate.model import build

    start = time.monotonic()
    how = {"experts": "eager", "layers": layers, "params_dtype": torch.bfloat16}
    model = build.build_model(architecture, seed=1, **how)
    model.output_layer.requires_grad_(False)  # or its losses were made from logits, whatever the form
    spread_bias(model)
    tokens = torch.randint(0, architecture.vocab_size, (2, ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    check_room(folder, needed_bytes(architecture))
    want = wanted(model, tokens, folder, command)
    yield {"reference": "float32, CPU", "seconds": round(time.monotonic() - start, 1)}
    for piece, ask in pieces(model, tokens, want).items():
        errors: dict[str, dict[str, float]] = {}
        for form in FORMS:
            take_form(model, form)
            try:
                errors[form] = {key: relative(value, want[key]) for key, value in ask().items()}
            except Exception as failure:  # noqa: BLE001 - whatever it is, the other pieces are asked
                yield {"compared": piece, "form": form, "ok": False} | stopped(failure)
        for key in errors[FORMS[0]] if len(errors) == len(FORMS) else ():
            eager, fused = (errors[form][key] for form in FORMS)
            most = MOST if want[key].numel() < FEW else max(TIMES_EAGER * eager, LEAST)
            right = eager <= MOST and fused <= most
            yield {"compared": key, "eager": round(eager, 6), "triton": round(fused, 6), "ok": right}


def check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"the weights and what comes back need {needed / 1e9:.1f} GB in {folder.parent}; got {free / 1e9:.1f}: set "
            "TMPDIR to a folder with room for them"
        )


def wanted(model: "Module", tokens: "Tensor", folder: Path, command: tuple[str, ...] = ()) -> "dict[str, Tensor]":
    """What the float32 process computes with these weights. RuntimeError with its last words where it ends badly."""
    from safetensors.torch import load_file, save_file

    from megatron_evolve.substrate.model import weights

    weights.save_weights(model, folder / WEIGHTS)
    save_file({"tokens": tokens[0].contiguous(), "labels": tokens[1].contiguous()}, folder / GIVEN)
    command = command or (sys.executable, str(Path(__file__).resolve()), "--reference", str(folder))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    done = subprocess.run(command, env=environment, check=False, timeout=REFERENCE_S, **streams)
    if done.returncode:
        lines = done.stderr.strip().splitlines()[-12:] or ["no message"]
        raise RuntimeError("\n".join([f"the float32 process: status {done.returncode}: {lines[-1]}", *lines]))
    return load_file(folder / FOUND)


def pieces(
    model: "Module", tokens: "Tensor", want: "dict[str, Tensor]"
) -> "dict[str, Callable[[], dict[str, Tensor]]]":
    """What is compared, piece by piece, in the form that the model then has."""
    number_of_layers = len(model.decoder.layers)
    return {
        "losses": lambda: {"losses": losses_of(model, tokens[0], tokens[1])},
        **{
            f"layer {n}": lambda n=n: layer_outcome(model, n, want[f"layer {n} input"]) for n in range(number_of_layers)
        },
        "table": lambda: table_outcome(model, model.linear_cross_entropy, want["table input"], tokens[1]),
    }


def take_form(model: "Module", name: str) -> None:
    """Experts, gated norms and loss in the form of that name; a norm of mamba-ssm stays what it is."""
    from megatron_evolve.kernels.backend import backend
    from megatron_evolve.substrate.model.experts import GroupedExperts
    from megatron_evolve.substrate.model.mamba_ssm import GatedRMSNorm

    form = backend(name)
    model.linear_cross_entropy = form.linear_cross_entropy
    for module in model.modules():
        if isinstance(module, GroupedExperts):
            module.compute = form.grouped_experts
        elif isinstance(module, GatedRMSNorm):
            module.fused = form.gated_rms_norm if name == "triton" else None


def reference(architecture: Any, folder: Path) -> None:
    """The second process: the same weights in float32 on all cores."""
    import torch
    from safetensors.torch import load_file, save_file

    from megatron_evolve.kernels.bench.shares import usable_cores
    from megatron_evolve.kernels.reference import linear_cross_entropy
    from megatron_evolve.substrate.model import build, weights

    build.start(seed=1)
    torch.set_num_threads(usable_cores())
    model = build.build_model(architecture, seed=1, experts="eager", perform_initialization=False)
    weights.put_weights(model, load_file(folder / WEIGHTS))
    given = load_file(folder / GIVEN)
    inputs: dict[int, Tensor] = {}

    def keep(number: int, args: tuple, kwargs: dict) -> None:
        inputs[number] = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).detach()

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs, n=n: keep(n, args, kwargs), with_kwargs=True)
        for n, layer in enumerate(model.decoder.layers)
    ]
    found = {"losses": losses_of(model, given["tokens"], given["labels"])}
    for hook in hooks:
        hook.remove()
    for number, hidden in inputs.items():
        hidden = hidden.bfloat16().float()  # what the GPU will be given, to the bit
        if architecture.pattern[number] == "E":
            hidden = decided(model.decoder.layers[number], hidden, architecture.top_k)
        found |= {f"layer {number} input": hidden} | layer_outcome(model, number, hidden)
    embedded = torch.nn.functional.rms_norm(inputs[0].flatten(0, 1), inputs[0].shape[-1:]).bfloat16().float()
    found |= {"table input": embedded} | table_outcome(model, linear_cross_entropy, embedded, given["labels"])
    save_file({name: value.contiguous() for name, value in found.items()}, folder / FOUND)
    build.stop()


def spread_bias(model: "Module") -> None:
    """A routing bias as after training: at zero it would not be seen."""
    import torch

    rng = torch.Generator().manual_seed(3)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(torch.rand(buffer.shape, generator=rng) * 0.1)


def decided(layer: "Module", hidden: "Tensor", chosen: int) -> "Tensor":
    """The tokens (N, 1, H) of (L, B, H) whose last chosen expert leads the next by a margin that bfloat16 keeps.

    Without it a token near a tie goes to another expert, which is no error, and hides every error.
    """
    import torch

    with torch.no_grad():
        router = layer.mlp.router
        logits = router.gating(layer.pre_mlp_layernorm(hidden)).flatten(0, -2)
        ranked = (torch.sigmoid(logits.float()) + router.expert_bias).sort(-1, descending=True).values
    return hidden.flatten(0, 1)[ranked[:, chosen - 1] - ranked[:, chosen] > MARGIN].unsqueeze(1)


def losses_of(model: "Module", tokens: "Tensor", labels: "Tensor") -> "Tensor":
    """The whole model's loss of each label, float32 on the CPU."""
    import torch

    device = next(model.parameters()).device
    with torch.no_grad():
        return model(tokens.to(device), None, None, labels=labels.to(device)).float().cpu()


def layer_outcome(model: "Module", number: int, hidden: "Tensor") -> "dict[str, Tensor]":
    """One layer on that input (L, B, H), and the gradients of a fixed random direction; float32 on the CPU."""
    import torch

    layer, weight = model.decoder.layers[number], next(model.parameters())
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(number)).bfloat16()
    hidden, direction = (t.to(weight.device, weight.dtype) for t in (hidden, direction))
    hidden.requires_grad_()
    watched = {name: p for name, p in layer.named_parameters() if is_watched(name)}
    output = layer(hidden_states=hidden, attention_mask=None)
    output = output[0] if isinstance(output, tuple) else output
    grads = torch.autograd.grad(output, [hidden, *watched.values()], direction)
    found = dict(zip(("input gradient", *watched), grads, strict=True)) | {"output": output}
    return {f"layer {number} {name}": t.detach().to("cpu", torch.float32, copy=True) for name, t in found.items()}


def table_outcome(model: "Module", loss_of: Any, x_TH: "Tensor", labels: "Tensor") -> "dict[str, Tensor]":
    """The output table as it is trained: losses, and gradients of a fixed random direction; float32 on the CPU.

    Of the table's own gradient the rows of some labels and some others: all of it would be the size of the table.
    """
    import torch

    W_VH, labels = model.output_layer.weight.detach().requires_grad_(), labels.flatten()
    x_TH = x_TH.to(W_VH.device, W_VH.dtype).requires_grad_()
    losses = loss_of(x_TH, W_VH, labels.to(W_VH.device))
    direction = torch.rand(losses.shape, generator=torch.Generator().manual_seed(7)).to(losses)
    dx_TH, dW_VH = torch.autograd.grad(losses, (x_TH, W_VH), direction)
    rows = torch.cat([labels[:FEW], torch.arange(min(FEW, len(W_VH)))]).to(dW_VH.device)
    found = {"losses": losses, "input gradient": dx_TH, "weight": dW_VH[rows]}
    return {f"table {name}": t.detach().to("cpu", torch.float32, copy=True) for name, t in found.items()}


def is_watched(name: str) -> bool:
    """Every kind of weight; of the experts two: all of them would be the size of the model."""
    return "experts.linear" not in name or "shared" in name or name.endswith(("weight0", "weight1"))


def relative(got: "Tensor", want: "Tensor") -> float:
    """||got - want|| / ||want||; a gradient that is zero in both is equal."""
    off, size = (got.double() - want.double()).norm().item(), want.double().norm().item()
    return off / size if size else off


if __name__ == "__main__":
    # This folder comes first in the path of a script, and its files must not be taken for other people's modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it ends what it started
    sys.exit(main())
