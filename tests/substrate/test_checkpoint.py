"""Checkpoints are whole or absent; a killed run goes on bit for bit; bad input is one sentence."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_evolve.launch.rundir import ATTEMPT_VARIABLE, read_progress
from megatron_evolve.substrate.build import NANO, build_substrate, refreeze
from megatron_evolve.substrate.digest import digest_file
from megatron_evolve.substrate.manifest import read_manifest
from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.architecture import NANO_CPU, Architecture
from megatron_evolve.substrate.model.weights import state_of
from megatron_evolve.substrate.recipe import Adapter, Recipe
from megatron_evolve.substrate.settings import Settings
from megatron_evolve.substrate.train import run
from megatron_evolve.substrate.train.checkpoint import latest_resume, load_checkpoint, read_tensors, save_checkpoint
from megatron_evolve.substrate.train.open import open_trained

ROOT = Path(__file__).resolve().parents[2]
TINY = Architecture.model_validate(
    NANO_CPU.model_dump() | {"pattern": "M*E", "hidden_size": 32, "mamba_num_heads": 4, "expert_ffn_size": 32}
)
PRESET = dataclasses.replace(NANO, architecture=TINY, pretraining=NANO.pretraining.replace(steps=3, warmup_steps=1))
RECIPE = Recipe(steps=8, batch_size=16, warmup_steps=2)


@pytest.fixture(scope="module")
def substrate(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("substrate")
    build_substrate(PRESET, folder, seed=1)
    return folder


def candidate(substrate: Path, path: Path, **recipe) -> Path:
    manifest = read_manifest(substrate)
    settings = Settings(mix=manifest.default.mix, recipe=RECIPE.replace(**recipe))
    document = {"id": "c0", "substrate": manifest.digest, "settings": settings.model_dump(mode="json")}
    path.write_text(json.dumps(document))
    return path


def arguments(
    substrate: Path, tmp_path: Path, out: str = "run", seed: int = 5, save_every: int = 2, **recipe
) -> list[str]:
    path = candidate(substrate, tmp_path / f"{out}.json", **recipe)
    named = {"substrate": substrate, "candidate": path, "seed": seed, "out": tmp_path / out, "save-every": save_every}
    return [text for name, value in named.items() for text in (f"--{name}", str(value))]


def digests(folder: Path) -> dict[str, str]:
    files = [folder / "metrics.jsonl", *(folder / "checkpoint").glob("*.safetensors")]
    return {path.name: digest_file(path) for path in files}


def test_a_checkpoint_comes_back(tmp_path):
    tensors = {"model": {"a": torch.arange(6.0).view(2, 3).T}, "optimizer": {"step/a": torch.tensor(3.0)}}
    save_checkpoint(tmp_path / "c", kind="resume", step=3, run="r", tensors=tensors, state={"seconds": 1.5})
    checkpoint = load_checkpoint(tmp_path / "c")
    assert (checkpoint.step, checkpoint.run, checkpoint.state) == (3, "r", {"seconds": 1.5})
    for stem, named in tensors.items():
        read = read_tensors(tmp_path / "c", stem)
        assert read.keys() == named.keys() and all(torch.equal(read[name], named[name]) for name in named)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_missing_truncated_or_changed_checkpoint_is_one_sentence(tmp_path):
    folder = tmp_path / "c"
    with pytest.raises(ValueError, match=r"expected a checkpoint in .*missing or was never finished; train again"):
        load_checkpoint(folder)
    save_checkpoint(folder, kind="weights", step=1, run="r", tensors={"weights": {"a": torch.ones(64)}}, state={})
    path = folder / "weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(
        ValueError, match=rf"expected {len(whole)} bytes in .*weights.safetensors, got {len(whole) - 8}"
    ):
        load_checkpoint(folder)
    path.write_bytes(whole[:-1] + b"x")
    with pytest.raises(ValueError, match=r"expected sha256 .* of .*weights.safetensors, got"):
        load_checkpoint(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"it is missing, or was pruned to free its space: train the run again"):
        load_checkpoint(folder)
    (folder / "manifest.json").write_text('{"schema": "check')
    with pytest.raises(ValueError, match=r"truncated"):
        load_checkpoint(folder)


def test_resuming_passes_over_damaged_and_foreign_checkpoints(tmp_path, caplog):
    for step, owner in ((1, "mine"), (2, "mine"), (3, "mine"), (4, "other")):
        folder = tmp_path / f"step-{step:09d}"
        save_checkpoint(folder, kind="resume", step=step, run=owner, tensors={"model": {"a": torch.ones(1)}}, state={})
    (tmp_path / "step-000000003" / "model.safetensors").write_bytes(b"")
    (tmp_path / ".step-000000005.77.tmp").mkdir()
    assert latest_resume(tmp_path, "mine").name == "step-000000002"
    assert "not resuming from step-000000003: expected" in caplog.text
    assert latest_resume(tmp_path / "none", "mine") is None


def test_a_run_leaves_a_checkpoint_and_its_result_last(substrate, tmp_path, monkeypatch):
    monkeypatch.setenv(ATTEMPT_VARIABLE, str(tmp_path))
    assert run.main(arguments(substrate, tmp_path)) == 0
    told = read_progress(tmp_path)
    assert (told.step, told.steps, told.rank, told.stage) == (8, 8, 0, "train")
    folder = tmp_path / "run"
    result = json.loads((folder / "result.json").read_text())
    assert result["ending"] == "trained" and result["diverged"] is None and result["chosen_step"] == 8
    assert sum(result["rows"].values()) == 8 * 16 and result["checkpoint"] == "checkpoint"
    assert result["loss"] == "logits, or eager where they are more than a chunk"
    assert (result["gated_norm"], result["layers"]) == ("pytorch", "pytorch")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint", "metrics.jsonl", "result.json"]
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == list(range(8))
    before = (folder / "result.json").stat().st_mtime_ns
    assert run.main(arguments(substrate, tmp_path)) == 0  # done already
    assert (folder / "result.json").stat().st_mtime_ns == before


def test_a_packed_run_has_the_losses_of_a_padded_one_and_says_that_it_is_another(substrate, tmp_path, capsys):
    fields = {"adapter": Adapter(rank=2, alpha=4.0), "epsilon": 1e-4}
    padded, packed = (arguments(substrate, tmp_path, name, **fields) for name in ("padded", "packed"))
    assert run.main(padded) == run.main([*packed, "--packed"]) == 0
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("padded", "packed")]
    for one, other in zip(*(map(json.loads, text) for text in lines), strict=True):
        assert other == pytest.approx(one, rel=1e-5)  # of nothing but numbers, the tokens of a step among them
    result = json.loads((tmp_path / "packed" / "result.json").read_text())
    assert result["packed"] and result["loss"] == "eager"  # over the frozen output table
    assert run.main([*padded, "--packed"]) == run.main(packed) == 1
    assert capsys.readouterr().err.count("the result of another run (packed differ)") == 2


@pytest.mark.parametrize("adapter", [None, Adapter(rank=2, alpha=4.0)])
def test_what_a_run_hands_on_is_what_opens(substrate, tmp_path, adapter):
    assert run.main(arguments(substrate, tmp_path, adapter=adapter)) == 0
    kind = "weights" if adapter is None else "adapter"
    saved = read_tensors(tmp_path / "run" / "checkpoint", kind)
    try:
        plain = open_trained(substrate, read_manifest(substrate), substrate)
        model = open_trained(substrate, read_manifest(substrate), tmp_path / "run")
        state = state_of(model)
        if adapter is None:
            assert saved.keys() == state.keys() and all(torch.equal(state[name], saved[name]) for name in saved)
        else:
            assert all("lora_" in name for name in saved)
            base = state_of(plain)
            assert all(torch.equal(state[name], base[name]) for name in base if name in state)
        tokens = torch.arange(2, 12).view(1, -1)
        with torch.no_grad():
            assert not torch.equal(model(tokens, None, None), plain(tokens, None, None))
        assert not model.training
    finally:
        build.stop()


@pytest.mark.parametrize("rule", ["last", "lowest-loss"])
@pytest.mark.parametrize("adapter", [None, Adapter(rank=2, alpha=4.0)])
def test_an_interrupted_run_goes_on_bit_for_bit(substrate, tmp_path, monkeypatch, rule, adapter):
    """The interruption is an error in the middle of a step here; below it is a SIGKILL."""
    from megatron_evolve.substrate.train.step import Trainer

    fields = {"checkpoint_selection": rule, "adapter": adapter, "lr": 0.02}
    assert run.main(arguments(substrate, tmp_path, "whole", **fields)) == 0
    step = Trainer.step

    def broken(self, batch, number):
        if number == 7:
            raise OSError("no space left on device")
        return step(self, batch, number)

    monkeypatch.setattr(Trainer, "step", broken)
    assert run.main(arguments(substrate, tmp_path, "broken", **fields)) == 1
    assert not (tmp_path / "broken" / "result.json").exists()
    assert latest_resume(tmp_path / "broken" / "resume", "") is None  # belongs to this run alone
    monkeypatch.setattr(Trainer, "step", step)
    assert run.main(arguments(substrate, tmp_path, "broken", **fields)) == 0
    assert digests(tmp_path / "whole") == digests(tmp_path / "broken")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "broken")]
    for key in ("rows", "tokens", "loss", "chosen_step", "steps"):
        assert results[0][key] == results[1][key]


def test_a_diverged_run_is_a_result(substrate, tmp_path):
    assert run.main(arguments(substrate, tmp_path, optimizer="sgd", lr=1.0, clip_grad=0.0, steps=60, beta1=0.99)) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["ending"] == "diverged" and result["checkpoint"] is None
    assert result["diverged"]["step"] == result["steps"] - 1
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_bad_input_is_one_sentence_and_no_result(substrate, tmp_path, capsys):
    def refused(argv: list[str]) -> str:
        assert run.main(argv) == 1
        assert not (tmp_path / "run" / "result.json").exists()
        [line] = [line for line in capsys.readouterr().err.splitlines() if "] megatron-evolve train: " in line]
        return line

    argv = arguments(substrate, tmp_path)
    document = json.loads((tmp_path / "run.json").read_text())

    def rewritten(**changes) -> list[str]:
        (tmp_path / "run.json").write_text(json.dumps(document | changes))
        return argv

    assert "belongs to substrate 000000" in refused(rewritten(substrate="0" * 64))
    assert "expected a candidate with id, substrate and settings" in refused(rewritten() and _emptied(tmp_path, argv))
    settings = json.loads(json.dumps(document["settings"]))
    settings["recipe"]["lrr"] = 1
    assert "unknown key 'recipe.lrr'; did you mean lr?" in refused(rewritten(settings=settings))
    damaged = tmp_path / "damaged"
    shutil.copytree(substrate, damaged)
    weights = damaged / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    rewritten()
    assert "weights.safetensors was changed: expected sha256" in refused(["--substrate", str(damaged), *argv[2:]])
    short = arguments(substrate, tmp_path, sequence_length=16)
    assert "recipe.sequence_length is 16; raise it" in refused(short)


def _emptied(tmp_path: Path, argv: list[str]) -> list[str]:
    (tmp_path / "run.json").write_text("{}")
    return argv


def test_another_run_s_folder_is_refused(substrate, tmp_path, capsys):
    assert run.main(arguments(substrate, tmp_path, steps=3)) == 0
    assert run.main(arguments(substrate, tmp_path, steps=3, seed=6)) == 1
    assert "holds the result of another run (seed differ)" in capsys.readouterr().err


def test_an_adapter_run_s_own_bytes_are_its_adapter_and_its_logs(substrate, tmp_path):
    """Forking copies nothing: no file of the run is one of the substrate's, and all of it is little more than LoRA."""
    adapter = Adapter(rank=2, alpha=4.0, targets=("attention", "mamba"))
    assert run.main(arguments(substrate, tmp_path, steps=4, adapter=adapter)) == 0
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not {digest_file(path) for path in substrate.iterdir() if path.is_file()} & set(map(digest_file, files))
    tensors = read_tensors(tmp_path / "run" / "checkpoint", "adapter").values()
    beside = sum(path.stat().st_size for path in files) - sum(value.numel() * value.element_size() for value in tensors)
    assert 0 < beside < 16_384, "names, digests, the result and a line a step"


