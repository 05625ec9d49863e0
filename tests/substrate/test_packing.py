"""Training batches: the same rows for any number of ranks and any resume, exact labels and weights, honest refusals."""

import random
import time

import numpy as np
import pytest

from megatron_evolve.substrate import packing
from megatron_evolve.substrate.layout import Layout
from megatron_evolve.substrate.manifest import Construction
from megatron_evolve.substrate.mix import Mix
from megatron_evolve.substrate.packing import Packer, Tally, instance_hash, read_excluded
from megatron_evolve.substrate.puzzles import families
from megatron_evolve.substrate.puzzles.row import completion_text, prompt_text
from megatron_evolve.substrate.recipe import Recipe
from megatron_evolve.substrate.tokenizer import nano_tokenizer

TOKENIZER = nano_tokenizer()
POOL = Construction(
    families=families.FAMILIES,
    difficulty="nano",
    styles={family: families.styles_of(family, "nano") for family in families.FAMILIES},
)
RECIPE = Recipe(steps=5, batch_size=16, warmup_steps=1)
UNIFORM = Mix(weight=dict.fromkeys(families.FAMILIES, 1.0), style=dict.fromkeys(families.FAMILIES, "answer"))


def packer(mix=UNIFORM, recipe=RECIPE, seed=3, **fields) -> Packer:
    return Packer(mix, fields.pop("pool", POOL), TOKENIZER, recipe, seed, **fields)


def batches(source: Packer, start: int = 0) -> list[packing.Batch]:
    return list(source.batches(Tally(), start))


def only(family: str, style: str = "answer", **fields) -> Mix:
    return Mix(weight={family: 1.0}, style={family: style}, **fields)


def texts(batch: packing.Batch) -> list[str]:
    return [TOKENIZER.decode(row) for row in batch.tokens_BT]


def same(first: packing.Batch, second: packing.Batch) -> bool:
    arrays = ("tokens_BT", "labels_BT", "weights_BT", "padding_BT")
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in arrays)


def test_same_seed_same_batches_other_seed_other_rows():
    first, second, other = batches(packer()), batches(packer()), batches(packer(seed=4))
    assert all(map(same, first, second))
    assert not set(texts(first[0])) & set(texts(other[0]))


def test_resume_sees_the_batches_and_the_tally_of_the_whole_run():
    whole, rest = Tally(), Tally()
    expected = list(packer().batches(whole))[3:]
    assert all(map(same, expected, packer().batches(rest, start=3)))
    assert whole == rest


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_out_the_global_batch(ranks):
    batch = batches(packer())[0]
    parts = [batch.part(rank, ranks) for rank in range(ranks)]
    assert np.array_equal(np.concatenate([part.tokens_BT for part in parts]), batch.tokens_BT)
    assert {part.weight_sum for part in parts} == {batch.weight_sum}


def test_rows_that_do_not_divide_among_ranks_are_refused():
    with pytest.raises(ValueError, match="multiple of the 3 data-parallel ranks; got 16"):
        batches(packer())[0].part(0, 3)


@pytest.mark.parametrize("style", ["answer", "short-trace"])
def test_labels_follow_tokens_and_weights_follow_parts(style):
    recipe = RECIPE.replace(prompt_loss_weight=0.25, trace_loss_weight=0.5, answer_loss_weight=2.0, steps=2)
    mix = only("unit_conversion", style)
    batch = batches(packer(mix, recipe))[0]
    rng = random.Random("3/0/0")
    row = families.draw("unit_conversion", rng, difficulty="nano", cue_rate=0.0)
    prompt, completion = TOKENIZER.encode(prompt_text(row)), completion_text(row, style)
    trace = TOKENIZER.encode(completion[: completion.rindex("\\boxed{")])
    answer = [*TOKENIZER.encode(completion)[len(trace) :], TOKENIZER.eos_id]
    expected = prompt + trace + answer
    length = len(expected) - 1
    assert (len(trace) > 0) == (style == "short-trace")
    assert batch.tokens_BT[0, :length].tolist() == expected[:-1]
    assert batch.labels_BT[0, :length].tolist() == expected[1:]
    weights = [0.25] * (len(prompt) - 1) + [0.5] * len(trace) + [2.0] * len(answer)
    assert batch.weights_BT[0, :length].tolist() == weights
    assert not batch.weights_BT[0, length:].any() and batch.padding_BT[0, length:].all()
    assert batch.weight_sum == pytest.approx(batch.weights_BT.sum())
    assert batch.num_tokens == (~batch.padding_BT).sum()


