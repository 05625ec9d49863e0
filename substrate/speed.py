"""Training and decoding on a CPU, beside what they are measured against, in one run: same weights, tokens and threads.

    megatron-evolve bench train

Training: a step of `Trainer` (Megatron's wrapper, schedule and optimizer around this package's layers) beside a plain
loop over transformers' NemotronHForCausalLM with torch's AdamW, on the same batch and threads. Their experts come in
several forms; the fastest of those that run here counts. No time is told for models whose losses differ.
Decoding: with state beside the whole sequence anew for every token; no time where the tokens differ.

Times are the process's CPU time, so that other work on the machine matters less; the median of the rounds stands beside
their 20th and 80th percentile.
"""

import time
from collections.abc import Callable, Iterator
from statistics import quantiles
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_evolve.substrate.model.architecture import NANO_CPU, Architecture
from megatron_evolve.substrate.packing import Batch
from megatron_evolve.substrate.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

SAME_LOSS = 1e-4  # relative; float32 sums in another order
THEIR_EXPERTS = ("eager", "grouped_mm")  # batched_mm copies a matrix for every token: a seventh of their speed


def sized(name: str, **fields: Any) -> Architecture:
    return Architecture.model_validate(NANO_CPU.model_dump() | {"name": name, "dt_min": 1e-3} | fields)


# By name: the model, rows and tokens of a batch.
SIZES = {
    "1M": (
        sized("1M", hidden_size=96, mamba_num_heads=12, num_experts=8, expert_ffn_size=224, shared_ffn_size=256),
        64,
        80,
    ),
    "12.5M": (
        sized(
            "12.5M",
            hidden_size=288,
            mamba_num_heads=36,
            num_experts=16,
            expert_ffn_size=528,
            shared_ffn_size=768,
            num_attention_heads=8,
            head_dim=36,
            vocab_size=512,
        ),
        16,
        128,
    ),
}
DECODED, PROMPT, DECODE_ROWS = 256, 32, 8


def train(size: str, rounds: int) -> dict:
    """One row: tokens a second of both, and how many times theirs ours is."""
    import torch

    architecture, rows, length = SIZES[size]
    batch = batch_of(architecture, rows, length)
    step, state = ours(architecture, rows, length)
    found: dict[str, tuple[list[float], list[float]]] = {}
    runs: dict[str, Callable[[Batch], float]] = {"megatron-evolve": step}
    reasons = {}
    for experts in THEIR_EXPERTS:
        try:
            runs[f"transformers, experts {experts}"] = run = theirs(architecture, state, experts)
            run(batch)  # what cannot run says so here
            runs[f"transformers, experts {experts}"] = theirs(architecture, state, experts)
        except (RuntimeError, ValueError, NotImplementedError, AttributeError, TypeError) as failure:
            runs.pop(f"transformers, experts {experts}", None)
            reasons[experts] = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
    for _ in range(rounds + 1):
        for name, run in runs.items():
            begun = time.process_time()
            loss = run(batch)
            losses, seconds = found.setdefault(name, ([], []))
            losses.append(loss)
            seconds.append(time.process_time() - begun)
    own_losses, own = found.pop("megatron-evolve")
    told = {
        name: {"tokens_per_s": spread([rows * length / t for t in seconds[1:]]), "first_loss": losses[0]}
        for name, (losses, seconds) in found.items()
    }
    best = max(told, key=lambda name: told[name]["tokens_per_s"][0], default=None)
    row = {"op": "train", "size": size, "parameters": architecture.num_parameters(), "rows": rows, "length": length}
    row |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "not_run": reasons}
    wrong = best is None or abs(told[best]["first_loss"] / own_losses[0] - 1) > SAME_LOSS
    if wrong:
        return row | {"reason": f"losses differ: ours {own_losses[0]}, theirs {told}"}
    ratio = spread([theirs_s / ours_s for theirs_s, ours_s in zip(found[best][1][1:], own[1:], strict=True)])
    mine = spread([rows * length / t for t in own[1:]])
    return row | {"ours_tokens_per_s": mine, "theirs": told, "fastest": best, "ratio": ratio}


