"""An OpenAI-compatible endpoint that is asked: every prompt gets its whole completion, or the job says why not.

Requests are streamed, so that the server's progress is seen while it works. Its token counter (pieces that arrived,
over all requests together) tells a slow server from a stuck one: a request may wait in the server's queue for an hour
as long as others move. The client's own retries are off, since they sleep unseen and know nothing of a stream that
breaks off: here every attempt is counted, and waiting for `Retry-After` is not taken for a server that stands still.
"""

import asyncio
import email.utils
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from megatron_evolve.eval.engines.seam import Completion, Prompt
from megatron_evolve.eval.engines.settings import OpenAISettings

if TYPE_CHECKING:
    from openai import AsyncOpenAI

# Beside every 5xx: request timeout, conflict, too early, too many requests.
PASSING_STATUSES = frozenset({408, 409, 425, 429})
LOOPBACK = ("127.0.0.1", "localhost", "::1")
NO_KEY = "none"  # the client wants one even where the server does not
TICK_S = 0.2
PROBE_S = 0.1


class EndpointGone(Exception):
    """The server died, stands still, or never got ready. The message says which; another may be asked what is left."""


class _Passing(Exception):
    """An attempt failed in a way that another may not. `wait_s`: what the server asked for."""

    def __init__(self, kind: str, words: str, wait_s: float = 0.0) -> None:
        super().__init__(words)
        self.kind = kind
        self.wait_s = wait_s


@dataclass
class Conversation:
    """All that is asked of one run: what was answered so far, over as many servers as it takes."""

    settings: OpenAISettings
    name: str
    prompts: Mapping[int, Prompt]
    adapter: Path | None = None  # to be loaded under the name before anything is asked
    answered: dict[int, Completion] = field(default_factory=dict)
    account: Counter[str] = field(default_factory=Counter)  # failed attempts by kind

    async def hold(self, url: str, ended: Callable[[], str | None], ready_seconds: float, warm_up: Prompt) -> dict:
        """Asks the server at `url` what is not answered yet, and returns what it said of itself.

        Before any item: it is up, serves the run under its name, and has answered `warm_up`. Raises EndpointGone, or
        ValueError for what no other server will mend.
        """
        openai = require_openai()
        patience = self.settings.patience
        client = openai.AsyncOpenAI(
            base_url=url,
            api_key=_key(self.settings),
            max_retries=0,
            timeout=openai.Timeout(None, connect=patience.connect_seconds),
            # No proxy stands between a machine and itself, whatever its environment says of proxies.
            http_client=openai.DefaultAsyncHttpxClient(trust_env=urlsplit(url).hostname not in LOOPBACK),
        )
        async with client:
            line = _Line(client, url, self, ended)
            deadline = time.monotonic() + ready_seconds
            await line.models(deadline)
            async with line.adapter():
                about = await line.introduction(deadline)
                first_s = max(deadline - time.monotonic(), patience.stall_seconds)  # the first token may compile
                await line.ask({-1: warm_up}, max_new_tokens=1, stall_s=first_s)
                self.answered.pop(-1)
                left = {number: prompt for number, prompt in self.prompts.items() if number not in self.answered}
                await line.ask(left, max_new_tokens=self.settings.max_new_tokens, stall_s=patience.stall_seconds)
        return about


