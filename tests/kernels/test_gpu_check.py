"""The check of a GPU, as far as a CPU can check it: the sentence without one, and every check under the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_evolve.kernels import gpu_check
from megatron_evolve.kernels.bench import checks, run, shares, targets
from megatron_evolve.kernels.bench.cases import Case, experts
from megatron_evolve.kernels.roofline import CHIPS, Shape, shape_of
from megatron_evolve.kernels.tile_table import Tiles, chosen, entries, shape_key
from tests.kernels.expert_cases import DEVICE

ROOT = Path(__file__).resolve().parents[2]
SIZES = checks.Sizes(40, 56, vocabulary=96, tokens=5, rows_per_expert=(4,), graph_rows=4, dtypes=("float32",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "kernels" / "gpu_check.py"), "--out", str(tmp_path / "rows.jsonl")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == ("gpu_check: needs a CUDA device, and torch finds none: run it on a machine with one")
    assert not (tmp_path / "rows.jsonl").exists()


def test_what_it_imports_needs_torch_and_triton_alone(tmp_path):
    """From a bare checkout: everything else of this environment is blocked."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
for name in ("megatron", "numpy", "pydantic", "typer", "scipy", "transformers", "einops"):
    sys.modules[name] = None
import megatron_evolve.kernels.bench.checks, megatron_evolve.kernels.bench.targets
print(megatron_evolve.__file__)
"""
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "megatron_evolve" / "__init__.py")


@pytest.mark.slow
def test_every_check_passes_on_tiny_shapes():
    rows = [*checks.check_experts(DEVICE, SIZES), *checks.check_loss(DEVICE, SIZES)]
    assert len(rows) == 10  # a tile, four edges (three of them trained too), the loss of a frozen and a trained head
    assert all(row["ok"] for row in rows), [row for row in rows if not row["ok"]]
    assert all(row["bitwise_repeat"] for row in rows)


def test_every_tile_of_nano_is_asked_and_the_graph_has_a_fetched_one():
    sizes = checks.Sizes()
    asked = {chosen(sizes.hidden, sizes.width, 8 * rows, 8) for rows in sizes.rows()}
    assert asked == {entry.tiles for entry in entries() if entry.shape == shape_key(sizes.hidden, sizes.width)}
    assert chosen(sizes.hidden, sizes.width, 8 * sizes.graph_rows, 8).fc1.fetched
    others = {entry.tiles for entry in entries() if entry.shape is None}
    assert {chosen(48, 32, 8 * rows, 8) for rows in sizes._replace(width=32, hidden=48).rows()} == others


def test_what_megatrons_layers_call_is_checked():
    rows = list(checks.check_doors(DEVICE, SIZES))
    assert [row["check"].rpartition(", ")[2] for row in rows] == [
        "clamped",
        "into main gradients",
        "router from logits",
    ]
    assert all(row["ok"] and row["bitwise_repeat"] for row in rows), rows


def test_a_benchmark_that_finds_us_wrong_is_a_status():
    ours = {"op": "experts", "provider": "triton", "median_ms": None}
    assert not gpu_check.is_right(ours | {"kind": "wrong"}) and not gpu_check.is_right(ours | {"kind": "failed"})
    assert not gpu_check.is_right({"check": "experts", "ok": False})
    assert gpu_check.is_right(ours | {"median_ms": 1.0}) and gpu_check.is_right({"target": "waits", "met": False})
    assert gpu_check.is_right(ours | {"provider": "liger", "kind": "failed"})
    assert not gpu_check.is_right(ours | {"kind": "refused"})  # this check asks nothing that ours may refuse


@pytest.mark.slow
def test_ops_that_move_memory_are_checked():
    tiny = SIZES._replace(tokens=3)
    rows = list(checks.check_memory_bound(DEVICE, tiny))
    assert [row["check"] for row in rows] == ["route_plan", "permute", "unpermute", "router", "gated_norm"]
    assert all(row["ok"] for row in rows), [row for row in rows if not row["ok"]]


def test_every_op_is_captured_in_a_graph():
    found = dict(checks.graph_problems(DEVICE, SIZES._replace(tokens=3)))
    assert list(found) == ["experts, full", "experts, lora", *checks.MOVING, "linear_cross_entropy"]
    for name, make in found.items():
        assert make()[0].op == name.partition(",")[0]


def illegal(*_, **__):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
    yield  # as a generator does, at its first row


def test_what_cannot_be_made_fails_its_own_check_and_no_other(monkeypatch):
    """A kernel is launched to make a problem, too; a graph that fails is a row, and the next one is asked."""
    monkeypatch.setattr(checks, "memory_bound", illegal)
    monkeypatch.setattr(checks, "replayed", lambda problem, run: {})
    rows = [*checks.check_memory_bound(DEVICE, SIZES), *checks.check_graph(DEVICE, SIZES._replace(tokens=3))]
    graphs = [f"{name} in a CUDA graph" for name in ("experts, full", "experts, lora", *checks.MOVING)]
    assert [row["check"] for row in rows] == [*checks.MOVING, *graphs, "linear_cross_entropy in a CUDA graph"]
    assert [row["check"] for row in rows if row["ok"]] == [*graphs[:2], "linear_cross_entropy in a CUDA graph"]
    assert "in illegal" in rows[0]["traceback"] and rows[0]["reason"].startswith("RuntimeError: CUDA error")


def test_bfloat16_is_held_to_plain_pytorch():
    problem, prepare = experts(Case(Shape("check", 24, 5, 2, 16, 24), "frozen", 0.0, "bfloat16"), "cpu", ("eager",))
    plain = prepare["eager"][1]()
    assert "reason" not in checks.beyond(plain, problem, "cpu", plain)
    found = checks.beyond(lambda: plain() * 1.015, problem, "cpu", plain)
    assert found["reason"].startswith("out is off by 0.01")


def test_a_check_that_cannot_run_fails_with_its_reason():
    def broken() -> dict:
        raise RuntimeError("out of memory\nand more")

    row = checks.judged("experts", "float32", broken)
    assert (row["ok"], row["reason"]) == (False, "RuntimeError: out of memory")
    assert "in broken" in row["traceback"] and row["traceback"].endswith("and more\n")


@pytest.mark.parametrize(
    "failure", [AssertionError("strides"), TypeError("no size"), KeyError("sm_75"), OSError("gcc")]
)
def test_whatever_is_raised_is_told(failure):
    def broken() -> dict:
        raise failure

    assert checks.judged("experts", "float32", broken)["reason"].startswith(type(failure).__name__)


def rows_of(ratio: float, share: float) -> list[dict]:
    """Rows as the benchmark writes them, for the layer at 8,192 tokens on one of eight ranks."""
    shape = shape_of("nano", 8192, 8)._asdict() | {"mode": "full"}
    base = {"op": "experts", "pass": "both", "shape": shape, "median_ms": 1.0}
    own = {"provider": "triton", "ratio_to": {"unfused": ratio}, "saved_bytes": 100 * share, "syncs": 0}
    other = {"provider": "unfused", "ratio_to": {"triton": 1 / ratio}, "saved_bytes": 100, "syncs": 3}
    return [base | own | {"bitwise_repeat": True, "tflops": 500.0}, base | other | {"bitwise_repeat": False}]


def test_targets_are_judged_by_the_worst_row_that_concerns_them():
    by_name = {row["target"]: row for row in targets.judged([*rows_of(1.3, 0.29), *rows_of(0.9, 0.2)])}
    at = by_name["times the unfused path at 3,072 rows an expert"]
    assert (at["measured"], at["wanted"], at["first_wanted"], at["met"]) == (0.9, 1.03, 1.15, False)
    assert by_name["times the unfused path at 768 rows an expert"]["met"] is None
    assert by_name["waits of the host"]["met"] is True  # the other path's waits are its own
    assert by_name["runs that gave other bits"]["met"] is True
    assert by_name["share of the unfused path's saved activations"]["met"] is True
    assert all(json.dumps(row) for row in by_name.values())


@pytest.mark.slow
def test_a_row_of_the_check_from_end_to_end(monkeypatch):
    """As on a GPU, at a width that the interpreter finishes: ours beside the unfused path, in bfloat16."""

    def breaks(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(targets, "LAYERS", (Case(Shape("nano", 8, 3, 2, 16, 24, ep=8), "full"),))
    monkeypatch.setattr(targets, "MORE", ())
    monkeypatch.setattr(targets, "installed", lambda: ())
    monkeypatch.setattr(targets, "bench_memory_bound", breaks)
    monkeypatch.setattr(targets, "ceilings", lambda _: CHIPS["h100"])
    begun = []
    ceiling, *rows, left_out = targets.rows(DEVICE, until=float("inf"), rounds=1, begun=begun.append)
    assert ceiling["tflops"] == CHIPS["h100"].tflops and begun == [0, 1, 2, 3]
    assert left_out["reason"] == "RuntimeError: out of memory" and not gpu_check.is_right(left_out)
    assert all(set(row["tiles"]) == set(Tiles._fields) for row in rows if row["provider"] == "triton")
    assert [(row["provider"], row["pass"]) for row in rows] == [
        (name, part) for name in ("triton", "unfused") for part in ("forward", "backward", "both")
    ]
    for row in rows:
        assert row["median_ms"] > 0 and row["flops"] > 0 and 0 < row["percent_of_ceiling"] < 100, row
        assert row["predicted_ms"] == pytest.approx(row["percent_of_ceiling"] / 100 * row["median_ms"])
    by_name = {row["target"]: row for row in targets.judged([left_out, *rows])}
    share = by_name["share of the unfused path's saved activations"]["measured"]
    # h, of rows, h and a, and here of 20 bytes a row for its probability and its place
    assert share == pytest.approx(2 * 24 / (2 * 16 + 4 * 24 + 20), rel=0.02)


def test_rows_beyond_the_time_are_named():
    rows = list(targets.rows("cpu", until=0.0))
    others = 3 + len(run.installed())  # the ceilings, what moves memory, Liger, other people's packages
    assert len(rows) == len(targets.LAYERS) + len(targets.MORE) + others
    told = [row["left_out"].partition(",")[0] for row in rows]
    assert told[: 1 + len(targets.LAYERS)] == ["ceilings", *["nano"] * len(targets.LAYERS)]
    assert all(row["median_ms"] is None and row["left_out"] and gpu_check.is_right(row) for row in rows)
    assert all(target["met"] is None for target in targets.judged(rows))


def few_steps(monkeypatch, **rows):
    """Steps that yield those rows, or raise what stands in their place."""

    def one(value):
        def step(chip):
            if isinstance(value, Exception):
                raise value
            yield value | {"chip": chip}

        return step

    monkeypatch.setattr(
        targets,
        "steps",
        lambda *_: [targets.Step(name, one(value), ours=name != "liger") for name, value in rows.items()],
    )


CEILING = {"ceiling": "measured", "tflops": 700.0, "tb_per_s": 3.0}


def test_a_step_that_fails_costs_the_others_nothing(monkeypatch):
    few_steps(monkeypatch, ceilings=RuntimeError("offset increment"), layer={"ok": True}, liger=TypeError("no fit"))
    ceilings, layer, liger = targets.rows("cpu", until=float("inf"))
    assert ceilings["left_out"] == "ceilings" and not gpu_check.is_right(ceilings)
    assert layer == {"ok": True, "chip": None}
    assert liger["reason"] == "TypeError: no fit" and gpu_check.is_right(liger)  # another's


def test_a_process_that_goes_on_measures_the_ceilings_anew_unless_they_ended_the_other(monkeypatch):
    few_steps(monkeypatch, ceilings=CEILING, first={"row": 1}, second={"row": 2})
    begun = []
    ceiling, row = targets.rows("cpu", until=float("inf"), after=1, begun=begun.append)
    assert ceiling["tflops"] == 700.0 and (row["row"], row["chip"].tflops) == (2, 700.0) and begun == [2]
    assert [row["row"] for row in targets.rows("cpu", until=float("inf"), after=0)] == [1, 2]


FAKE = """
import os, sys, time
share, after = sys.argv[sys.argv.index("--share") + 1], int(sys.argv[-1]) if "--after" in sys.argv else -1
if "--benchmark" not in sys.argv:
    print('{"check": "%s", "ok": true}' % share, flush=True)
    time.sleep(600 if share[0] == "0" else 0)
