"""Whether the judge's engine can answer, asked before anything is trained: one sentence, nothing written, real HTTP."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_evolve import loop
from megatron_evolve import preflight as preflight_module
from megatron_evolve.artefacts import CampaignFolder, save_yaml
from megatron_evolve.campaign import SHIPPED, Campaign
from megatron_evolve.document import load_yaml
from megatron_evolve.dry_run import dry_run
from megatron_evolve.eval.engines.seam import Prompt
from megatron_evolve.eval.engines.server import free_port
from megatron_evolve.eval.suite import draw
from megatron_evolve.launch.local import LocalLauncher
from megatron_evolve.ledger import Ledger
from megatron_evolve.longest_question import DRAWN, longest_question
from megatron_evolve.loop import Session, run_campaign
from megatron_evolve.preflight import Expected, expect, preflight
from megatron_evolve.prepare import run_one
from megatron_evolve.readiness import check_fits, check_ready, first_job, left_open, main
from megatron_evolve.site import Site, find_site, load_site, placed
from megatron_evolve.substrate.checkpoint_tokenizer import read_tokenizer
from megatron_evolve.substrate.tokenizer import nano_tokenizer
from tests.eval.engines.asked import SHORT
from tests.eval.engines.fake_endpoint import FakeEndpoint
from tests.megatron_evolve import tiny
from tests.megatron_evolve.test_dry_run import imported
from tests.substrate.chat_tokenizer import write_chat_tokenizer

NODE, CLUSTER = load_site(find_site("h100-node")), load_site(find_site("h100-slurm"))
NOBODY = "http://127.0.0.1:9/v1"  # the discard port: nothing listens
LOCAL = Site()


def shipped(name: str, **engine: Any) -> Campaign:
    """A shipped campaign with some of its engine's settings, and of its server's, changed."""
    document = load_yaml(SHIPPED / f"{name}.yaml")
    settings = document["judge"]["engine"]
    settings["server"] = {**settings.get("server", {}), **engine.pop("server", {})} or None
    document["judge"]["engine"] = {**settings, **engine}
    return Campaign.parse(document, where=name)


def asking(**engine: Any) -> Campaign:
    """The demo's campaign with an engine `openai` of the patience of a test."""
    document = load_yaml(SHIPPED / "demo.yaml")
    patience = {**SHORT, "connect_seconds": 0.2}
    document["judge"]["engine"] = {"kind": "openai", "patience": patience, "max_new_tokens": 24, **engine}
    return Campaign.parse(document, where="demo")


def expected_of(campaign: Campaign, store: Path) -> Expected:
    return expect(campaign.substrate, store)


def reaching(campaign: Campaign, *space: str) -> Campaign:
    return campaign.replace(constitution=campaign.constitution.replace(mutation_space=("mix.weight.*", *space)))


@pytest.fixture
def serve() -> Iterator[Any]:
    """Starts fake endpoints."""
    pytest.importorskip("openai", reason="the endpoint's client is the [llm] extra")
    with ExitStack() as stack:
        yield lambda name, *faults, **more: stack.enter_context(FakeEndpoint(name, faults, **more))


def session(tmp_path: Path, site: Site = LOCAL) -> Session:
    return Session(tmp_path / "run", tmp_path / "store", lambda what, facts: None, lambda: False, site)