class _Line:
    """One server's share of a conversation."""

    def __init__(
        self, client: "AsyncOpenAI", url: str, conversation: Conversation, ended: Callable[[], str | None]
    ) -> None:
        self._client = client
        self._url = url
        self._conversation = conversation
        self._settings = conversation.settings
        self._ended = ended
        self._in_flight = 0
        self._moved = 0.0  # when the token counter last moved, or asking began
        self._transport_errors = _transport_errors()

    # --- before any item ----------------------------------------------------------------------------------------------

    async def models(self, deadline: float) -> Any:
        """The raw list of what it serves, once it is up. Raises EndpointGone if that takes too long."""
        openai = require_openai()
        while True:
            try:
                return await asyncio.wait_for(
                    self._client.models.with_raw_response.list(), max(deadline - time.monotonic(), TICK_S)
                )
            except (openai.APIConnectionError, openai.APIStatusError, TimeoutError) as error:
                if not passes(getattr(error, "status_code", 503)):
                    raise ValueError(
                        f"expected a list of models at {self._url}/models, got HTTP {error.status_code}: check the url "
                        "and the variable that holds its key"
                    ) from None
                if why := self._ended():
                    raise EndpointGone(f"{why} before it was ready") from None
                if time.monotonic() > deadline:
                    raise EndpointGone(f"{self._url} was not ready in time ({_words(error)})") from None
                await asyncio.sleep(PROBE_S)

    async def introduction(self, deadline: float) -> dict[str, str]:
        """What the server says of itself. Raises ValueError if it serves another model."""
        raw = await self.models(deadline)
        listed = getattr(raw.parse(), "data", None)
        if not isinstance(listed, list):
            raise ValueError(f"expected a list of models at {self._url}/models, got something else: check the url")
        cards = {card.id: card for card in listed}
        name = self._conversation.name
        if name not in cards:
            raise ValueError(
                f"expected {self._url} to serve {name!r}, it serves {', '.join(sorted(cards)) or 'nothing'}: load the "
                "run there under this name, or mend the engine's `model`"
            )
        told = {"server": raw.headers.get("server"), "owned_by": getattr(cards[name], "owned_by", None)}
        told["max_model_len"] = getattr(cards[name], "max_model_len", None)
        told["version"] = await self._version()
        return {key: str(value) for key, value in told.items() if value is not None}

    async def _version(self) -> str | None:
        """vLLM and SGLang tell it beside `/v1`; not a part of the protocol, so a server without it is as good."""
        openai = require_openai()
        root = self._url.rstrip("/").removesuffix("/v1")
        try:
            quick = {"timeout": self._settings.patience.connect_seconds}
            told = await self._client.get(f"{root}/version", cast_to=object, options=quick)
        except openai.APIError:
            return None
        return str(told["version"]) if isinstance(told, dict) and "version" in told else None

    @asynccontextmanager
    async def adapter(self) -> AsyncIterator[None]:
        """The run's adapter, if there is one to load, loaded under its name for as long as it is asked."""
        openai, folder, name = require_openai(), self._conversation.adapter, self._conversation.name
        if folder is None:
            yield
            return
        await self._unload()  # of a job that was killed
        try:
            await self._tell("load", {"lora_name": name, "lora_path": str(folder)})
        except openai.APIError as error:
            raise ValueError(
                f"expected {self._url} to load the adapter in {folder}, got {_words(error)}: start vLLM with "
                "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True on a machine that sees this folder"
            ) from None
        try:
            yield
        finally:
            if not await self._unload():
                self._conversation.account["adapter not unloaded"] += 1

    async def _unload(self) -> bool:
        openai = require_openai()
        try:
            await self._tell("unload", {"lora_name": self._conversation.name})
        except openai.APIError:
            return False
        return True

    async def _tell(self, verb: str, body: dict[str, str]) -> None:
        limit = {"timeout": self._settings.patience.request_seconds}
        await self._client.post(f"/{verb}_lora_adapter", cast_to=object, body=body, options=limit)

    # --- the items ----------------------------------------------------------------------------------------------------

    async def ask(self, prompts: Mapping[int, Prompt], *, max_new_tokens: int, stall_s: float) -> None:
        """Puts a completion of every prompt into the conversation, by its number."""
        left = iter(prompts.items())

        async def work() -> None:
            for number, prompt in left:  # shared: each number is taken by one worker
                self._conversation.answered[number] = await self._answer(number, prompt, max_new_tokens)

        workers = [asyncio.create_task(work()) for _ in range(min(self._settings.concurrency, len(prompts)))]
        everything = asyncio.gather(*workers)
        watch = asyncio.create_task(self._watch(stall_s))
        try:
            await asyncio.wait({everything, watch}, return_when=asyncio.FIRST_COMPLETED)
            for one in (everything, watch):
                if one.done():
                    one.result()
        finally:
            everything.cancel()
            watch.cancel()
            await asyncio.gather(*workers, everything, watch, return_exceptions=True)

    async def _watch(self, stall_s: float) -> None:
        """Raises EndpointGone when the server has ended, or is asked and moves nothing. Never returns."""
        while True:
            await asyncio.sleep(min(TICK_S, stall_s / 4))
            if why := self._ended():
                raise EndpointGone(why)
            if self._in_flight and time.monotonic() - self._moved > stall_s:
                raise EndpointGone(
                    f"{self._url} is stuck: {self._in_flight} requests are open and no token came for {stall_s:g} s"
                )

    async def _answer(self, number: int, prompt: Prompt, max_new_tokens: int) -> Completion:
        patience = self._settings.patience
        for attempt in range(patience.retries + 1):
            try:
                return await self._attempt(prompt, max_new_tokens)
            except _Passing as failure:
                self._conversation.account[failure.kind] += 1
                last = failure
            backoff = min(patience.backoff_seconds * 2**attempt, patience.longest_wait_seconds)
            wait_s = max(last.wait_s, backoff * random.uniform(0.5, 1))  # spread, or all would come back at once
            exhausted = wait_s > patience.longest_wait_seconds or attempt == patience.retries
            # A server that dies drops its connections a moment before it is seen to have ended.
            await asyncio.sleep(TICK_S if exhausted else wait_s)
            if why := self._ended():
                raise EndpointGone(why)
            if exhausted:
                break
        what = "the warm-up" if number < 0 else f"item {number + 1} of {len(self._conversation.prompts)}"
        asked = f", and it asks for {last.wait_s:g} s of waiting" if last.wait_s > patience.longest_wait_seconds else ""
        raise ValueError(
            f"{what} has no answer from {self._url} after {attempt + 1} attempts; the last one: {last}{asked}: look at "
            "the server, or give the engine more patience"
        )

    async def _attempt(self, prompt: Prompt, max_new_tokens: int) -> Completion:
        openai = require_openai()
        if not self._in_flight:
            self._moved = time.monotonic()
        self._in_flight += 1
        try:
            async with asyncio.timeout(self._settings.patience.request_seconds):
                return await self._read(await self._send(prompt, max_new_tokens))
        except openai.APIStatusError as error:
            raise self._of_status(error) from None
        except TimeoutError:
            limit = self._settings.patience.request_seconds
            raise _Passing("timeout", f"it took longer than {limit:g} s") from None
        except (openai.APIConnectionError, *self._transport_errors) as error:
            raise _Passing("connection", _words(error)) from None
        except openai.APIError as error:
            raise _Passing("server error", f"an error in the middle of the stream ({error.message})") from None
        except json.JSONDecodeError as error:
            raise _Passing("truncated", f"the stream broke off ({_words(error)})") from None
        finally:
            self._in_flight -= 1

    async def _send(self, prompt: Prompt, max_new_tokens: int) -> Any:
        settings = self._settings
        common = {
            "model": self._conversation.name,
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "extra_body": dict(settings.extra),
        }
        if settings.prompt == "chat":
            messages = [{"role": "user", "content": prompt.message}]
            return await self._client.chat.completions.create(messages=messages, **common)
        text = list(prompt.tokens) if settings.prompt == "tokens" else prompt.text
        return await self._client.completions.create(prompt=text, **common)

    async def _read(self, stream: Any) -> Completion:
        """The whole stream. An end without a reason or without its count of tokens is a stream that was cut."""
        texts, reason, num_tokens = [], None, None
        async for chunk in stream:
            self._moved = time.monotonic()
            if chunk.model != self._conversation.name:
                raise ValueError(
                    f"expected answers of {self._conversation.name!r} from {self._url}, got one of {chunk.model!r}: it "
                    "serves another model now; load the run there again"
                )
            for choice in chunk.choices or ():
                texts.append((choice.delta.content if self._settings.prompt == "chat" else choice.text) or "")
                reason = choice.finish_reason or reason
            if getattr(chunk, "usage", None) is not None:
                num_tokens = chunk.usage.completion_tokens
        if reason is None or num_tokens is None:
            missing = "a finish reason" if reason is None else "its count of tokens"
            raise _Passing("truncated", f"the stream ended without {missing}")
        if reason not in ("stop", "length"):
            raise _Passing("server error", f"the completion ended for the reason {reason!r}")
        truncated = reason == "length"
        # Servers count the end token, which no text holds; we don't.
        return Completion("".join(texts), num_tokens if truncated else max(0, num_tokens - 1), truncated)

    def _of_status(self, error: Any) -> Exception:
        status = error.status_code
        if passes(status):
            return _Passing(f"HTTP {status}", f"HTTP {status}", retry_after(error.response.headers.get("retry-after")))
        return ValueError(
            f"{self._url} refuses the judge's requests with HTTP {status} ({_words(error)}): mend the engine's settings"
        )


def passes(status: int) -> bool:
    """Whether the same request may well succeed later."""
    return status in PASSING_STATUSES or status >= 500


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for: a number, or a date (RFC 9110, 10.2.3). 0 for none or nonsense."""
    if header is None:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0


def require_openai() -> Any:
    """The client package. Raises ValueError with the remedy where it is not installed."""
    try:
        import openai
    except ImportError:
        raise ValueError(
            "engine openai needs the package openai, which is not installed: pip install 'megatron-evolve[llm]'"
        ) from None
    return openai


def _key(settings: OpenAISettings) -> str:
    if settings.api_key_env is None:
        return NO_KEY
    key = os.environ.get(settings.api_key_env)
    if not key:
        raise ValueError(
            f"expected the endpoint's key in the environment variable {settings.api_key_env}, it is not set: set it "
            "where the scoring job runs"
        )
    return key


def _transport_errors() -> tuple[type[Exception], ...]:
    """What a stream raises when its connection breaks: of httpx, or of httpx2 which the client uses from version 3."""
    loaded = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    return tuple(module.HTTPError for module in loaded)


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200] or type(error).__name__
    cause = " ".join(str(error.__cause__).split())[:200] if error.__cause__ else ""
    return f"{text} {cause}".strip().rstrip(".")
