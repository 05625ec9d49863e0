"""transformers' NemotronH with the run's weights writes the tokens that our own decoding writes, item by item."""

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_evolve.eval.engines import export, in_process, megatron
from megatron_evolve.eval.engines.seam import Examinee, Prompt
from megatron_evolve.eval.engines.settings import MegatronSettings, TransformersSettings
from megatron_evolve.substrate.model import build, weights
from megatron_evolve.substrate.model.architecture import NANO_CPU, Architecture
from megatron_evolve.substrate.tokenizer import nano_tokenizer

TOKENIZER = nano_tokenizer()
ARCHITECTURE = NANO_CPU.with_vocab(TOKENIZER.vocab_size)
ALL_BUT_HEADS = ("attention", "mamba", "experts", "shared", "output")


class OpenRun(Examinee):
    """A run whose model is at hand."""

    def open(self) -> torch.nn.Module:
        return self.model


def run_of(model: torch.nn.Module, architecture: Architecture, folder: Path) -> Examinee:
    substrate = SimpleNamespace(architecture=architecture.model_dump())
    run = OpenRun(folder, substrate, folder, TOKENIZER, folder / "work")
    object.__setattr__(run, "model", model)
    return run


def enlarged(architecture: Architecture, *, adapter: bool) -> torch.nn.Module:
    """Random weights large enough that every layer matters, with an end token that comes up now and then."""
    model = build.build_model(architecture, seed=3).eval()
    rng = torch.Generator().manual_seed(9)
    for name, value in weights.state_of(model).items():
        if name.endswith("expert_bias"):
            value.copy_(torch.rand(value.shape, generator=rng) * 0.3)
        elif value.dim() == 2 or name.endswith("conv1d_weight"):
            value.mul_(6)
    model.output_layer.weight.data[TOKENIZER.eos_id] *= 1.1
    if adapter:
        from megatron_evolve.substrate.model import lora  # needs Megatron, which the fixture starts

        lora.add_lora(model, rank=4, alpha=8, targets=ALL_BUT_HEADS, seed=1)
        with torch.no_grad():
            for name, value in lora.adapter_state(model).items():
                if name.endswith("lora_B"):
                    value.copy_(torch.randn(value.shape, generator=rng) * 0.2)
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def megatron_is_started() -> Iterator[None]:
    build.start(seed=3)
    yield
    build.stop()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    rng = random.Random(1)
    tokens = [tuple(rng.randrange(2, TOKENIZER.vocab_size) for _ in range(rng.randint(1, 28))) for _ in range(80)]
    return [Prompt(text="", tokens=one, message="") for one in tokens]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapter"])
def test_same_completions_item_by_item(adapter: bool, prompts: list[Prompt], tmp_path: Path) -> None:
    run = run_of(enlarged(ARCHITECTURE, adapter=adapter), ARCHITECTURE, tmp_path)
    ours = megatron.ask(MegatronSettings(max_new_tokens=24, batch_size=80), run, prompts)
    theirs = in_process.ask(TransformersSettings(kind="transformers", max_new_tokens=24, batch_size=24), run, prompts)
    assert theirs == ours
    # the comparison is worth something: varied text, both endings, rows that end early and late
    assert len({one.text for one in ours.completions}) > 50
    assert 3 < sum(one.truncated for one in ours.completions) < 77
    if adapter:
        base = run_of(enlarged(ARCHITECTURE, adapter=False), ARCHITECTURE, tmp_path)
        assert megatron.ask(MegatronSettings(max_new_tokens=24, batch_size=80), base, prompts) != ours


def test_a_clamped_step_is_clamped_while_writing_too(prompts: list[Prompt], tmp_path: Path) -> None:
    """Steps of softplus(-8) lie below the clamp of 1e-2, which transformers' cached step leaves out."""
    architecture = ARCHITECTURE.model_copy(update={"dt_min": 1e-2})
    model = enlarged(architecture, adapter=False)
    for name, value in weights.state_of(model).items():
        if name.endswith("dt_bias"):
            value.sub_(8)
    run, few = run_of(model, architecture, tmp_path), prompts[:24]
    ours = megatron.ask(MegatronSettings(max_new_tokens=16, batch_size=24), run, few)
    theirs = in_process.ask(TransformersSettings(kind="transformers", max_new_tokens=16, batch_size=24), run, few)
    assert theirs == ours
    cached = in_process.greedy(
        in_process.nemotron_h(*export.merged_state(run)),
        [one.tokens for one in few],
        max_new_tokens=16,
        eos_id=TOKENIZER.eos_id,
        pad_id=TOKENIZER.pad_id,
        use_cache=True,
    )
    assert [TOKENIZER.decode(row) for row, _ in cached] != [one.text for one in ours.completions]