# --- from the files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("campaign", "says"),
    [
        (shipped("nemotron3-nano-lora", server={"max_lora_rank": 8}), "of rank 8 at most, and its runs have rank 32"),
        (reaching(shipped("nemotron3-nano-lora"), "recipe.*r.rank"), r"raise recipe.adapter.rank \(recipe.\*r.rank in"),
        (reaching(shipped("nemotron3-nano-lora"), "recipe.*"), r"change recipe.adapter \(recipe.\* in .* without one"),
        (reaching(shipped("nemotron3-ultra-infrastructure"), "recipe.a*"), r"change recipe.adapter \(recipe.a\* in"),
        (asking(server={"kind": "vllm", "base": "/models/nano"}), "serves a run's adapter, and its substrate's recipe"),
        (asking(url=NOBODY, lora=True), "serves a run's adapter, and its substrate's recipe has none"),
        (
            shipped("nemotron3-nano-lora", max_new_tokens=8192),
            "up to 8,192 new tokens after any question, and its vLLM has room for 8,192 in all: lower",
        ),
    ],
)
def test_an_engine_that_could_take_no_run_is_refused_in_a_dry_run_too(
    campaign: Campaign, says: str, tmp_path: Path
) -> None:
    site = CLUSTER if "ultra" in campaign.name else NODE if "nemotron" in campaign.name else LOCAL
    with pytest.raises(ValueError, match=says):
        dry_run(campaign, tmp_path / "run", site, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_the_longest_question_of_drawn_suites_and_its_answer_fit_to_the_last_token(tmp_path: Path) -> None:
    """Against the suites drawn here."""
    judge = asking(url=NOBODY).judge
    suites = [suite.replace(items_per_family={"dev-b": DRAWN}) for suite in (judge.dev, judge.external)]
    items = [item for suite in suites for item in draw(suite, split="dev-b", round_number=0, secret="")]
    longest = max(len(Prompt.of(item.prompt, "nano", nano_tokenizer()).tokens) for item in items)
    exact, short = (asking(server={"kind": "vllm", "max_model_len": room}) for room in (longest + 24, longest + 23))
    check_fits(exact, expected_of(exact, tmp_path))
    with pytest.raises(ValueError, match=f"a question of up to {longest}, and its vLLM has room for {longest + 23} in"):
        check_fits(short, expected_of(short, tmp_path))


def test_every_row_of_a_csv_is_measured_by_the_checkpoints_tokenizer(tmp_path: Path) -> None:
    imported(tmp_path)
    folder = tmp_path / "imported" / "nemotron3-nano"
    write_chat_tokenizer(folder)
    longest = "one two three four " * 900
    rows = [f'{number},"{longest if number == 7 else "short"}",1' for number in range(40)]
    (tmp_path / "target.csv").write_text("\n".join(["id,prompt,answer", *rows]) + "\n")
    campaign = shipped("nemotron3-nano-lora")
    target = campaign.judge.external.replace(
        path=str(tmp_path / "target.csv"), items={"external-a": 2, "external-b": 2}, sealed=0.5
    )
    campaign = campaign.replace(judge=campaign.judge.replace(external=target))
    wanted = len(Prompt.of(longest, "challenge", read_tokenizer(folder)).tokens)
    assert longest_question(campaign.judge, expected_of(campaign, tmp_path)) == wanted > 512
    with pytest.raises(ValueError, match=f"after a question of up to {wanted:,}, and its vLLM has room for 8,192"):
        preflight(campaign, NODE, tmp_path)


# --- from this machine -----------------------------------------------------------------------------------------------


def test_what_this_machine_lacks_is_refused_and_a_dry_run_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai", reason="the endpoint's client is the [llm] extra")
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", str(place))
    vllm, command = {"kind": "vllm"}, {"kind": "command", "argv": ["serve-it", "{port}"]}
    key = {"url": NOBODY, "api_key_env": "JUDGE_KEY"}
    for engine, says in (
        ({"server": vllm}, "expected the command 'vllm' of the judge's server .* name its path as `vllm` of the site"),
        ({"server": command}, "expected the command 'serve-it' .* mend the engine's argv"),
        (key, "in the environment variable JUDGE_KEY, it is not set"),
    ):
        campaign = asking(**engine)
        with pytest.raises(ValueError, match=says):
            run_campaign(session(tmp_path), campaign)
        told = dry_run(campaign, tmp_path / "run", LOCAL, tmp_path / "store")
        assert any("the run itself would be refused: expected the" in note for note in told["notes"])
    (place / "vllm").write_text("#!/bin/sh\n")
    (place / "vllm").chmod(0o755)
    started, expected = asking(server=vllm), expected_of(asking(server=vllm), tmp_path)
    check_ready(started, LOCAL, expected, resumes=False)
    assert left_open(started, LOCAL) == []
    with pytest.raises(ValueError, match=r"base model of the judge's server in /models/nano, found no folder"):
        check_ready(asking(server={**vllm, "base": "/models/nano"}), LOCAL, expected, resumes=False)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["bin"]


def test_a_machine_without_the_client_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"needs the package openai, which is not installed: pip install"):
        run_campaign(session(tmp_path), asking(url=NOBODY))
    assert list(tmp_path.iterdir()) == []


