"""Settings of the engines: old files mean what they meant, impossible ones are refused, argv is exact."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from megatron_evolve.campaign import JudgeSpec
from megatron_evolve.eval.engines import versions
from megatron_evolve.eval.engines.command import Place, server_argv, wanted
from megatron_evolve.eval.engines.settings import EngineSettings, MegatronSettings, OpenAISettings, check_clamp
from megatron_evolve.eval.freeze import engine_of
from megatron_evolve.eval.judge import Engine, comparison_key, freeze_judge, load_judge
from megatron_evolve.eval.suite import GeneratedSuite, item_set_digest
from megatron_evolve.substrate.digest import digest_of

DEV = {"kind": "generated", "difficulty": "nano", "seed": 1, "families": {"numeral": {"weight": 1}}}
DEV |= {"items_per_family": {"dev-a": 4, "dev-b": 4}}
SERVER = {"kind": "command", "argv": ("serve", "{model}", "{port}")}
ENGINES: dict[str, dict[str, Any]] = {
    "megatron": {"max_new_tokens": 24, "batch_size": 256},
    "transformers": {"kind": "transformers", "max_new_tokens": 24, "batch_size": 256},
    "running": {"kind": "openai", "url": "http://somewhere:8000/v1"},
    "started": {"kind": "openai", "server": SERVER},
    "vllm": {"kind": "openai", "server": {"kind": "vllm"}},
}


def judge_spec(engine: dict[str, Any] | None) -> JudgeSpec:
    document = {"dev": DEV, "external": None, "secret": "a secret of the tests"}
    return JudgeSpec.parse(document if engine is None else {**document, "engine": engine}, where="judge")


def test_a_file_that_names_no_kind_means_what_it_meant() -> None:
    old = {"max_new_tokens": 32, "batch_size": 128}
    assert judge_spec(old).engine == MegatronSettings(**old)
    assert judge_spec(old).model_dump(mode="json")["engine"] == old
    assert judge_spec(None).model_dump(mode="json")["engine"] == {"max_new_tokens": 24, "batch_size": 256}
    assert judge_spec({"kind": "megatron", **old}) == judge_spec(old)


def test_the_frozen_engine_is_written_as_before_there_was_a_choice(tmp_path: Path) -> None:
    """Field by field and so digest by digest: a judge that was frozen before still loads, and its keys hold."""
    engine = engine_of({"max_new_tokens": 24, "batch_size": 256, "version": "0.1.0"})
    before = {"name": "greedy-cached", "version": "0.1.0", "max_new_tokens": 24, "batch_size": 256}
    assert engine == Engine(**before)
    suite = GeneratedSuite(**DEV)
    judge = freeze_judge(tmp_path / "judge", dev=suite, external=None, engine=engine, secret="a secret of the tests")
    assert judge.sections["engine"] == digest_of(before)
    assert load_judge(tmp_path / "judge") == judge
    items = judge.items("dev-b", 1)
    parts = {"metric": judge.metric, "engine": before, "suite": suite.digest}
    assert comparison_key(judge, "dev-b", items) == digest_of({**parts, "items": item_set_digest(items)})


@pytest.mark.parametrize("name", ENGINES)
def test_a_clamp_is_left_to_engines_that_keep_it(name: str) -> None:
    engine = judge_spec(ENGINES[name]).engine
    check_clamp(engine, 0.0)
    if name in ("megatron", "transformers"):
        check_clamp(engine, 1e-3)
    else:
        with pytest.raises(
            ValueError, match=r"training clamps the Mamba step at 0\.001, .* judge with engine megatron or"
        ):
            check_clamp(engine, 1e-3)


def test_engines_never_compare(tmp_path: Path) -> None:
    """Kind, version, packages, flags and what the server says of itself are in the key; where it lies is not."""

    def key(engine: dict[str, Any], about: dict[str, str] | None = None, **packages: str) -> str:
        frozen = engine_of({**engine, "version": "0.1.0"})
        if packages:
            frozen = frozen.replace(packages={**frozen.packages, **packages})
        place = tmp_path / digest_of([engine, packages])
        if not place.exists():
            suite = GeneratedSuite(**DEV)
            freeze_judge(place, dev=suite, external=None, engine=frozen, secret="a secret of the tests")
        judge = load_judge(place)
        return comparison_key(judge, "dev-b", judge.items("dev-b", 1), about)

    running, started, vllm = (ENGINES[name] for name in ("running", "started", "vllm"))
    keys = [key(engine) for engine in ENGINES.values()]
    keys += [key(running, {"version": "0.11.0"}), key(running, {"version": "0.11.1"}), key(vllm, vllm="0.12.0")]
    keys += [key({**running, "prompt": "tokens"}), key({**running, "extra": {"top_k": 1}})]
    keys += [key({**running, "concurrency": 8}), key({**running, "max_new_tokens": 25})]
    keys += [key({**started, "server": {**SERVER, "argv": ("serve", "{port}", "{model}")}})]
    keys += [key({**vllm, "server": {"kind": "vllm", "tensor_parallel": 8}})]
    keys += [key(ENGINES["transformers"], transformers="6.0.0")]
    assert len(set(keys)) == len(keys)
    moved = {**running, "url": "https://elsewhere/v1", "api_key_env": "KEY"}
    assert key(moved, {"version": "0.11.0"}) == key(running, {"version": "0.11.0"})


@pytest.mark.parametrize("name", ENGINES)
def test_a_campaigns_engine_is_what_the_judge_freezes(name: str) -> None:
    """Through JSON, as it travels from the campaign to the judge's own process."""
    written = json.loads(json.dumps(judge_spec(ENGINES[name]).model_dump(mode="json")["engine"]))
    frozen = engine_of({**written, "version": "0.1.0"})
    assert frozen.model_dump(mode="json", include=set(written)) == written
    assert frozen.version == "0.1.0"


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"kind": "openai"}, "give exactly one of them"),
        ({**ENGINES["running"], "server": SERVER}, "give exactly one of them"),
        ({**ENGINES["running"], "model": "nemotron"}, r"must hold \{run\}"),
        ({**ENGINES["running"], "extra": {"temperature": 1}}, "must not set temperature"),
        ({"kind": "openai", "server": {"kind": "command", "argv": ["serve"]}}, r"must hold \{port\}"),
        ({**ENGINES["started"], "lora": True}, "takes a `base`"),
        ({**ENGINES["started"], "base": "x"}, "an endpoint that runs"),
        ({"kind": "vllm"}, "'megatron', 'transformers', 'openai'"),
        ({**ENGINES["running"], "concurency": 4}, r"unknown key .*; did you mean concurrency\?"),
        ({"batchsize": 4}, r"unknown key .*; did you mean batch_size\?"),
        ({**ENGINES["vllm"], "server": {"kind": "vllm", "basee": "x"}}, r"unknown key .*; did you mean base\?"),
    ],
)
def test_refusals(engine: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge_spec(engine)


def test_another_version_than_the_frozen_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = engine_of({**ENGINES["transformers"], "version": "0.1.0"})
    versions.check_packages(frozen, frozen.packages)
    assert frozen.packages["transformers"] != versions.ABSENT
    monkeypatch.setattr(versions, "_installed", lambda name: "9.9")
    with pytest.raises(ValueError, match=r"expected torch .* was frozen, found 9.9: scores would not compare"):
        versions.check_packages(frozen, frozen.packages)


# --- command lines ----------------------------------------------------------------------------------------------------


def argv(server: dict[str, Any], place: Place, **changes: Any) -> str:
    settings = TypeAdapter(EngineSettings).validate_python({"kind": "openai", "server": server, **changes})
    assert isinstance(settings, OpenAISettings)
    return " ".join(server_argv(settings, place, 8123))


def test_vllm_with_the_adapter_as_a_lora_request() -> None:
    server = {"kind": "vllm", "base": "/models/nano", "tensor_parallel": 8, "max_model_len": 8192, "dtype": "bfloat16"}
    place = Place(run="0123456789ab", adapter=Path("/runs/7/peft"))
    assert argv({**server, "flags": ["--enforce-eager"]}, place, concurrency=64) == (
        "vllm serve /models/nano --host 127.0.0.1 --port 8123 --enable-lora --lora-modules 0123456789ab=/runs/7/peft "
        "--max-lora-rank 32 --max-loras 1 --tensor-parallel-size 8 --dtype bfloat16 --gpu-memory-utilization 0.9 "
        "--max-num-seqs 64 --max-model-len 8192 --generation-config vllm --seed 0 --enforce-eager"
    )


def test_vllm_with_the_merged_run() -> None:
    assert argv({"kind": "vllm"}, Place(run="0123456789ab", model=Path("/runs/7/export")), model="nano-{run}") == (
        "vllm serve /runs/7/export --host 127.0.0.1 --port 8123 --served-model-name nano-0123456789ab "
        "--tensor-parallel-size 1 --dtype auto --gpu-memory-utilization 0.9 --max-num-seqs 32 --generation-config vllm "
        "--seed 0"
    )


def test_only_what_a_server_is_told_of_is_exported() -> None:
    for server, model, folders in (
        ({"kind": "vllm"}, "{run}", {"{model}"}),
        ({"kind": "vllm", "base": "x"}, "{run}", {"{adapter}"}),
        ({"kind": "command", "argv": ["serve", "base", "--lora={adapter}", "{port}"]}, "{run}", {"{adapter}"}),
        ({"kind": "command", "argv": ["serve", "{port}"]}, "{model}", {"{model}"}),
        ({"kind": "command", "argv": ["serve", "{port}"]}, "{run}", set()),
    ):
        assert wanted(OpenAISettings(kind="openai", server=server, model=model)) == folders


def test_any_server_by_its_command_line() -> None:
    server = {"kind": "command", "argv": ["serve", "{model}", "--as={name}", '--json={"a":1}', "-p", "{port}"]}
    place = Place(run="0123456789ab", model=Path("/runs/7/export"))
    assert argv(server, place, model="{model}") == ('serve /runs/7/export --as=/runs/7/export --json={"a":1} -p 8123')
    with pytest.raises(ValueError, match=r"asks for \{adapter\}, which this run does not have"):
        argv({"kind": "command", "argv": ["serve", "{adapter}", "{port}"]}, place)
