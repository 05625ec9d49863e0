"""Packed sequences are the same sequences alone: losses, gradients, and what happens when one reset is left out."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_evolve.substrate.model import build, mamba
from tests.substrate.enlarged import build_enlarged

# one token, fewer than the convolution's taps, chunks of 16 whole and not, a boundary inside and on a chunk
LENGTHS = [5, 1, 40, 16, 2, 1, 33, 14]
# float32 losses near 4 (largest difference; measured 2.9e-6) and gradients (by norm; measured at most 6.4e-6)
CLOSE = 1e-5
# smallest effect of a reset left out that counts as seen; measured 0.7 and more
SEEN = 0.1


@pytest.fixture(scope="module")
def model() -> Iterator[torch.nn.Module]:
    build.start(seed=1)
    yield build_enlarged()
    build.stop()


@pytest.fixture(scope="module")
def rows(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Tokens and labels (1, T)."""
    tokens = torch.randint(0, 77, (2, 1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    return tokens[0], tokens[1]


def pack(lengths: list[int]):
    from megatron_evolve.substrate.model.packed import PackedSequences  # once Megatron is there

    return PackedSequences(lengths)


def losses_and_gradients(model: torch.nn.Module, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    losses.mean().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def run_packed(model: torch.nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
    return model(rows[0], None, None, labels=rows[1], packed_seq_params=pack(LENGTHS))


@pytest.fixture(scope="module")
def alone(model: torch.nn.Module, rows: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and gradients of the sequences one by one."""
    pairs = zip(*(row.split(LENGTHS, 1) for row in rows), strict=True)
    return losses_and_gradients(model, torch.cat([model(t, None, None, labels=n) for t, n in pairs], 1))


def test_a_pack_is_its_sequences(
    model: torch.nn.Module, rows: tuple[Tensor, Tensor], alone: tuple[Tensor, dict[str, Tensor]]
) -> None:
    losses, gradients = losses_and_gradients(model, run_packed(model, rows))
    assert losses.shape == (1, sum(LENGTHS)) and losses.std() > 0.5
    assert (losses - alone[0]).abs().max() < CLOSE
    for name, gradient in gradients.items():
        assert (gradient - alone[1][name]).norm() <= CLOSE * alone[1][name].norm(), name


def _conv_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = mamba.causal_conv
    monkeypatch.setattr(mamba, "causal_conv", lambda x, weight, bias, sequence_LB: conv(x, weight, bias))


def _state_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = mamba.chunked_scan
    monkeypatch.setattr(mamba, "chunked_scan", lambda *args, sequence_LB: scan(*args))


def _attention_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_evolve.substrate.model import attention

    attend = attention._attend_packed
    monkeypatch.setattr(attention, "_attend_packed", lambda q, k, v, packed: attend(q, k, v, pack([len(q)])))


@pytest.mark.parametrize("control", [_conv_runs_on, _state_runs_on, _attention_runs_on])
def test_a_reset_left_out_is_seen(
    control,
    model: torch.nn.Module,
    rows: tuple[Tensor, Tensor],
    alone: tuple[Tensor, dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    control(monkeypatch)
    with torch.no_grad():
        difference = (run_packed(model, rows) - alone[0]).abs()
    assert difference[:, LENGTHS[0] :].max() > SEEN
    assert difference[:, : LENGTHS[0]].max() < CLOSE  # the first sequence has nothing before it


def test_one_sequence_is_the_unpacked_row(model: torch.nn.Module, rows: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        packed = model(*rows[:1], None, None, packed_seq_params=pack([rows[0].shape[1]]))
        assert torch.allclose(packed, model(rows[0], None, None), atol=CLOSE)


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [2, 3, 4, 5, 8, 9], LENGTHS, [100, *[1] * 50, 64, 65]])
def test_batches_hold_every_token_once_and_little_padding(model: torch.nn.Module, lengths: list[int]) -> None:
    batches, place = pack(lengths).batches
    places = torch.cat([tokens.flatten() for tokens in batches])
    assert torch.equal(places[place], torch.arange(sum(lengths)))
    assert len(places) < 2 * sum(lengths)
    assert len(batches) <= 1 + (max(lengths) - 1).bit_length()
    numbers = pack(lengths).seq_idx[0].tolist()
    assert [len(list(group)) for _, group in itertools.groupby(numbers)] == lengths


def test_refusals_name_the_remedy(model: torch.nn.Module, rows: tuple[Tensor, Tensor]) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    with pytest.raises(ValueError, match=r"at least one token; got lengths \[3, 0\]"):
        pack([3, 0])
    with pytest.raises(ValueError, match=r"needs tokens of shape \(1, 7\); got \(1, 112\)"):
        model(rows[0], None, None, packed_seq_params=pack([3, 4]))
    with pytest.raises(ValueError, match=r"needs tokens of shape \(1, 112\); got \(2, 56\)"):
        model(rows[0].view(2, 56), None, None, packed_seq_params=pack(LENGTHS))
    with pytest.raises(ValueError, match="must be PackedSequences; got PackedSeqParams"):
        model(rows[0], None, None, packed_seq_params=PackedSeqParams(qkv_format="thd"))
