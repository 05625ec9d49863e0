"""One run, one judge in three forms: every engine gives the same answers item by item, and no two scores compare.

The server is transformers' own `transformers serve`, started by the scoring job as any other would be.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_evolve.artefacts import save_json
from megatron_evolve.candidate import candidate
from megatron_evolve.eval.freeze import engine_of
from megatron_evolve.eval.judge import freeze_judge, load_judge
from megatron_evolve.eval.score import ItemRows, read_rows
from megatron_evolve.eval.suite import GeneratedSuite
from megatron_evolve.launch.rundir import ATTEMPT_VARIABLE, read_progress
from megatron_evolve.substrate.chat import puzzle_prompt
from megatron_evolve.substrate.checkpoint_tokenizer import read_tokenizer
from megatron_evolve.substrate.digest import digest_file
from megatron_evolve.substrate.exchange import import_hf
from megatron_evolve.substrate.manifest import read_manifest
from megatron_evolve.substrate.model.architecture import NANO_CPU
from megatron_evolve.substrate.model.huggingface import huggingface_config
from megatron_evolve.substrate.puzzles.row import CHALLENGE_SUFFIX, question_text
from megatron_evolve.substrate.recipe import Adapter, Recipe
from tests.eval.engines import fake_endpoint
from tests.eval.engines.fake_endpoint import FakeEndpoint
from tests.megatron_evolve.tiny import environment
from tests.substrate.chat_tokenizer import VOCAB_SIZE, write_chat_tokenizer

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


@dataclass(frozen=True)
class Trained:
    """A tiny substrate, and a run that trained an adapter on every kind of layer from it."""

    substrate: Path
    run: Path


def command(*words: object, status: int = 0, **env: str) -> str:
    """Runs a module or a program and returns its error output, which a failing assertion shows."""
    argv = [sys.executable, *map(str, words)]
    done = subprocess.run(argv, env=environment(**env), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == status, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("engines")
    made = Trained(root / "substrate", root / "run")
    source = "from pathlib import Path\nfrom tests.megatron_evolve.tiny import build_tiny\n"
    command("-c", f"{source}build_tiny(Path({str(made.substrate)!r}))")
    substrate = read_manifest(made.substrate)
    recipe = Recipe(lr=1e-2, steps=30, warmup_steps=2, batch_size=16, adapter=Adapter(rank=8, alpha=16))
    save_json(root / "candidate.json", candidate(substrate.digest, substrate.default.replace(recipe=recipe)))
    argv = ("--substrate", made.substrate, "--candidate", root / "candidate.json", "--seed", 1, "--out", made.run)
    command("-m", "megatron_evolve.substrate.train.run", *argv)
    return made


def scoring(trained: Trained, root: Path, engine: dict[str, Any], **more: Any) -> str:
    """Scores the run by a judge with this engine, as a job does it."""
    difficulty = read_manifest(trained.substrate).construction.difficulty
    shares = {family: {"weight": 1} for family in FAMILIES}
    items = {"dev-a": 2, "dev-b": 5} if difficulty == "nano" else {"dev-a": 1, "dev-b": 1}
    suite = GeneratedSuite(difficulty=difficulty, families=shares, items_per_family=items, seed=3)
    frozen = engine_of({**engine, "version": "0.1.0"})
    freeze_judge(root / "judge", dev=suite, external=None, engine=frozen, secret="a secret of the tests")
    argv = ["--judge", root / "judge", "--substrate", trained.substrate, "--run", trained.run, "--round", 1]
    argv += ["--splits", "dev-a,dev-b", "--out", root / "out"]
    return command("-m", "megatron_evolve.eval.run", *argv, **more)


def score(trained: Trained, root: Path, engine: dict[str, Any], **env: str) -> tuple[dict[str, Any], ItemRows]:
    """What the job left: `scores.json` and the rows."""
    scoring(trained, root, engine, **env)
    return json.loads((root / "out" / "scores.json").read_text()), read_rows(root / "out" / "scores.parquet")


def test_three_engines_answer_alike_and_never_compare(trained: Trained, tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="the endpoint's client is the [llm] extra")
    for package in ("fastapi", "uvicorn", "accelerate"):
        pytest.importorskip(package, reason="`transformers serve` needs transformers[serving]")
    scored = {name: score(trained, tmp_path / name, engine) for name, engine in ENGINES.items()}
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


VLLM = """#!{python}
import json, runpy, sys
from pathlib import Path
flags = dict(zip(sys.argv[3::2], sys.argv[4::2]))
assert sys.argv[1:4] == ["serve", "/models/base", "--host"], sys.argv
name, _, folder = sys.argv[sys.argv.index("--lora-modules") + 1].partition("=")
told = {{"rank": json.loads((Path(folder) / "adapter_config.json").read_text())["r"]}}
told["bytes"] = (Path(folder) / "adapter_model.safetensors").stat().st_size
Path({seen!r}).write_text(json.dumps(told))
(Path({seen!r}).parent / "lives").mkdir(exist_ok=True)
port = sys.argv[sys.argv.index("--port") + 1]
sys.argv = ["fake", "--port", port, "--name", name, "--lives", str(Path({seen!r}).parent / "lives")]
runpy.run_path({fake!r}, run_name="__main__")
"""


def test_vllm_is_started_with_the_runs_adapter(trained: Trained, tmp_path: Path) -> None:
    """A stand-in of that name on the path: the job exports the adapter, starts it so, and asks for the adapter's name.

    The base folder is never opened by the judge: what vLLM needs of it is vLLM's to find.
    """
    pytest.importorskip("openai", reason="the endpoint's client is the [llm] extra")
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    told = {"python": sys.executable, "seen": str(tmp_path / "seen.json"), "fake": fake_endpoint.__file__}
    program.write_text(VLLM.format(**told))
    program.chmod(0o755)
    engine = {"kind": "openai", "max_new_tokens": 60, "server": {"kind": "vllm", "base": "/models/base"}}
    path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
    record, rows = score(trained, tmp_path, engine, PATH=path)
    assert len(rows) == 42
    assert record["engine"]["about"] == {"server": "fake/1", "owned_by": "fake", "version": "0.0.fake"}
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["rank"] == 8 and seen["bytes"] > 100_000
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["scores.json", "scores.parquet", "server.log"]
    assert load_judge(tmp_path / "judge").engine.packages.keys() == {"vllm"}


def test_a_server_is_told_questions_and_nothing_else(trained: Trained, tmp_path: Path) -> None:
    """Every request in full: settings, and the question's text. No answer, id or family travels beside it."""
    pytest.importorskip("openai", reason="the endpoint's client is the [llm] extra")
    name = digest_file(trained.run / "checkpoint" / "manifest.json")[:12]
    with FakeEndpoint(name) as fake:
        engine = {"kind": "openai", "url": fake.url, "max_new_tokens": 60}
        record, rows = score(trained, tmp_path, engine, **{ATTEMPT_VARIABLE: str(tmp_path)})
    told = read_progress(tmp_path)
    assert (told.step, told.steps, told.stage) == (42, 42, "score")
    judge = load_judge(tmp_path / "judge")
    items = [item for split in ("dev-a", "dev-b") for item in judge.items(split, 1)]
    assert len(rows) == len(items) == 42
    asked = [dict(request) for request in fake.requests[1:]]
    prompts = [request.pop("prompt") for request in asked]
    assert sorted(prompts) == sorted(question_text(item.prompt, "nano") for item in items)
    always = {"model": name, "max_tokens": 60, "temperature": 0, "stream": True}
    assert all(request == {**always, "stream_options": {"include_usage": True}} for request in asked)
    assert record["engine"]["kind"] == "openai"