def test_each_step_holds_every_share_to_within_one_row():
    mix = UNIFORM.replace(weight=dict(zip(families.FAMILIES, (5, 1, 1, 1, 1, 0), strict=True)))
    for batch in batches(packer(mix, RECIPE.replace(batch_size=20))):
        for family, share in mix.weight.items():
            assert abs(batch.families.count(family) - 20 * share) < 1
        assert "equation" not in batch.families


def test_a_curriculum_moves_the_shares():
    weight = dict.fromkeys(families.FAMILIES, 0.0) | {"cipher": 1.0}
    recipe = RECIPE.replace(steps=11, batch_size=60)
    counts = [
        batch.families.count("cipher")
        for batch in batches(packer(UNIFORM.replace(weight=weight, curriculum="uniform-first"), recipe))
    ]
    assert counts[0] == 10 and counts[-1] == 60 and counts == sorted(counts)


def test_a_share_of_traces_for_pretraining():
    some = texts_of_completions(
        packer(only("unit_conversion"), RECIPE.replace(batch_size=200, steps=2), trace_share=0.3)
    )
    assert 0.2 < sum(text.startswith("f") for text in some) / len(some) < 0.4


def texts_of_completions(source: Packer) -> list[str]:
    return [text.split("\nA ")[1] for batch in batches(source) for text in texts(batch)]


def test_the_cue_rate_of_the_pool_reaches_the_rows():
    def senders_that_tell(rate):
        pool = POOL.replace(cue_rate={"cipher": rate})
        source = packer(only("cipher"), RECIPE.replace(batch_size=200, steps=2), pool=pool)
        shift = {"alice": "s1", "hatter": "s2", "queen": "s3", "rabbit": "s4"}
        source = Packer(only("cipher", "short-trace"), pool, TOKENIZER, source.recipe, 3)
        rows = [text for batch in batches(source) for text in texts(batch)]
        return sum(shift[row.split("\n")[0].split()[-1]] == row.split("\nA ")[1][:2] for row in rows) / len(rows)

    assert senders_that_tell(1.0) == 1.0
    assert 0.15 < senders_that_tell(0.0) < 0.35


def test_a_prompt_is_trained_on_no_more_often_than_the_cap(monkeypatch):
    draw = families.draw
    few = [draw("unit_conversion", random.Random(n), difficulty="nano") for n in range(20)]
    monkeypatch.setattr(packing.families, "draw", lambda family, rng, **knobs: rng.choice(few))
    tally = Tally()
    list(packer(only("unit_conversion", repetition_cap=5), RECIPE.replace(batch_size=32, steps=2)).batches(tally))
    assert tally.rows["unit_conversion"] == 64 and tally.redrawn["unit_conversion"] > 0
    with pytest.raises(
        ValueError, match=r"'unit_conversion' gave no usable row in 200 draws.*raise mix\.repetition_cap"
    ):
        batches(packer(only("unit_conversion", repetition_cap=1), RECIPE.replace(batch_size=32, steps=2)))


def test_excluded_instances_are_dropped_and_counted(tmp_path):
    row = families.draw("equation", random.Random("3/0/0"), difficulty="nano", cue_rate=0.0)
    path = tmp_path / "excluded"
    path.write_text(instance_hash(row) + "\n")
    tally = Tally()
    first = next(packer(only("equation"), excluded=read_excluded(path)).batches(tally))
    assert tally.dropped == {"equation": 1} and len(first.tokens_BT) == 16
    assert not any(text.startswith(row.prompt + "\n") for text in texts(first))