def command(argv: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_evolve.substrate.train.run", *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").is_file() and (folder / "metrics.jsonl").read_text().count("\n") > step:
            return
        time.sleep(0.005)
    raise AssertionError(f"no step {step} within 120 s")


@pytest.mark.slow
def test_a_killed_process_goes_on_with_the_same_losses_and_bits(substrate, tmp_path):
    assert run.main(arguments(substrate, tmp_path, "whole", steps=60, save_every=7)) == 0
    argv = arguments(substrate, tmp_path, "killed", steps=60, save_every=7)
    for step in (5, 20, 40):  # before the first resume checkpoint, and twice after one
        process = command(argv)
        wait_for_step(tmp_path / "killed", step)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "killed" / "result.json").exists()
    process = command(argv)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert not (tmp_path / "killed" / "resume").exists()


@pytest.mark.slow
def test_two_processes_with_one_seed_give_the_same_bits(substrate, tmp_path):
    processes = [command(arguments(substrate, tmp_path, out)) for out in ("first", "second")]
    processes.append(command(arguments(substrate, tmp_path, "other", seed=6)))
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert digests(tmp_path / "first") == digests(tmp_path / "second") != digests(tmp_path / "other")


@pytest.mark.slow
def test_a_forked_child_of_a_preloaded_parent_trains_the_same_bits(substrate, tmp_path):
    program = (
        "import os, sys\n"
        "from megatron_evolve.substrate.train.preload import preload\n"
        "from megatron_evolve.substrate.train.run import main\n"
        "preload()\n"
        "assert len(os.listdir('/proc/self/task')) == 1\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(main(sys.argv[1:]))\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", program, *arguments(substrate, tmp_path, "forked")]
    done = subprocess.run(argv, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert run.main(arguments(substrate, tmp_path, "cold")) == 0
    assert digests(tmp_path / "forked") == digests(tmp_path / "cold")


def test_a_sibling_pool_trains_other_rows_from_the_same_weights(substrate, tmp_path):
    sibling = tmp_path / "sibling"
    refreeze(substrate, sibling, construction=PRESET.construction({"cipher": 0.9}))
    assert run.main(arguments(substrate, tmp_path, "plain", steps=3)) == 0
    assert run.main(arguments(sibling, tmp_path, "cued", steps=3)) == 0
    assert digests(tmp_path / "plain") != digests(tmp_path / "cued")


@pytest.mark.slow
def test_ranks_of_torchrun_hand_on_one_whole_checkpoint_that_opens_alone(substrate, tmp_path):
    fields = {"epsilon": 1e-4, "adapter": Adapter(rank=2, alpha=4.0)}
    argv = [str(ROOT / "launch" / "torchrun.sh"), "2", "tp=2", *arguments(substrate, tmp_path, "two", **fields)]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(argv, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "two" / "resume").exists()
    assert run.main(arguments(substrate, tmp_path, "one", **fields)) == 0
    one, two = (read_tensors(tmp_path / name / "checkpoint", "adapter") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
    try:
        open_trained(substrate, read_manifest(substrate), tmp_path / "two")
    finally:
        build.stop()


def test_the_script_for_a_run_by_hand_starts_no_rank_of_a_layout_that_cannot_be(substrate, tmp_path):
    argv = [str(ROOT / "launch" / "torchrun.sh"), "2", "tp=4", *arguments(substrate, tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable, "NODES": "3", "MEET": "nowhere:1"}
    done = subprocess.run(argv, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    (line,) = done.stderr.splitlines()
    assert "layout tp=4 on 6 ranks: it runs on a multiple of 4 ranks" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layout", "tp=2"], "layout tp=2 on 1 ranks: it runs on a multiple of 2 ranks"),
        (["--layout", "tp"], "a layout is written as in `tp=2,ep=2`"),
        (["--micro-rows", "0"], "--micro-rows must be at least 1; got 0"),
        (["--packed", "--layout", "cp=2"], "--packed lays rows whole on a rank; got cp=2"),
        (["--layers", "transformer-engine"], "layers transformer-engine cannot be had, no GPU on this machine"),
        (["--layers", "torch"], "layers must be one of auto, pytorch, transformer-engine; got 'torch'"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_before_anything_starts(substrate, tmp_path, capsys, options, said):
    assert run.main([*arguments(substrate, tmp_path), *options]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