def test_on_a_cluster_the_first_job_asks_where_jobs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is built or trained. This machine's launcher stands in for Slurm; what runs is the job itself."""
    pytest.importorskip("openai", reason="the endpoint's client is the [llm] extra")
    campaign, site = asking(server={"kind": "command", "argv": ["serve-it", "{port}"]}), Site(launcher="slurm")
    monkeypatch.setattr(preflight_module, "_check_queue", lambda campaign, placement, new: None)
    monkeypatch.setattr(loop, "launcher_of", lambda campaign, session: LocalLauncher(1, session.root))
    with pytest.raises(ValueError, match=r"engine/ready crashed: .* the command 'serve-it' of the judge's server on "):
        run_campaign(session(tmp_path, site), campaign)
    assert not (tmp_path / "store").exists() and Ledger(tmp_path / "run").latest is None
    (tmp_path / "serve-it").write_text("#!/bin/sh\n")
    (tmp_path / "serve-it").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    job = first_job(campaign, site, tmp_path / "run")
    with LocalLauncher(1, tmp_path) as launcher:
        assert [run_one(launcher, job, lambda: False).attempt for _ in range(2)] == [2, 2]  # asked once


def test_a_dry_run_shows_that_job_and_whom_the_run_asks(tmp_path: Path) -> None:
    for name, gpus in (("nemotron3-super-lora", True), ("nemotron3-ultra-infrastructure", False)):
        told = dry_run(shipped(name), tmp_path / "run", CLUSTER, tmp_path / "store")
        script = next(one["script"] for one in told["steps"] if one["what"].startswith("ask where jobs run"))
        assert first_job(shipped(name), LOCAL, tmp_path) is None
        assert "megatron_evolve.readiness --engine" in script and ("--gpus-per-node=8" in script) == gpus
        asks = "The run itself first asks http://127.0.0.1:8000/v1 which models it serves; a dry run asks nobody."
        assert (asks in told["notes"]) != gpus


