"""The picture of the benchmark: bars as long as their times, and nothing drawn that has none."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_evolve.cli import app
from megatron_evolve.kernels.bench import plot

SHAPE = {"model": "nano", "tokens": 8192, "ep": 8, "rank": 0, "mode": "frozen", "max_vio": 0.0}


def row(provider: str, direction: str, ms: float | None, **shape) -> dict:
    return {"op": "experts", "provider": provider, "pass": direction, "median_ms": ms, "shape": SHAPE | shape}


ROWS = [
    row("triton", "forward", 2.0),
    row("triton", "backward", 1.0),
    row("triton", "both", 3.0),
    row("unfused", "forward", 4.0),
    row("unfused", "backward", 2.0),
    row("eager", "forward", None),
    row("triton", "forward", 1.0, mode="lora", rank=32, max_vio=5.0),
    {"op": "permute", "provider": "triton", "pass": "forward", "median_ms": 0.1, "shape": {}},
]


def test_bars_are_as_long_as_their_times():
    text = plot.svg(ROWS, "a < b")
    root = ElementTree.fromstring(text)
    widths = {
        title.text.split(":")[0]: float(rect.get("width"))
        for rect in root.iter("{http://www.w3.org/2000/svg}rect")
        for title in rect
    }
    assert widths["unfused, forward"] == pytest.approx(2 * widths["triton, forward"], abs=0.2)
    assert widths["unfused, forward"] + widths["unfused, backward"] == pytest.approx(plot.WIDTH, abs=0.2)
    assert "eager" not in text and "a &lt; b" in text and "3.00 ms" in text


def test_a_layer_without_both_times_is_left_out():
    assert [group.title for group in plot.groups(ROWS) if group.bars] == ["nano 8,192 EP8, frozen"]
    assert plot.title_of(ROWS[6]["shape"]) == "nano 8,192 EP8, adapters r32, MaxVio 5"


def test_nothing_to_draw_is_said():
    with pytest.raises(ValueError, match="a picture needs rows of op experts with forward and backward times"):
        plot.svg(ROWS[-1:], "none")


def test_a_legend_of_many_providers_takes_more_lines():
    rows = [row(name, part, 1.0) for name in plot.COLOURS for part in plot.PASSES]
    root = ElementTree.fromstring(plot.svg(rows, "many"))
    rects = list(root.iter("{http://www.w3.org/2000/svg}rect"))
    marks = [float(rect.get("y")) for rect in rects if rect.get("height") == "11"]
    bars = [float(rect.get("y")) for rect in rects if len(rect)]
    assert len(set(marks)) == len(plot.COLOURS) // 2 and max(marks) + 11 < min(bars)
    assert len({rect.get("fill") for rect in rects if len(rect)}) == 2 * len(plot.COLOURS)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[1]\n", "line 1: expected a JSON object, got [1]"),
        (b"{}\n\nnone\n", "line 3: expected a JSON object, got none"),
        (b"[" * 100_000, "line 1: expected a JSON object"),
        (b"9" * 6_000, "line 1: expected a JSON object"),
        (b"\xff\xfe", "expected UTF-8 text, got other bytes"),
        (None, "cannot be read (No such file or directory)"),
        (b'{"op": "experts", "median_ms": 1}', "row 1: expected a layer's pass"),
        (b'{"op": "experts", "median_ms": "x", "pass": "forward", "provider": "p", "shape": 1}', "row 1: expected"),
        (b"", "a picture needs rows"),
    ],
)
def test_a_file_that_no_bench_wrote_is_refused(content: bytes | None, said: str, tmp_path: Path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "rows.svg"
    if content is not None:
        rows.write_bytes(content)
    done = CliRunner().invoke(app, ["bench", "plot", str(rows), "--out", str(out)])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert said in done.stderr and len(done.stderr.splitlines()) == 1 and not out.exists()
