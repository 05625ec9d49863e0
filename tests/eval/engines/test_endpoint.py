"""An endpoint over real HTTP that goes wrong in every way: whole answers to every prompt, or one sentence."""

import email.utils
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from megatron_evolve.eval.engines.endpoint import retry_after
from megatron_evolve.eval.engines.seam import Answers
from megatron_evolve.eval.engines.served import ask, ask_running
from tests.eval.engines.asked import examinee, expected, prompts, settings
from tests.eval.engines.fake_endpoint import FakeEndpoint

pytest.importorskip("openai", reason="the endpoint's client is the [llm] extra")

ITEMS = prompts(12)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Callable[..., FakeEndpoint]]:
    """Starts a fake endpoint that serves the run."""
    with ExitStack() as stack:
        yield lambda *faults, **more: stack.enter_context(FakeEndpoint(examinee(tmp_path).name, faults, **more))


def answers(fake: FakeEndpoint, folder: Path, patience: dict[str, Any] | None = None, **changes: Any) -> Answers:
    return ask(settings(patience, url=fake.url, **changes), examinee(folder), ITEMS)


def test_every_prompt_is_answered_in_order(fake: Callable[..., FakeEndpoint], tmp_path: Path) -> None:
    server = fake("all:slow")
    got = answers(server, tmp_path)
    assert list(got.completions) == expected(ITEMS, 40)
    assert len({one.text for one in got.completions}) == len(ITEMS)
    assert got.about == {"server": "fake/1", "owned_by": "fake", "version": "0.0.fake"}
    assert got.account == {}
    warm_up, *asked = server.requests
    assert warm_up["max_tokens"] == 1 and warm_up["prompt"] not in {item.text for item in ITEMS}
    assert sorted(one["prompt"] for one in asked) == sorted(item.text for item in ITEMS)
    assert {(one["temperature"], one["max_tokens"], one["stream"]) for one in asked} == {(0, 40, True)}
    assert 1 < server.most_at_once <= 4


def test_a_budget_that_ends_first_is_truncated(fake: Callable[..., FakeEndpoint], tmp_path: Path) -> None:
    got = answers(fake(), tmp_path, max_new_tokens=5)
    assert list(got.completions) == expected(ITEMS, 5)
    assert all(one.truncated and one.num_tokens == 5 for one in got.completions)


@pytest.mark.parametrize("form", ["tokens", "chat"])
def test_prompts_as_token_ids_and_as_messages(fake: Callable[..., FakeEndpoint], tmp_path: Path, form: str) -> None:
    server = fake()
    got = answers(server, tmp_path, prompt=form, extra={"top_k": 1}, max_new_tokens=400)
    asked = server.requests[1:]
    assert all(one["top_k"] == 1 for one in asked)
    sent = [one["prompt"] if form == "tokens" else one["messages"][0]["content"] for one in asked]
    wanted = [list(item.tokens) if form == "tokens" else item.message for item in ITEMS]
    assert sorted(sent) == sorted(wanted)
    assert all("letters, the last ones are" in one.text for one in got.completions)


@pytest.mark.parametrize(
    ("faults", "account"),
    [
        (("0:500", "1:503"), {"HTTP 500": 1, "HTTP 503": 1}),
        (("2:cut", "5:drop"), {"truncated": 1, "connection": 1}),
        (("3:no-usage",), {"truncated": 1}),
        (("1:error-event",), {"server error": 1}),
        (("warm-up:500",), {"HTTP 500": 1}),
    ],
)
def test_what_may_pass_is_asked_again(
    fake: Callable[..., FakeEndpoint], tmp_path: Path, faults: tuple[str, ...], account: dict[str, int]
) -> None:
    got = answers(fake(*faults), tmp_path)
    assert list(got.completions) == expected(ITEMS, 40)
    assert got.account == account


def test_retry_after_is_honoured_and_is_no_standstill(fake: Callable[..., FakeEndpoint], tmp_path: Path) -> None:
    server = fake("0:retry-after=0.6")
    got = answers(server, tmp_path, {"stall_seconds": 0.2}, concurrency=1)
    assert list(got.completions) == expected(ITEMS, 40)
    assert got.account == {"HTTP 429": 1}
    first, second = server.times[1:3]
    assert server.requests[1] == server.requests[2]
    assert second - first >= 0.6


def test_retry_after_beyond_patience_ends_the_job(fake: Callable[..., FakeEndpoint], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"after 1 attempts; the last one: HTTP 429, and it asks for 3600 s of waiting"
    ):
        answers(fake("0:retry-after=3600"), tmp_path)


def test_retry_after_as_seconds_date_or_nonsense() -> None:
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 28 < retry_after(date) <= 30
    assert [retry_after(text) for text in (None, "7", "0.5", "-1", "soon")] == [0, 7, 0.5, 0, 0]


@pytest.mark.parametrize(("fault", "words"), [("500", "HTTP 500"), ("cut", "ended without a finish reason")])
def test_an_item_without_an_answer_fails_the_job(
    fake: Callable[..., FakeEndpoint], tmp_path: Path, fault: str, words: str
) -> None:
    server = fake(*(f"{number}:{fault}" for number in range(4, 8)))
    with pytest.raises(
        ValueError, match=rf"item 5 of 12 has no answer from .* after 4 attempts; the last one: .*{words}"
    ):
        answers(server, tmp_path, concurrency=1)
    assert len(server.requests) == 1 + 4 + 4


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refused_request_is_not_asked_again(fake: Callable[..., FakeEndpoint], tmp_path: Path, status: int) -> None:
    server = fake(f"0:{status}")
    with pytest.raises(ValueError, match=rf"refuses the judge's requests with HTTP {status} .*told to answer"):
        answers(server, tmp_path, concurrency=1)
    assert len(server.requests) == 2