def test_a_key_that_only_jobs_have_is_no_refusal(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first job has it, and tells what it was shown."""
    server = serve("nano")
    keyed = asking(url=server.url, api_key_env="JUDGE_KEY", base="nano")
    check_ready(keyed, CLUSTER, expected_of(keyed, tmp_path), resumes=False)
    monkeypatch.setenv("JUDGE_KEY", "a key")
    engine = json.dumps(keyed.judge.engine.model_dump(mode="json"))
    assert main(["--engine", engine, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "ready.json").read_text()) == {"models": ["nano"]}


# --- from an endpoint ------------------------------------------------------------------------------------------------


def test_nobody_there_ends_the_command_with_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="the endpoint's client is the [llm] extra")
    file = tmp_path / "asking.yaml"
    file.write_text(yaml.safe_dump(asking(url=NOBODY).model_dump(mode="json", by_alias=True)))
    ended = tiny.command("run", file, "--dir", tmp_path / "run", "--store", tmp_path / "store")
    assert ended.returncode == 1
    assert f"but {NOBODY} was not ready in time (Connection error" in ended.stderr
    assert "as `endpoint` of the site, and give the same command again" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert [one.name for one in tmp_path.iterdir()] == ["asking.yaml"]


def test_where_jobs_run_elsewhere_an_endpoint_may_be_theirs_alone_to_reach(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    campaign = asking(url=NOBODY)
    check_ready(campaign, CLUSTER, expected_of(campaign, tmp_path), resumes=True)
    assert f"does not answer on this machine: {NOBODY}" in capsys.readouterr().err


def test_a_folder_where_nothing_was_opened_is_new(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    Ledger(tmp_path / "run").close()
    with pytest.raises(ValueError, match="or name where it runs as `endpoint` of the site"):
        run_campaign(session(tmp_path), asking(url=NOBODY))


def test_an_endpoint_with_another_model_room_or_door(serve: Any, tmp_path: Path) -> None:
    server = serve("llama", listed=("llama", "qwen"), root="/models/llama", max_model_len=40)
    for engine, says in (
        ({"base": "nano"}, "to serve 'nano', it serves llama, qwen: start it with that model"),
        (
            {"base": "/models/llama"},
            r"up to 24 new tokens after a question of up to \d+, and http.* room for 40 in all",
        ),
        ({"url": f"{server.url}/v2"}, "expected a list of models at .*/v2/models, got HTTP 404: check the url"),
        ({"url": serve("nano", "models:401").url}, "got HTTP 401: check the url and the variable that holds its key"),
        ({"url": serve("nano", "models:nonsense").url}, "expected a list of models .*, got something else: check"),
    ):
        with pytest.raises(ValueError, match=says):
            run_campaign(session(tmp_path), asking(**{"url": server.url, **engine}))
    assert list(tmp_path.iterdir()) == []
    assert server.requests == []


def test_a_base_is_known_by_its_name_or_the_folder_that_the_site_names(serve: Any, tmp_path: Path) -> None:
    site = Site(models={"nvidia/nano": "/models/nano"})
    for server in (serve("nano", root="/models/nano"), serve("/models/nano")):
        campaign = placed(asking(url=server.url, base="nvidia/nano"), site)
        check_ready(campaign, site, expected_of(campaign, tmp_path), resumes=False)
    other = placed(asking(url=serve("nvidia/super").url, base="nvidia/nano"), site)
    with pytest.raises(ValueError, match="to serve '/models/nano', it serves nvidia/super"):
        check_ready(other, site, expected_of(other, tmp_path), resumes=False)


def test_a_campaign_that_goes_on_waits_for_an_endpoint_that_is_started_again(serve: Any, tmp_path: Path) -> None:
    """A new one is refused at once."""
    port = free_port()
    campaign = asking(url=f"http://127.0.0.1:{port}/v1")
    expected = expected_of(campaign, tmp_path)
    started = time.monotonic()
    with pytest.raises(ValueError, match="was not ready in time"):
        check_ready(campaign, LOCAL, expected, resumes=False)
    assert time.monotonic() - started < SHORT["longest_wait_seconds"]
    timer = threading.Timer(0.7, lambda: serve("nano", port=port))
    timer.start()
    check_ready(campaign, LOCAL, expected, resumes=True)
    timer.join()


def test_a_refusal_leaves_a_campaign_that_goes_on_with_the_same_command(serve: Any, tmp_path: Path) -> None:
    """And one that is closed asks nobody: it has nothing left to judge."""
    port = free_port()
    impatient = {**SHORT, "connect_seconds": 0.2, "longest_wait_seconds": 0.2}
    campaign = asking(url=f"http://127.0.0.1:{port}/v1", patience=impatient)
    folder = CampaignFolder(tmp_path / "run")
    folder.root.mkdir()
    opened = {
        "name": campaign.name,
        "campaign": save_yaml(folder.campaign, campaign),
        "constitution": save_yaml(folder.constitution, campaign.constitution),
        "substrate_folder": str(tmp_path / "no-substrate"),
        "judge_folder": str(tmp_path / "no-judge"),
    }
    ledger = Ledger(folder.root)
    ledger.append("campaign-opened", "", opened)
    before = folder.ledger.read_bytes()
    with pytest.raises(ValueError, match=r"was not ready in time .*: start it and give the same command again"):
        run_campaign(session(tmp_path), campaign)
    assert folder.ledger.read_bytes() == before
    folder.stop_file.touch()  # an order to stop asks no judge
    with pytest.raises(ValueError, match="no-substrate is no frozen substrate"):
        run_campaign(session(tmp_path), campaign)
    folder.stop_file.unlink()
    with FakeEndpoint("nano", port=port), pytest.raises(ValueError, match="no-substrate is no frozen substrate"):
        run_campaign(session(tmp_path), campaign)  # past the endpoint
    ledger.append("campaign-closed", "", {})
    ledger.close()
    with pytest.raises(ValueError, match="no-substrate is no frozen substrate"):
        run_campaign(session(tmp_path), campaign)
