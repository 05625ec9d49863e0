"""Cached decoding gives the tokens of the uncached definition, for every mixture of lengths and batches."""

import random
from collections.abc import Iterator

import pytest
import torch

from megatron_evolve.eval.generate import Generation, generate
from megatron_evolve.substrate.model import build, decode, weights
from megatron_evolve.substrate.model.architecture import NANO_CPU

EOS, PAD = 1, 0
ARCHITECTURE = NANO_CPU.with_vocab(60)


@pytest.fixture(scope="module")
def model() -> Iterator[torch.nn.Module]:
    """Random weights enlarged until every layer matters, with an end token that comes up now and then."""
    build.start(seed=3)
    model = build.build_model(ARCHITECTURE, seed=3).eval()
    rng = torch.Generator().manual_seed(9)
    for name, value in weights.state_of(model).items():
        if name.endswith("expert_bias"):
            value.copy_(torch.rand(value.shape, generator=rng) * 0.3)
        elif value.dim() == 2 or name.endswith("conv1d_weight"):
            value.mul_(6)
    model.output_layer.weight.data[EOS] *= 1.1
    yield model
    build.stop()


def _prompts(count: int, seed: int, longest: int = 28) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, 60) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def _generate(model: torch.nn.Module, prompts: list[list[int]], **changes) -> list[Generation]:
    settings = {"max_new_tokens": 24, "eos_id": EOS, "pad_id": PAD, "batch_size": 24, **changes}
    return generate(model, prompts, **settings)


def test_cache_changes_nothing(model: torch.nn.Module) -> None:
    prompts = _prompts(80, seed=1)
    got = _generate(model, prompts)
    assert got == _generate(model, prompts, use_cache=False)
    # the comparison is worth something: varied text, both endings, rows that finish early and late
    assert len({g.tokens for g in got}) > 50
    assert 3 < sum(g.truncated for g in got) < 77
    assert all(EOS not in g.tokens and (len(g.tokens) == 24) == g.truncated for g in got)


def test_batches_and_order_change_nothing(model: torch.nn.Module) -> None:
    prompts = _prompts(40, seed=2)
    got, told = _generate(model, prompts), []
    assert got == _generate(model, prompts, batch_size=7, tell=lambda *counts: told.append(counts))
    assert told == [(7, 40), (14, 40), (21, 40), (28, 40), (35, 40), (40, 40)]
    assert got == _generate(model, prompts[::-1], batch_size=100)[::-1]
    assert got[5] == _generate(model, [prompts[5]])[0]


def test_a_prompt_of_one_token_beside_a_long_one(model: torch.nn.Module) -> None:
    prompts = [[5], _prompts(1, seed=4)[0] * 3, [7, 8]]
    assert _generate(model, prompts) == _generate(model, prompts, use_cache=False)


def test_logits_of_every_step_are_those_of_the_whole_model(model: torch.nn.Module) -> None:
    prompts = _prompts(6, seed=5, longest=9)
    logits, state = decode.prefill(model, prompts, PAD, capacity=40)
    texts = [list(prompt) for prompt in prompts]
    for _ in range(30):
        for row, text in enumerate(texts):
            with torch.no_grad():
                want = model(torch.tensor([text]), None, None)[0, -1]
            assert (logits[row] - want).abs().max() < 1e-4 * want.abs().max()  # float32, 30 steps; measured 5e-6
        tokens = torch.randint(2, 60, (6,), generator=torch.Generator().manual_seed(len(texts[0])))
        texts = [[*text, int(token)] for text, token in zip(texts, tokens, strict=True)]
        logits, state = decode.step(model, tokens, state)


def test_rows_can_be_dropped_and_reordered(model: torch.nn.Module) -> None:
    prompts = _prompts(5, seed=6)
    logits, state = decode.prefill(model, prompts, PAD, capacity=60)
    keep = torch.tensor([4, 1])
    fewer, _ = decode.step(model, logits.argmax(-1)[keep], state.rows(keep))
    everyone, _ = decode.step(model, logits.argmax(-1), state)
    assert torch.allclose(fewer, everyone[keep], atol=1e-5)


def test_no_prompts(model: torch.nn.Module) -> None:
    assert _generate(model, []) == []


def test_refusals(model: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        _generate(model, [[2], []])
    with pytest.raises(ValueError, match="must be at least 1; got 0"):
        _generate(model, [[2]], max_new_tokens=0)
    with pytest.raises(ValueError, match="capacity must cover the longest prompt; got 1 for 2"):
        decode.prefill(model, [[2, 3]], PAD, capacity=1)
    _, state = decode.prefill(model, [[2, 3]], PAD, capacity=2)
    with pytest.raises(ValueError, match="has room for 2 tokens and is full"):
        decode.step(model, torch.tensor([4]), state)
    model.train()
    try:
        with pytest.raises(ValueError, match=r"call model\.eval"):
            _generate(model, [[2]])
    finally:
        model.eval()
