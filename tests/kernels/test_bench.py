"""The benchmark is right before it is quick: exact skew, an oracle of its own, no time for what is wrong."""

import json
import math
import time

import pytest
import torch
from typer.testing import CliRunner

from megatron_evolve.cli import app
from megatron_evolve.kernels import reference
from megatron_evolve.kernels.bench import problem as problems
from megatron_evolve.kernels.bench.cases import CPU_CASES, GPU_CASES, Case, case_of, experts, memory_bound
from megatron_evolve.kernels.bench.clock import Clock, interleaved, spread
from megatron_evolve.kernels.bench.providers import PEERS, PROVIDERS
from megatron_evolve.kernels.bench.rows import measure
from megatron_evolve.kernels.bench.run import bench, model, model_others
from megatron_evolve.kernels.roofline import CHIPS, Shape
from tests.kernels.expert_cases import DEVICE

KEYS = {"op", "pass", "provider", "version", "shape", "median_ms", "error", "ratio_to", "device", "commit"}
COLUMNS = KEYS | {"spread_ms", "errors", "flops", "bytes", "tflops", "gb_per_s", "predicted_ms", "percent_of_ceiling"}
COLUMNS |= {"saved_bytes", "syncs", "bitwise_repeat", "clock"}
TINY = Shape("tiny", 24, 5, 2, 16, 24)
ADAPTED = TINY._replace(rank=4)


def tiny(mode: str, dtype: str = "float32", max_vio: float = 0.0) -> Case:
    return Case(ADAPTED if mode == "lora" else TINY, mode, max_vio, dtype)


@pytest.mark.parametrize(
    ("tokens", "num_experts", "chosen", "asked", "got"),
    [(64, 16, 4, 0, 0), (64, 16, 4, 1.0, 1.0), (8192, 128, 6, 1.3, 1.3), (8192, 128, 6, 12, 12), (64, 16, 6, 5, 1.667)],
)
def test_experts_get_the_skew_that_is_asked_for(tokens, num_experts, chosen, asked, got):
    idx_TK = problems.choices(tokens, num_experts, chosen, asked)
    assert all(len(set(row)) == chosen for row in idx_TK[:64].tolist())
    assert problems.skew_of(reference.route_plan(idx_TK, num_experts)) == pytest.approx(got, abs=0.01)


@pytest.mark.parametrize("mode", ["frozen", "full", "lora"])
def test_the_oracle_is_the_definition(mode):
    v = problems.experts(TINY if mode != "lora" else ADAPTED, mode, 1.0, torch.float64, "cpu")
    rows, p_M = reference.permute(v.x_TH, v.p_TK, v.plan)
    out = reference.unpermute(
        reference.grouped_experts(rows, v.plan.counts_E, p_M, v.W1_EFH, v.W2_EHF, *v.loras), v.plan
    )
    grads = torch.autograd.grad(out, list(v.leaves().values()), v.dout_TH)
    want = problems.oracle(v)
    assert set(want) == {"out", *(f"d{name}" for name in v.leaves())}
    assert problems.error(out, want["out"]) < 1e-12
    for name, grad in zip(v.leaves(), grads, strict=True):
        assert problems.error(grad, want[f"d{name}"]) < 1e-7, name


@pytest.mark.parametrize("mode", ["frozen", "full", "lora"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "triton" else n for n in PROVIDERS if n not in PEERS]
)
def test_every_provider_computes_the_layer(name, mode):
    dtype = "bfloat16" if name == "unfused" else "float32"
    case = Case(Shape("tiny", 24, 5, 2, 16, 24, 8 if mode == "lora" else 0), mode, 1.0, dtype)
    problem, prepare = experts(case, DEVICE, (name,))
    rows = measure(problem, prepare, DEVICE, rounds=1, warm=0)
    assert [row["pass"] for row in rows] == ["forward", "backward", "both"], rows
    assert all(row["median_ms"] >= 0 and row["bitwise_repeat"] and "reason" not in row for row in rows)
    assert set(rows[0]["errors"]) == {"out", *(f"d{name}" for name in problem.leaves)}