def test_a_damaged_exclusion_file_is_named_by_line(tmp_path):
    path = tmp_path / "excluded"
    path.write_text("0" * 64 + "\nnot a hash\n")
    with pytest.raises(ValueError, match=r"excluded:2: expected 64 hexadecimal digits"):
        read_excluded(path)


def test_what_the_pool_cannot_give_is_refused_in_one_sentence():
    with pytest.raises(
        ValueError, match=r"a row of family 'cipher' in style 'answer' has 34 tokens, recipe.sequence_length is 20"
    ):
        batches(packer(only("cipher"), RECIPE.replace(sequence_length=20)))
    with pytest.raises(ValueError, match=r"mix.weight names 'chess', which the pool does not hold"):
        packer(only("chess"))
    with pytest.raises(ValueError, match=r"mix.style.cipher is 'epic'; the pool offers answer, short-trace"):
        packer(only("cipher", "epic"))
    with pytest.raises(ValueError, match=r"mix.difficulty is 'challenge', but the pool's rows are 'nano'"):
        packer(UNIFORM.replace(difficulty="challenge"))


def test_held_out_rows_are_in_no_step():
    source = packer(recipe=RECIPE.replace(steps=20))
    held_out = source.held_out(60, uniform=True)
    trained = {text for batch in batches(source) for text in texts(batch)}
    assert not trained & set(texts(held_out))
    assert all(held_out.families.count(family) == 10 for family in families.FAMILIES)


def test_narrowing_keeps_every_row_and_saves_padding():
    batch = batches(packer(recipe=RECIPE.replace(batch_size=64)))[0]
    parts = batch.narrowed(8)
    assert len(parts) == 2 and all(len(part.tokens_BT) % 8 == 0 for part in parts)
    assert sorted(text for part in parts for text in texts(part)) == sorted(texts(batch))
    assert sum(part.weights_BT.sum() for part in parts) == batch.weights_BT.sum()
    assert sum(part.tokens_BT.size for part in parts) < batch.tokens_BT.size - packing.MIN_SAVING
    assert batch.narrowed(64) == [batch]


ARRAYS = ("tokens_BT", "labels_BT", "weights_BT", "padding_BT")


@pytest.mark.parametrize("tail", [1, 4])
def test_widening_adds_padding_and_nothing_else(tail):
    batch = batches(packer())[0]
    for narrow in (batch, batch.packed(None)[0]):
        width = narrow.tokens_BT.shape[1]
        wide = narrow.widened(width + tail)
        for name in ARRAYS:
            array, expected = getattr(wide, name), getattr(narrow, name)
            assert array.dtype == expected.dtype and np.array_equal(array[:, :width], expected)
            assert array.shape[1] == width + tail and (array[:, width:] == (name == "padding_BT")).all()
        assert (wide.weight_sum, wide.families, wide.num_tokens) == (batch.weight_sum, batch.families, batch.num_tokens)
        assert wide.lengths[:-1] == narrow.lengths[:-1] and sum(wide.lengths) == (width + tail if wide.lengths else 0)
        assert narrow.widened(width) is narrow


@pytest.mark.parametrize("ranks", [2, 3])
def test_context_parallel_ranks_share_out_every_row(ranks):
    """Pieces of one length, the earliest with the latest; together they are the row."""
    batch = batches(packer())[0]
    batch = batch.widened(Layout(cp=ranks).padded(batch.tokens_BT.shape[1]))
    parts = [batch.mirrored(rank, ranks) for rank in range(ranks)]
    width = batch.tokens_BT.shape[1] // (2 * ranks)
    for name in ARRAYS:
        firsts = [getattr(part, name)[:, :width] for part in parts]
        lasts = [getattr(part, name)[:, width:] for part in reversed(parts)]
        assert np.array_equal(np.concatenate(firsts + lasts, axis=1), getattr(batch, name))


def test_a_run_of_rows_costs_a_second_at_most():
    start = time.process_time()
    tally = Tally()
    for _ in packer(recipe=RECIPE.replace(batch_size=64, steps=140)).batches(tally):
        pass
    assert sum(tally.rows.values()) == 140 * 64
    assert time.process_time() - start < 2.0  # measured 0.25
