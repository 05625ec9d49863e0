"""What a team asks before it books GPUs: which layouts of a model fit, the best first, and why others do not."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_evolve.substrate.layout import SIZES, Layout
from megatron_evolve.substrate.model.architecture import architecture
from megatron_evolve.substrate.plan.flops import token_flops
from megatron_evolve.substrate.plan.job import GIB, Job, memory_bytes
from megatron_evolve.substrate.plan.ranking import RESERVED_BYTES, Candidate, assess, rank

SHOWN = 10  # rows of the table, and reasons under it


def make_plan(
    preset: str, gpus: int, gpu_memory: str, job: dict[str, Any], layout: str | None, transformer_engine: bool
) -> dict[str, Any]:
    """The whole answer as JSON holds it. Raises ValueError in one sentence for what cannot be planned.

    `memory_gb` and all its parts are in GiB, as GPUs are labelled, with what CUDA and NCCL take; `traffic_gb` what a
    rank sends in a step; `cost_s` orders the layouts that fit and forecasts nothing.
    """
    model = architecture(preset)
    gpu_bytes = memory_bytes(gpu_memory)
    asked = Job.parse(job, where="plan")
    if asked.sequence_length > model.max_sequence_length:
        raise ValueError(
            f"a row of {preset} has at most {model.max_sequence_length} tokens, got {asked.sequence_length}: "
            "lower --seq"
        )
    if layout is None:
        found = rank(model, gpus, gpu_bytes, asked, transformer_engine=transformer_engine)
    else:
        one = Layout.from_text(layout)
        found = [assess(model, one, gpus, gpu_bytes, asked, transformer_engine=transformer_engine)]
    return {
        "preset": preset,
        "parameters_total": model.num_parameters(),
        "parameters_active": model.num_active_parameters(),
        "parameters_mtp": model.num_mtp_parameters(),
        "gpu_memory_gb": gpu_bytes / GIB,
        "job": asked.model_dump(mode="json", exclude=None if asked.mode == "lora" else {"adapter"}),
        "flops_per_token": asdict(token_flops(model, asked)),
        "layouts": [layout_row(one) for one in found],
    }


def layout_row(one: Candidate) -> dict[str, Any]:
    """One layout as JSON holds it."""
    layout = one.layout
    sizes = {name: getattr(layout, name) for name in SIZES}
    runs = one.memory is not None
    memory = one.memory.gib() | {"reserved": RESERVED_BYTES / GIB} if runs else None
    return {
        **sizes,
        "dp": layout.data_parallel(one.gpus) if one.gpus % layout.ranks == 0 else None,
        "gpus": one.gpus,
        "memory_gb": round((one.memory.total + RESERVED_BYTES) / GIB, 2) if runs else None,
        "fits": one.fits,
        "reason": one.reason or None,
        "stage": one.memory.stage if runs else None,
        "memory": memory,
        "traffic_gb": {kind: round(sent / GIB, 3) for kind, sent in asdict(one.traffic).items()} if runs else None,
        "cost_s": round(one.cost_s, 4) if runs else None,
    }


def show_plan(plan: dict[str, Any]) -> None:
    """The answer for a person: the size, the layouts that fit in order, and reasons of the nearest that do not."""
    console = Console(highlight=False)
    flops = plan["flops_per_token"]
    console.print(
        f"[bold]{plan['preset']}[/]: {plan['parameters_total'] / 1e9:.2f} B parameters, "
        f"{plan['parameters_active'] / 1e9:.2f} B active\n"
        f"GFLOP a token: {flops['forward'] / 1e9:.2f} forward, {flops['train'] / 1e9:.2f} to train\n"
    )
    fits = [row for row in plan["layouts"] if row["fits"]]
    if fits:
        console.print("GB (2^30 bytes) on a GPU of the fullest stage; sent: GB of one GPU in a step")
        console.print(_table(fits[:SHOWN]))
    if len(fits) > SHOWN:
        console.print(f"and {len(fits) - SHOWN} more that fit; --json has them all")
    reasons: dict[str, list[str]] = {}
    for row in plan["layouts"]:
        if not row["fits"]:
            reasons.setdefault(row["reason"], []).append(_name(row))
    if reasons:
        others = len(plan["layouts"]) - len(fits)
        console.print(f"\n{others} of {len(plan['layouts'])} layouts do not run in {plan['gpu_memory_gb']:g} GB:")
    for reason, names in list(reasons.items())[:SHOWN]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        console.print(f"  {names[0]}{more}: {reason}")
    if len(reasons) > SHOWN:
        console.print("  and others further off; --json has them all")


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 0, 0, 1))
    table.add_column("layout", no_wrap=True)
    for head in ("dp", "weights", "grads", "optim", "activ", "logits", "total", "sent", "cost s"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        memory = row["memory"]
        weights = memory["weights"] + memory["adapters"]
        others = [memory[name] for name in ("gradients", "optimizer", "activations", "logits")]
        cells = [f"{value:.1f}" for value in (weights, *others, row["memory_gb"])]
        sent = sum(row["traffic_gb"].values())
        table.add_row(_name(row), str(row["dp"]), *cells, f"{sent:.1f}", f"{row['cost_s']:.2f}")
    return table


def _name(row: dict[str, Any]) -> str:
    return str(Layout(**{name: row[name] for name in SIZES}))