def test_a_wrong_provider_gets_no_time():
    """Wrong in its output, wrong in one gradient alone, and one that cannot run: each with its reason."""
    problem, prepare = experts(tiny("frozen"), "cpu", ("eager",))
    right = prepare["eager"][1]()

    class Skewed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            return out.view_as(out)

        @staticmethod
        def backward(ctx, dout):
            return dout * 1.001

    def refuses():
        raise ValueError("needs a wheel")

    def stumbles():
        raise KeyError("sm_75")  # other people's code may raise anything

    prepare |= {
        "output": ("0", lambda: lambda: right() * 1.001),
        "gradient": ("0", lambda: lambda: Skewed.apply(right())),
        "nan": ("0", lambda: lambda: right() * float("nan")),
        "refuses": ("0", refuses),
        "stumbles": ("0", stumbles),
    }
    rows = measure(problem, prepare, "cpu", rounds=1, warm=0)
    by_name = {row["provider"]: row for row in rows}
    assert by_name["eager"]["median_ms"] is not None
    for name, kind, reason in (
        ("output", "wrong", "wrong: "),
        ("gradient", "wrong", "wrong: d"),
        ("nan", "wrong", "wrong: "),
        ("refuses", "refused", "ValueError: needs"),
        ("stumbles", "failed", "KeyError: 'sm_75'"),
    ):
        assert by_name[name]["median_ms"] is None and by_name[name]["kind"] == kind
        assert by_name[name]["reason"].startswith(reason), by_name[name]
        assert sum(row["provider"] == name for row in rows) == 1
    assert by_name["gradient"]["error"] == pytest.approx(1e-3, rel=0.01)
    assert set(by_name["eager"]["ratio_to"]) == set()


def test_an_error_is_of_the_whole_tensor_however_it_is_cut(monkeypatch):
    """By slices to spare memory: rows of a matrix, matrices of a stack, and a number that is none stays none."""
    monkeypatch.setattr(problems, "SLICE", 3)
    for shape in ((), (0, 4), (7,), (7, 5), (3, 7, 5)):
        got, want = torch.randn(shape), torch.randn(shape, dtype=torch.float64)
        whole = ((got - want).norm() / want.norm()).item() if want.numel() else 0.0
        assert problems.error(got, want) == pytest.approx(whole)
    got[2, 6, 4] = float("nan")
    assert math.isnan(problems.error(got, want)) and math.isnan(problems.error(got[2], want[2]))


def test_saved_bytes_are_what_autograd_keeps():
    problem, prepare = experts(tiny("frozen"), DEVICE, ("triton",))
    (row, *_) = measure(problem, prepare, DEVICE, rounds=1, warm=0)
    assert row["saved_bytes"] == TINY.rows * TINY.hidden * 4  # h alone, in float32


def test_ratios_are_of_medians_in_turn(monkeypatch):
    clock = Clock("cpu")
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "process_time", lambda: float(next(ticks)))
    order = []
    runs = {name: (lambda name=name: order.append(name) or torch.zeros(1), None) for name in "ab"}
    times = interleaved(runs, clock, (), rounds=3, warm=1)
    assert order == list("abababab")
    assert times["a"]["forward"] == spread([1000.0])
    assert spread([1.0, 2.0, 3.0, 4.0, 100.0]).median == 3.0


def test_fresh_numbers_for_every_run():
    x = torch.zeros(4)
    seen = []
    interleaved({"a": (lambda: seen.append(x.clone()) or x, None)}, Clock("cpu"), (x,), rounds=2, warm=0)
    assert not torch.equal(*seen)


def test_moves_of_memory_on_a_cpu():
    rows = [
        row
        for problem, prepare in memory_bound("cpu", 8, triton=False)
        for row in measure(problem, prepare, "cpu", rounds=1, warm=0)
    ]
    assert {row["op"] for row in rows} == {"route_plan", "permute", "unpermute"}
    assert all(row["median_ms"] is not None for row in rows), rows