else:
    for number in range(after + 1, 3):
        print('{"step": %d}' % number, flush=True)
        if number == 1:
            os.abort()
        print('{"row": %d}' % number, flush=True)
"""


def test_checks_that_hang_and_a_benchmark_that_dies_leave_the_rest(monkeypatch, tmp_path):
    """The whole command with processes of another's making in place of its own."""
    fake, out = tmp_path / "fake.py", tmp_path / "rows.jsonl"
    fake.write_text(FAKE)
    few_steps(monkeypatch, ceilings=CEILING, layer={}, more={})
    monkeypatch.setattr(gpu_check, "__file__", str(fake))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("megatron_evolve.kernels.bench.rows.device_name", lambda _: "none")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(gpu_check, "CHECKS", 0.04)
    monkeypatch.setattr(shares, "num_shares", lambda: 2)
    assert gpu_check.main(["--out", str(out), "--seconds", "40"]) == 1
    machine, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert machine["shares"] == 2 and sorted(row["check"] for row in rows[:2]) == ["0/2", "1/2"]
    assert rows[2]["failed"] == "share 0/2" and rows[3]["all_right"] is False and rows[3]["checks_s"] < 10
    first, died, third = rows[4:7]
    assert (first, third) == ({"row": 0}, {"row": 2})
    assert (died["left_out"], died["step"], died["ok"]) == ("layer", 1, False)
    assert rows[7]["target"] and "seconds" in rows[-1]