def test_an_item_without_an_answer_leaves_no_score(trained: Trained, tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="the endpoint's client is the [llm] extra")
    name = digest_file(trained.run / "checkpoint" / "manifest.json")[:12]
    patience = {"retries": 1, "backoff_seconds": 0.01}
    with FakeEndpoint(name, [f"{number}:500" for number in range(30, 99)]) as fake:
        engine = {"kind": "openai", "url": fake.url, "concurrency": 1, "patience": patience}
        said = scoring(trained, tmp_path, engine, status=1)
    assert "] item 31 of 42 has no answer from http://127.0.0.1:" in said.splitlines()[-1]
    assert list((tmp_path / "out").iterdir()) == []


def test_an_imported_checkpoint_is_asked_in_its_chat_format(tmp_path: Path) -> None:
    """By three engines alike: ours and transformers' write the same tokens, and a server is told the same question."""
    pytest.importorskip("openai", reason="the endpoint's client is the [llm] extra")
    from transformers import NemotronHConfig, NemotronHForCausalLM, set_seed

    set_seed(0)
    shapes = NANO_CPU.model_copy(update={"vocab_size": VOCAB_SIZE, "max_sequence_length": 1024, "init_std": 0.1})
    model = NemotronHForCausalLM(NemotronHConfig(**huggingface_config(shapes)))
    model.save_pretrained(tmp_path / "hub")
    write_chat_tokenizer(tmp_path / "hub")
    substrate = import_hf(tmp_path / "hub", tmp_path / "substrate")
    whole = Trained(tmp_path / "substrate", tmp_path / "substrate")
    ours, theirs = (score(whole, tmp_path / name, ENGINES[name])[1] for name in ("megatron", "transformers"))
    assert len(ours) == 12
    for column in ("item_id", "prediction", "num_tokens", "truncated"):
        assert getattr(theirs, column).tolist() == getattr(ours, column).tolist(), column
    for form in ("tokens", "chat"):
        with FakeEndpoint(substrate.digest[:12]) as fake:
            score(whole, tmp_path / form, {"kind": "openai", "url": fake.url, "prompt": form})
        item = load_judge(tmp_path / form / "judge").items("dev-a", 1)[0]
        asked = [one["messages"][0]["content"] if form == "chat" else one["prompt"] for one in fake.requests[1:]]
        wanted = {
            "tokens": read_tokenizer(tmp_path / "substrate").encode(puzzle_prompt(item.prompt)),
            "chat": item.prompt + CHALLENGE_SUFFIX,
        }
        assert wanted[form] in asked
