"""One run, one judge in three forms: every engine gives the same answers item by item, and no two scores compare.

The server is transformers' own `transformers serve`, started by the scoring job as any other would be.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_evolve.eval.freeze import engine_of
from megatron_evolve.eval.judge import freeze_judge, load_judge
from megatron_evolve.eval.score import ItemRows, read_rows
from megatron_evolve.eval.suite import GeneratedSuite
from tests.megatron_evolve.tiny import environment

pytestmark = pytest.mark.slow

FAMILIES = ("numeral", "gravity", "unit_conversion", "cipher", "bit_manipulation", "equation")
SERVE = ("{python}", "-m", "transformers.cli.transformers", "serve", "{model}", "--host", "127.0.0.1")
ENGINES: dict[str, dict[str, Any]] = {
    "megatron": {"max_new_tokens": 20, "batch_size": 256},
    "transformers": {"kind": "transformers", "max_new_tokens": 20, "batch_size": 16},
    "openai": {
        "kind": "openai",
        "max_new_tokens": 20,
        "concurrency": 4,
        "model": "{model}",  # `transformers serve` names a model by its folder
        "server": {
            "kind": "command",
            "argv": (*SERVE, "--port", "{port}", "--device", "cpu"),
            "packages": ("transformers", "torch"),
        },
    },
}


@pytest.fixture(scope="module")
def substrate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "substrate"
    source = "from pathlib import Path\nfrom tests.megatron_evolve.tiny import build_tiny\n"
    # In a process of its own, as the trainer is.
    subprocess.run(
        [sys.executable, "-c", f"{source}build_tiny(Path({str(folder)!r}))"],
        env=environment(),
        check=True,
        capture_output=True,
    )
    return folder


def score(substrate: Path, root: Path, name: str) -> tuple[dict[str, Any], ItemRows]:
    """`scores.json` and the rows of the substrate's own model, by a judge with this engine."""
    shares = {family: {"weight": 1} for family in FAMILIES}
    suite = GeneratedSuite(difficulty="nano", families=shares, items_per_family={"dev-a": 2, "dev-b": 5}, seed=3)
    engine = engine_of({**ENGINES[name], "version": "0.1.0"})
    freeze_judge(root / name / "judge", dev=suite, external=None, engine=engine, secret="a secret of the tests")
    argv = [sys.executable, "-m", "megatron_evolve.eval.run", "--judge", str(root / name / "judge")]
    argv += ["--substrate", str(substrate), "--run", str(substrate), "--round", "1"]
    argv += ["--splits", "dev-a,dev-b", "--out", str(root / name / "out")]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((root / name / "out" / "scores.json").read_text()), read_rows(root / name / "out/scores.parquet")


def test_three_engines_answer_alike_and_never_compare(substrate: Path, tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="the endpoint's client is the [llm] extra")
    for package in ("fastapi", "uvicorn", "accelerate"):
        pytest.importorskip(package, reason="`transformers serve` needs transformers[serving]")
    scored = {name: score(substrate, tmp_path, name) for name in ENGINES}
    ours = scored["megatron"][1]
    assert len(ours) == 42
    assert len(set(ours.prediction.tolist())) > 5
    for name, (record, rows) in scored.items():
        assert record["engine"]["kind"] == name
        for column in ("item_id", "prediction", "num_tokens", "truncated", "boxed", "correct"):
            assert getattr(rows, column).tolist() == getattr(ours, column).tolist(), (name, column)
    keys = {record["splits"]["dev-b"]["comparison_key"] for record, _ in scored.values()}
    assert len(keys) == 3
    about = scored["openai"][0]["engine"]["about"]
    assert about == {"server": "uvicorn", "owned_by": "local"}
    # The exported weights go when they are no longer needed, the server's log stays.
    left = sorted(path.name for path in (tmp_path / "openai" / "out").iterdir())
    assert left == ["scores.json", "scores.parquet", "server.log"]
    frozen = load_judge(tmp_path / "openai" / "judge").engine
    assert frozen.packages.keys() == {"transformers", "torch"}