def decode(size: str) -> dict:
    """One row: seconds for `DECODED` tokens with state and without, and the ratio."""
    import torch

    from megatron_evolve.substrate.model import build
    from megatron_evolve.substrate.model import decode as decoding

    architecture, _, _ = SIZES[size]
    architecture = architecture.model_copy(update={"max_sequence_length": PROMPT + DECODED})
    model = build.build_model(architecture, seed=1).eval()
    prompts = torch.randint(
        0, architecture.vocab_size, (DECODE_ROWS, PROMPT), generator=torch.Generator().manual_seed(0)
    )

    def with_state() -> "Tensor":
        logits, state = decoding.prefill(model, prompts.tolist(), 0, PROMPT + DECODED)
        chosen = [logits.argmax(-1)]
        while len(chosen) < DECODED:
            logits, state = decoding.step(model, chosen[-1], state)
            chosen.append(logits.argmax(-1))
        return torch.stack(chosen, 1)

    def anew() -> "Tensor":
        tokens = prompts
        for _ in range(DECODED):
            tokens = torch.cat([tokens, model(tokens, None, None)[:, -1].argmax(-1, keepdim=True)], 1)
        return tokens[:, PROMPT:]

    seconds, tokens = {}, {}
    with torch.inference_mode():
        for name, run in {"with_state": with_state, "anew": anew}.items():
            begun = time.process_time()
            tokens[name] = run()
            seconds[name] = round(time.process_time() - begun, 3)
    row = {"op": "decode", "size": size, "rows": DECODE_ROWS, "prompt": PROMPT, "new_tokens": DECODED}
    if not torch.equal(tokens["with_state"], tokens["anew"]):
        return row | {"reason": "the tokens differ"}
    return row | {"seconds": seconds, "ratio": round(seconds["anew"] / seconds["with_state"], 2)}


def rows(rounds: int) -> Iterator[dict]:
    """Both sizes trained, the small one decoded, in a process group of one."""
    from megatron_evolve.substrate.model import build

    build.start(seed=1)
    for size in SIZES:
        yield train(size, rounds)
    yield decode("1M")  # at 12.5 M the whole sequence anew takes five minutes
    build.stop()


def batch_of(architecture: Architecture, rows: int, length: int) -> Batch:
    """Random tokens, every label counted."""
    tokens_BT = np.random.default_rng(0).integers(0, architecture.vocab_size, (rows, length))
    weights_BT, padding_BT = np.ones((rows, length), np.float32), np.zeros((rows, length), bool)
    return Batch(tokens_BT, np.roll(tokens_BT, -1, 1), weights_BT, padding_BT, float(rows * length), ("none",) * rows)


def ours(architecture: Architecture, rows: int, length: int) -> tuple[Callable[[Batch], float], dict[str, "Tensor"]]:
    """A step of this package's trainer, and the weights it starts from under transformers' names."""
    from megatron_evolve.substrate.model import build, huggingface, weights
    from megatron_evolve.substrate.train.step import Trainer

    model = build.build_model(architecture, seed=1)
    state = {name: t.clone() for name, t in huggingface.to_huggingface(weights.state_of(model), architecture).items()}
    recipe = Recipe(batch_size=rows, sequence_length=length, steps=1000, warmup_steps=1, lr=1e-3)
    trainer, count = Trainer([model], recipe), iter(range(recipe.steps))
    return lambda batch: trainer.step(batch, next(count)).loss, state


def theirs(architecture: Architecture, state: dict[str, "Tensor"], experts: str) -> Callable[[Batch], float]:
    """A step of a plain loop over transformers' model with those weights."""
    import torch
    from transformers import NemotronHConfig, NemotronHForCausalLM

    from megatron_evolve.substrate.model import huggingface

    config = NemotronHConfig(**huggingface.huggingface_config(architecture))
    choice = {"attn_implementation": "sdpa", "experts_implementation": experts}
    model = NemotronHForCausalLM._from_config(config, **choice)
    model.load_state_dict(state, strict=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)

    def step(batch: Batch) -> float:
        tokens, labels = torch.from_numpy(batch.tokens_BT), torch.from_numpy(batch.labels_BT)
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    return step


def spread(values: list[float]) -> list[float]:
    """Median, 20th and 80th percentile, to four digits."""
    tenths = quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return [float(f"{value:.4g}") for value in (tenths[4], tenths[1], tenths[7])]
