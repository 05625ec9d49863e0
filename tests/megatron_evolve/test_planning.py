"""`megatron-evolve substrate plan`: the JSON that scripts rely on, the table, and one sentence for bad input."""

import json

import pytest
from typer.testing import CliRunner

from megatron_evolve.cli import app

NANO = ("--preset", "nemotron3-nano", "--gpus", "8", "--seq", "4096")


def plan(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["substrate", "plan", *words])
    return done.exit_code, done.stdout + done.stderr


def test_json_holds_the_contract() -> None:
    code, out = plan(*NANO, "--mode", "lora", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["preset"] == "nemotron3-nano"
    assert (found["parameters_total"], found["parameters_active"]) == (31_577_937_344, 3_580_073_408)
    assert found["flops_per_token"]["train"] > found["flops_per_token"]["forward"] > 6e9
    keys = {"tp", "pp", "ep", "etp", "cp", "dp", "gpus", "memory_gb", "fits", "reason"}
    assert all(keys <= set(row) for row in found["layouts"])
    first, last = found["layouts"][0], found["layouts"][-1]
    assert first["fits"] and first["reason"] is None and first["dp"] * first["tp"] * first["pp"] * first["cp"] == 8
    assert first["memory_gb"] == pytest.approx(sum(first["memory"].values()), abs=0.02)
    assert not last["fits"] and last["reason"]


def test_table_names_the_best_layouts_and_the_reasons() -> None:
    code, out = plan(*NANO, "--mode", "sft")
    assert code == 0
    assert "31.58 B parameters, 3.58 B active" in out
    assert "tp=4,ep=8" in out and "do not run in 80 GB" in out and "use more GPUs" in out.replace("\n", " ")


def test_one_layout_alone() -> None:
    code, out = plan(*NANO, "--layout", "tp=2,ep=8", "--json")
    (row,) = json.loads(out)["layouts"]
    assert code == 0 and row["fits"] and (row["tp"], row["ep"], row["dp"]) == (2, 8, 4)
    code, out = plan(*NANO, "--layout", "ep=16", "--json")
    (row,) = json.loads(out)["layouts"]
    assert code == 1, "nothing fits"
    assert row["dp"] is row["memory_gb"] is None and "runs on a multiple of 16 ranks" in row["reason"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--preset", "nemotron-nano"), "no architecture 'nemotron-nano'; did you mean nemotron3-nano"),
        (("--gpus", "0"), "at least 1 GPU; got 0"),
        (("--gpus", "0", "--layout", "tp=2"), "at least 1 GPU; got 0"),
        (("--seq", "0"), "sequence_length: input should be greater than or equal to 1, got 0"),
        (("--seq", "262145"), "at most 262144 tokens, got 262145"),
        (("--gpu-memory", "80"), "is written as in `80GB`; got '80'"),
        (("--mode", "full"), "mode: input should be 'sft' or 'lora', got 'full'"),
        (("--recompute", "all"), "recompute: input should be 'none', 'selective' or 'full'"),
        (("--micro-batch", "0"), "micro_batch: input should be greater than or equal to 1"),
        (("--layout", "tp:2"), "a layout is written as in `tp=2,ep=2`"),
    ],
)
def test_bad_input_is_one_sentence(change: tuple[str, ...], said: str) -> None:
    code, out = plan(*NANO, *change)
    assert code == 1
    assert said in out and "Traceback" not in out and len(out.strip().splitlines()) == 1
    code, out = plan(*NANO, *change, "--json")
    assert code == 1 and said in json.loads(out)["error"]