def test_another_model_is_refused_before_anything_is_asked(fake: Callable[..., FakeEndpoint], tmp_path: Path) -> None:
    server = fake(listed=("llama", "base"))
    with pytest.raises(ValueError, match=r"to serve '[0-9a-f]{12}', it serves base, llama: load the run there"):
        answers(server, tmp_path)
    assert server.requests == []


def test_another_base_model_is_refused_before_the_adapter_is_loaded(
    fake: Callable[..., FakeEndpoint], tmp_path: Path
) -> None:
    server = fake(listed=("llama",), root="/models/llama")
    with pytest.raises(ValueError, match=r"to serve 'nano', it serves llama: start it with that model"):
        answers(server, tmp_path, base="nano")
    assert server.requests == []
    named = fake(root="/models/nano")
    assert list(answers(named, tmp_path, base="/models/nano").completions) == expected(ITEMS, 40)


def test_a_model_that_changes_under_way_is_refused(fake: Callable[..., FakeEndpoint], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got one of 'somebody-else': it serves another model now"):
        answers(fake("3:wrong-model"), tmp_path)


def test_a_stuck_server_is_found_by_its_token_counter(fake: Callable[..., FakeEndpoint], tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"is stuck: 1 requests are open and no token came for 0.4 s"):
        answers(fake("3:hang"), tmp_path, {"stall_seconds": 0.4})
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("fault", ["slow", "queue"])
def test_a_slow_server_is_waited_for(fake: Callable[..., FakeEndpoint], tmp_path: Path, fault: str) -> None:
    """One answer takes 0.4 s and the last one in the queue 1.5 s, beyond the patience for a standstill."""
    server = fake(f"all:{fault}")
    few = ITEMS[:4]
    started = time.monotonic()
    got = ask(settings({"stall_seconds": 0.25}, url=server.url), examinee(tmp_path), few)
    assert list(got.completions) == expected(few, 40)
    assert time.monotonic() - started > 0.25
    assert got.account == {}


def test_a_request_has_its_own_limit(fake: Callable[..., FakeEndpoint], tmp_path: Path) -> None:
    got = answers(fake("3:hang"), tmp_path, {"request_seconds": 0.3})
    assert list(got.completions) == expected(ITEMS, 40)
    assert got.account == {"timeout": 1}


def test_something_else_answers(fake: Callable[..., FakeEndpoint], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a list of models at .*/models, got something else: check the url"):
        answers(fake("models:nonsense"), tmp_path)
    with pytest.raises(ValueError, match="/models, got HTTP 404: check the url and the variable"):
        answers(fake("models:404"), tmp_path)
    with pytest.raises(ValueError, match=r"was not ready in time \(Error code: 503"):
        answers(fake("models:503"), tmp_path, {"connect_seconds": 0.3})


def test_nobody_answers(tmp_path: Path) -> None:
    with FakeEndpoint("gone") as server:
        url = server.url
    with pytest.raises(ValueError, match=r"was not ready in time \(Connection error"):
        ask(settings({"connect_seconds": 0.3}, url=url), examinee(tmp_path), ITEMS)


def test_a_key_comes_from_the_environment_and_rests_nowhere(
    fake: Callable[..., FakeEndpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = fake()
    monkeypatch.delenv("THE_JUDGES_KEY", raising=False)
    with pytest.raises(ValueError, match="environment variable THE_JUDGES_KEY, it is not set"):
        answers(server, tmp_path, api_key_env="THE_JUDGES_KEY")
    monkeypatch.setenv("THE_JUDGES_KEY", "sk-very-private")
    got = answers(server, tmp_path, api_key_env="THE_JUDGES_KEY")
    assert {one["authorization"] for one in server.headers} == {"Bearer sk-very-private"}
    kept = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "very-private" not in kept + repr(got)


@pytest.mark.parametrize("left_over", [False, True], ids=["clean", "left by a killed job"])
def test_a_running_vllm_loads_the_runs_adapter(
    fake: Callable[..., FakeEndpoint], tmp_path: Path, left_over: bool
) -> None:
    one = examinee(tmp_path)
    server = fake(listed=("base", one.name) if left_over else ("base",))
    got = ask_running(settings(url=server.url, lora=True), one, ITEMS, adapter=tmp_path)
    assert list(got.completions) == expected(ITEMS, 40)
    assert {request["model"] for request in server.requests} == {one.name}
    assert server.adapters == [str(tmp_path)]
    assert server.listed == ["base"]
    with pytest.raises(ValueError, match="serves another model now"):
        ask_running(settings(url=fake("3:wrong-model", listed=("base",)).url, lora=True), one, ITEMS, adapter=tmp_path)
    assert server.listed == ["base"]


def test_a_server_that_takes_no_adapter(fake: Callable[..., FakeEndpoint], tmp_path: Path) -> None:
    server = fake("lora:no", listed=("base",))
    with pytest.raises(ValueError, match=r"to load the adapter in .*cannot load.*: start vLLM with --enable-lora"):
        ask_running(settings(url=server.url, lora=True), examinee(tmp_path), ITEMS, adapter=tmp_path)
    assert server.requests == []