def test_predicted_rows_tell_that_they_are():
    rows = list(model([case_of("nano", 8192, 8, "lora32")], "h100"))
    assert len(rows) == 6
    assert all(row["predicted"] and row["median_ms"] is None and row["predicted_ms"] > 0 for row in rows)
    others = {(row["op"], row["pass"]): row for row in model_others("h100", tokens=8192)}
    assert {op for op, _ in others} >= {problem.op for problem, _ in memory_bound("cpu", 8, triton=False)}
    assert others["router", "forward"]["predicted_ms"] == pytest.approx(0.0131, rel=0.02)
    assert others["linear_cross_entropy", "forward"]["predicted_ms"] == pytest.approx(2 * 7.2, rel=0.01)  # and dx
    assert all(row["predicted"] and row["median_ms"] is None for row in others.values())
    with pytest.raises(ValueError, match="one of h100, h200; got 'a100'"):
        list(model([], "a100"))
    with pytest.raises(ValueError, match="frozen, full, lora8 or lora32; got 'qlora'"):
        case_of("nano", 1, 1, "qlora")
    with pytest.raises(ValueError, match="got cuda: name some"):
        list(bench([], "cpu", ("cuda",)))


def test_the_default_list_of_a_gpu_covers_every_axis():
    shapes = [case.shape for case in GPU_CASES]
    assert {(s.model, s.ep) for s in shapes} == {(model, ep) for model in ("nano", "super", "ultra") for ep in (1, 8)}
    assert {128, 2048, 8192, 32768} <= {s.tokens for s in shapes}
    assert {case.max_vio for case in GPU_CASES} == {0, 1.3, 5, 12}
    assert {(case.mode, case.shape.rank) for case in GPU_CASES} == {
        ("frozen", 0),
        ("full", 0),
        ("lora", 8),
        ("lora", 32),
    }


def test_a_row_has_every_column():
    """In bfloat16, where bytes and operations are counted, with the ceilings of a chip."""
    rows = list(bench([tiny("frozen", "bfloat16")], "cpu", ("eager", "loop"), rounds=2, chip=CHIPS["h100"]))
    for row in rows:
        assert set(row) >= COLUMNS, row["provider"]
        assert row["tflops"] == pytest.approx(row["flops"] / row["median_ms"] * 1e-9)
        assert 0 < row["percent_of_ceiling"] < 100 and row["spread_ms"][0] <= row["median_ms"] <= row["spread_ms"][1]
        assert row["syncs"] is None and row["bitwise_repeat"] is True and row["device"] == "CPU"
        assert set(row["ratio_to"]) == {"eager", "loop"} - {row["provider"]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU gets the long list of cases")
def test_the_command_prints_a_row_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_evolve.kernels.bench.cases.CPU_CASES", (tiny("full"), tiny("lora", max_vio=1.0)))
    file = tmp_path / "rows.jsonl"
    done = CliRunner().invoke(app, ["bench", "kernels", "--rounds", "1", "--out", str(file)])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert file.read_text() == done.stdout
    assert all(set(row) >= KEYS for row in rows)
    assert all(row["median_ms"] is not None or row["reason"] for row in rows)
    assert {row["provider"] for row in rows if row["median_ms"] is None} == set(PEERS)
    refused = CliRunner().invoke(app, ["bench", "kernels", "--size", "nano"])
    assert refused.exit_code == 1 and "need a GPU to be measured" in refused.output


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--ep", "0", "--ep"),
        ("--ep", "3", "the ranks must divide the 128 experts"),
        ("--tokens", "0", "--tokens"),
        ("--tokens", "-5", "--tokens"),
        ("--max-vio", "-1", "from 0 to 20.3"),
        ("--max-vio", "1e9", "from 0 to 20.3"),
        ("--max-vio", "nan", "from 0 to 20.3"),
    ],
)
def test_options_out_of_range_are_refused(option, value, said):
    done = CliRunner().invoke(app, ["bench", "kernels", "--model", "--size", "nano", option, value])
    assert isinstance(done.exception, SystemExit) and done.exit_code != 0 and not done.stdout
    assert said in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tokens", "64", "--max-vio", "2"], "expected a --size with --tokens and --max-vio"),
        (["--model", "--ep", "8"], "expected a --size with --ep"),
        (["--model", "--provider", "triton"], "expected no --provider with --model"),
        (["--chip", "h200"], "expected --model with --chip"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, said):
    done = CliRunner().invoke(app, ["bench", "kernels", *options])
    assert done.exit_code == 1 and not done.stdout
    assert said in " ".join(done.stderr.split())


def test_eager_is_measured_against_a_loop_of_64_experts():
    assert all(case.shape.experts == 64 for case in CPU_CASES)
    assert {case.shape.rank for case in CPU_CASES} == {0, 8}
