"""Engine `transformers`: the run's weights as transformers' NemotronHForCausalLM, decoded greedily in this process.

Prompts of similar length go together, padded on the left. transformers masks padding in attention and zeroes it before
Mamba's projection and after its convolution, which have no bias there, so a padded row answers as it would alone (the
tests ask 80 prompts of 1 to 28 tokens both ways). Its cached Mamba step does not clamp the step size as the scan does
that reads the prompt, so an architecture with a clamp (`dt_min` above 0) is decoded without a cache: slow, but right.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_evolve.eval.engines.seam import Answers, Completion, Examinee, Prompt
from megatron_evolve.eval.engines.settings import TransformersSettings

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_evolve.substrate.model.architecture import Architecture


def ask(settings: TransformersSettings, examinee: Examinee, prompts: Sequence[Prompt]) -> Answers:
    """Every prompt answered by transformers' model with the run's weights, its adapter merged."""
    from megatron_evolve.eval.engines.export import merged_state

    architecture, state = merged_state(examinee)
    model = nemotron_h(architecture, state)
    tokenizer = examinee.tokenizer
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].tokens))
    done: dict[int, Completion] = {}
    for first in range(0, len(order), settings.batch_size):
        batch = order[first : first + settings.batch_size]
        rows = greedy(
            model,
            [prompts[index].tokens for index in batch],
            max_new_tokens=settings.max_new_tokens,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            use_cache=architecture.dt_min == 0,
        )
        done |= {
            index: Completion(tokenizer.decode(row), len(row), truncated)
            for index, (row, truncated) in zip(batch, rows, strict=True)
        }
        examinee.tell(len(done), len(prompts))
    return Answers(tuple(done[index] for index in range(len(prompts))))


def nemotron_h(architecture: "Architecture", state: dict[str, "Tensor"]) -> Any:
    """transformers' model with these weights (transformers 5 names), in evaluation mode, on a GPU if there is one."""
    import torch
    from transformers import NemotronHConfig, NemotronHForCausalLM

    from megatron_evolve.substrate.model.huggingface import huggingface_config

    # One expert at a time: the same sums as ours on every device, where the grouped form depends on what is installed.
    model = NemotronHForCausalLM._from_config(
        NemotronHConfig(**huggingface_config(architecture)),
        attn_implementation="sdpa",
        experts_implementation="eager",
        dtype=next(iter(state.values())).dtype,
    )
    # Multi-token prediction heads train a model and write nothing; transformers' model has no place for them.
    model.load_state_dict({name: t for name, t in state.items() if not name.startswith("mtp.")}, strict=True)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def greedy(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    use_cache: bool = True,
) -> list[tuple[list[int], bool]]:
    """The most likely tokens after each prompt, without the end token, and whether the budget ended first."""
    import torch
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    tokens_BL = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask_BL = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        out_BL = model.generate(
            tokens_BL.to(model.device),
            attention_mask=mask_BL.to(model.device),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=eos_id,
                pad_token_id=pad_id,
                use_cache=use_cache,
            ),
        )
    rows = [row[:max_new_tokens] for row in out_BL[:, width:].tolist()]
    return [(row[: row.index(eos_id)], False) if eos_id in row else (row, True) for row in rows]
