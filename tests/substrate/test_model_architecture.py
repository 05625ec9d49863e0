"""Architecture: shapes that fit, counts that match, errors that say what to do. No torch."""

import pytest
from pydantic import ValidationError

from megatron_evolve.substrate.model.architecture import NANO_CPU, PRESETS, Architecture


def changed(**fields) -> Architecture:
    return Architecture.model_validate(NANO_CPU.model_dump() | fields)


def test_nano_has_every_kind_of_layer_and_splits_in_two() -> None:
    assert PRESETS["nano-cpu"] is NANO_CPU
    assert set(NANO_CPU.pattern) == {"M", "*", "E"}
    halves = ("num_attention_heads", "num_query_groups", "mamba_num_heads", "mamba_num_groups", "num_experts")
    assert all(getattr(NANO_CPU, name) % 2 == 0 for name in halves)
    assert 200_000 < NANO_CPU.num_parameters() < 1_000_000


def test_vocabulary_is_rounded_up() -> None:
    assert [NANO_CPU.with_vocab(n).vocab_size for n in (1, 16, 77, 80, 81)] == [16, 16, 80, 80, 96]
    assert NANO_CPU.with_vocab(77).model_copy(update={"vocab_size": NANO_CPU.vocab_size}) == NANO_CPU


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 77}, "multiple of 16"),
        ({"top_k": 1}, "greater than or equal to 2"),
        ({"top_k": 5}, r"top_k must be at most num_experts \(4\); got 5"),
        ({"num_query_groups": 3}, "num_attention_heads must be a multiple of num_query_groups; got 4 and 3"),
        ({"mamba_num_groups": 3}, "mamba_num_heads must be a multiple of mamba_num_groups; got 8 and 3"),
        ({"pattern": "MAE"}, "pattern"),
        ({"dt_min": -1.0}, "greater than or equal to 0"),
        ({"hiden_size": 64}, "Extra inputs"),
    ],
)
def test_refuses_what_does_not_fit(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        changed(**fields)


def test_is_frozen() -> None:
    with pytest.raises(ValidationError):
        NANO_CPU.hidden_size = 1
