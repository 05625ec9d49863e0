"""Freezing: one seed, one digest; a pool is swapped without training; a changed byte is found and named."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_evolve.launch.rundir import ATTEMPT_VARIABLE, read_progress
from megatron_evolve.substrate import build as building
from megatron_evolve.substrate import manifest
from megatron_evolve.substrate.build import CHALLENGE, NANO, PRESETS, Preset, build_substrate, main, refreeze
from megatron_evolve.substrate.digest import digest_file
from megatron_evolve.substrate.manifest import read_manifest, verify
from megatron_evolve.substrate.model.architecture import NANO_CPU, Architecture
from megatron_evolve.substrate.puzzles import families
from megatron_evolve.substrate.tokenizer import PieceTokenizer, challenge_tokenizer, nano_tokenizer

SMALL = {"pattern": "M*E", "hidden_size": 32, "mamba_num_heads": 4, "expert_ffn_size": 32}
TINY = Architecture.model_validate(NANO_CPU.model_dump() | SMALL)


def tiny(preset: Preset = NANO, steps: int = 3) -> Preset:
    architecture = TINY.model_copy(update={"max_sequence_length": preset.architecture.max_sequence_length})
    pretraining = preset.pretraining.replace(steps=steps, warmup_steps=1, batch_size=16)
    return dataclasses.replace(preset, architecture=architecture, pretraining=pretraining)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    build_substrate(tiny(), folder, seed=1)
    return folder


def test_one_seed_one_digest(built, tmp_path, monkeypatch):
    monkeypatch.setenv(ATTEMPT_VARIABLE, str(tmp_path))
    again = build_substrate(tiny(), tmp_path / "again", seed=1)
    other = build_substrate(tiny(), tmp_path / "other", seed=2)
    assert again.digest == read_manifest(built).digest != other.digest
    assert again.files == read_manifest(built).files
    told = read_progress(tmp_path)
    assert (told.step, told.steps) == (3, 3), "a build is watched by its count, as a candidate's run is"


def test_the_default_is_the_plain_recipe(built):
    default = verify(built).default
    assert set(default.mix.style.values()) == {"answer"} and len(set(default.mix.weight.values())) == 1
    assert default.recipe.adapter is None and default.recipe.checkpoint_selection == "last"
    assert default.mix.curriculum == "constant" and default.recipe.prompt_loss_weight == 0


def test_a_finished_build_is_verified_not_built_again(built):
    before = digest_file(built / "weights.safetensors"), (built / "manifest.json").stat().st_mtime_ns
    assert build_substrate(tiny(), built, seed=1) == verify(built)
    assert before == (digest_file(built / "weights.safetensors"), (built / "manifest.json").stat().st_mtime_ns)
    with pytest.raises(ValueError, match=r"holds substrate \w{8} of another build"):
        build_substrate(tiny(), built, seed=2)


def test_an_interrupted_build_goes_on_to_the_same_digest(tmp_path, monkeypatch):
    from megatron_evolve.substrate.train.step import Trainer

    monkeypatch.setattr(building, "SAVE_EVERY", 2)
    whole = build_substrate(tiny(steps=6), tmp_path / "whole", seed=1)
    step = Trainer.step

    def broken(self, batch, number):
        if number == 5:
            raise OSError("no space left on device")
        return step(self, batch, number)

    monkeypatch.setattr(Trainer, "step", broken)
    with pytest.raises(OSError, match="no space"):
        build_substrate(tiny(steps=6), tmp_path / "broken", seed=1)
    with pytest.raises(ValueError, match="is no frozen substrate"):
        verify(tmp_path / "broken")
    taken = []
    monkeypatch.setattr(Trainer, "step", lambda self, batch, n: taken.append(n) or step(self, batch, n))
    assert build_substrate(tiny(steps=6), tmp_path / "broken", seed=1).digest == whole.digest
    assert taken == [4, 5]
    assert [path.name for path in (tmp_path / "broken" / "build").iterdir() if path.is_dir()] == []


def test_a_sibling_shares_weights_and_differs_in_its_pool(built, tmp_path):
    construction = tiny().construction({"cipher": 0.9, "equation": 0.0})
    assert construction.cue_rate == {"cipher": 0.9}
    sibling = refreeze(built, tmp_path / "sibling", construction=construction)
    original = read_manifest(built)
    assert sibling.files == original.files and sibling.digest != original.digest
    assert verify(tmp_path / "sibling") == sibling == refreeze(built, tmp_path / "sibling", construction=construction)
    assert build_substrate(tiny(), tmp_path / "sibling", seed=1, cue_rate={"cipher": 0.9}) == sibling
    with pytest.raises(ValueError, match="of another build"):
        refreeze(built, tmp_path / "sibling", construction=tiny().construction({"cipher": 0.5}))


@pytest.mark.parametrize("name", ["weights.safetensors", "tokenizer.json"])
def test_a_changed_byte_is_found_and_named(built, tmp_path, name):
    refreeze(built, tmp_path / "copy", construction=read_manifest(built).construction)
    path = tmp_path / "copy" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} was changed: expected sha256"):
        verify(tmp_path / "copy")


def test_another_trainer_is_told_and_another_benchmark_is_none(built, monkeypatch):
    frozen = read_manifest(built).trainer
    assert {"kernels/tile_table.json", "substrate/train/step.py", "kernels/fc1.py"} <= frozen.keys()
    assert not any("bench" in name or "plan" in name.split("/") for name in frozen)
    changed = frozen | {"kernels/tile_table.json": "0" * 64}
    monkeypatch.setattr(manifest, "trainer_sources", lambda: changed)
    with pytest.raises(ValueError, match=r"source changed .*\(kernels/tile_table.json\): scores would not compare"):
        verify(built)
    assert verify(built, trainer=False) == read_manifest(built)


def test_the_presets_are_whole():
    assert PRESETS == {"nano-cpu": NANO, "challenge-cpu": CHALLENGE}
    for preset, tokenizer in ((NANO, nano_tokenizer()), (CHALLENGE, challenge_tokenizer())):
        assert preset.tokenizer() == tokenizer
        architecture = preset.architecture.with_vocab(tokenizer.vocab_size)
        assert architecture.num_parameters() < 1.1e6
        assert (
            max(preset.pretraining.sequence_length, preset.tuning.sequence_length) <= architecture.max_sequence_length
        )
        assert set(preset.exposure) == set(families.FAMILIES)
        assert preset.default().mix.difficulty == preset.difficulty == preset.construction({}).difficulty


def test_the_challenge_preset_builds_with_its_own_rows_and_tokenizer(tmp_path):
    substrate = build_substrate(tiny(CHALLENGE, steps=2), tmp_path, seed=1)
    assert substrate.construction.difficulty == substrate.default.mix.difficulty == "challenge"
    tokenizer = PieceTokenizer.from_json((tmp_path / "tokenizer.json").read_text())
    assert tokenizer == challenge_tokenizer() and substrate.architecture["vocab_size"] == tokenizer.vocab_size
    entries = [json.loads(line) for line in (tmp_path / "build" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [0, 1]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--preset", "nano"], "no preset 'nano'; did you mean nano-cpu?"),
        (
            ["--preset", "nano-cpu", "--cue-rate", "cypher=0.9"],
            "no family 'cypher' for a cue rate; did you mean cipher?",
        ),
        (["--preset", "nano-cpu", "--cue-rate", "cipher"], "expected FAMILY=RATE such as cipher=0.9, got 'cipher'"),
        (["--preset", "nano-cpu", "--cue-rate", "cipher=9"], "the cue rate of cipher must be in [0, 1]; got 9.0"),
    ],
)
def test_bad_arguments_are_one_sentence(argv, sentence, tmp_path, capsys):
    assert main([*argv, "--out", str(tmp_path / "out"), "--seed", "1"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith(sentence)
    assert not (tmp_path / "out").exists()
