"""An OpenAI-compatible endpoint: what it says of itself, and one attempt at one prompt.

An attempt ends in a whole completion, in `Passing` (another may succeed), or in a ValueError that no retry will mend.
"""

import asyncio
import contextlib
import email.utils
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
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
PROBE_S = 0.1


class EndpointGone(Exception):
    """The server died, stands still, or never got ready. The message says which; another may be asked what is left."""


class Passing(Exception):
    """An attempt failed in a way that another may not. `wait_s`: what the server asked for."""

    def __init__(self, kind: str, words: str, wait_s: float = 0.0) -> None:
        super().__init__(words)
        self.kind = kind
        self.wait_s = wait_s


class Endpoint:
    """One server under one name. `ended` tells how its process ended, None while it runs or is none of ours."""

    def __init__(
        self, client: "AsyncOpenAI", url: str, name: str, settings: OpenAISettings, ended: Callable[[], str | None]
    ) -> None:
        self.url = url
        self.ended = ended
        self._client = client
        self._name = name
        self._settings = settings
        self._transport_errors = _transport_errors()

    async def models(self, deadline: float) -> Any:
        """The raw list of what it serves, once it is up. Raises EndpointGone if that takes too long."""
        openai = require_openai()
        while True:
            try:
                return await asyncio.wait_for(
                    self._client.models.with_raw_response.list(), max(deadline - time.monotonic(), PROBE_S)
                )
            except (openai.APIConnectionError, openai.APIStatusError, TimeoutError) as error:
                if not passes(getattr(error, "status_code", 503)):
                    raise ValueError(
                        f"expected a list of models at {self.url}/models, got HTTP {error.status_code}: check the url "
                        "and the variable that holds its key"
                    ) from None
                if why := self.ended():
                    raise EndpointGone(f"{why} before it was ready") from None
                if time.monotonic() > deadline:
                    raise EndpointGone(f"{self.url} was not ready in time ({_words(error)})") from None
                await asyncio.sleep(PROBE_S)

    def cards(self, raw: Any) -> dict[str, Any]:
        """What is said of each model of the raw list, by its name. Raises ValueError unless the base is among them."""
        listed = getattr(raw.parse(), "data", None)
        if not isinstance(listed, list):
            raise ValueError(f"expected a list of models at {self.url}/models, got something else: check the url")
        cards, base = {card.id: card for card in listed}, self._settings.base
        # vLLM calls the folder that a model was loaded from its root.
        if base is not None and base not in {*cards, *(getattr(card, "root", None) for card in listed)}:
            raise ValueError(
                f"expected {self.url} to serve {base!r}, it serves {_named(cards)}: start it with that model (vLLM "
                "names it by --served-model-name), or mend the engine's `base`"
            )
        return cards

    async def introduction(self, deadline: float) -> dict[str, str]:
        """What the server says of itself. Raises ValueError if it serves another model."""
        raw = await self.models(deadline)
        cards, name = self.cards(raw), self._name
        if name not in cards:
            raise ValueError(
                f"expected {self.url} to serve {name!r}, it serves {_named(cards)}: load the run there under this "
                "name, or mend the engine's `model`"
            )
        told = {"server": raw.headers.get("server"), "owned_by": getattr(cards[name], "owned_by", None)}
        told["max_model_len"] = getattr(cards[name], "max_model_len", None)
        told["version"] = await self._version()
        return {key: str(value) for key, value in told.items() if value is not None}

    async def _version(self) -> str | None:
        """vLLM and SGLang tell it beside `/v1`; not a part of the protocol, so a server without it is as good."""
        openai = require_openai()
        root = self.url.rstrip("/").removesuffix("/v1")
        try:
            quick = {"timeout": self._settings.patience.connect_seconds}
            told = await self._client.get(f"{root}/version", cast_to=object, options=quick)
        except openai.APIError:
            return None
        return str(told["version"]) if isinstance(told, dict) and "version" in told else None

    @asynccontextmanager
    async def with_adapter(self, folder: Path | None) -> AsyncIterator[None]:
        """The adapter in `folder`, if there is one to load, loaded under the name for as long as it is asked."""
        openai = require_openai()
        if folder is None:
            yield
            return
        await self._unload()  # what a killed job left
        try:
            body = {"lora_name": self._name, "lora_path": str(folder)}
            await self._tell("load", body, self._settings.patience.request_seconds)
        except openai.APIError as error:
            raise ValueError(
                f"expected {self.url} to load the adapter in {folder}, got {_words(error)}: start vLLM with "
                "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True on a machine that sees this folder"
            ) from None
        try:
            yield
        finally:
            await self._unload()

    async def _unload(self) -> None:
        """Nothing depends on it: a name that stays loaded is unloaded before it is loaded again."""
        openai = require_openai()
        with contextlib.suppress(openai.APIError):
            await self._tell("unload", {"lora_name": self._name}, self._settings.patience.connect_seconds)

    async def _tell(self, verb: str, body: dict[str, str], limit_s: float) -> None:
        await self._client.post(f"/{verb}_lora_adapter", cast_to=object, body=body, options={"timeout": limit_s})

    async def attempt(self, prompt: Prompt, max_new_tokens: int, moved: Callable[[], None]) -> Completion:
        """One completion of one prompt; `moved` is called with every piece that comes."""
        openai = require_openai()
        try:
            async with asyncio.timeout(self._settings.patience.request_seconds):
                return await self._read(await self._send(prompt, max_new_tokens), moved)
        except openai.APIStatusError as error:
            raise self._of_status(error) from None
        except TimeoutError:
            limit = self._settings.patience.request_seconds
            raise Passing("timeout", f"it took longer than {limit:g} s") from None
        except (openai.APIConnectionError, *self._transport_errors) as error:
            raise Passing("connection", _words(error)) from None
        except openai.APIError as error:
            raise Passing("server error", f"an error in the middle of the stream ({error.message})") from None
        except json.JSONDecodeError as error:
            raise Passing("truncated", f"the stream broke off ({_words(error)})") from None

    async def _send(self, prompt: Prompt, max_new_tokens: int) -> Any:
        settings = self._settings
        common = {
            "model": self._name,
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

    async def _read(self, stream: Any, moved: Callable[[], None]) -> Completion:
        """The whole stream. An end without a reason or without its count of tokens is a stream that was cut."""
        texts, reason, num_tokens = [], None, None
        async for chunk in stream:
            moved()
            if chunk.model != self._name:
                raise ValueError(
                    f"expected answers of {self._name!r} from {self.url}, got one of {chunk.model!r}: it "
                    "serves another model now; load the run there again"
                )
            for choice in chunk.choices or ():
                texts.append((choice.delta.content if self._settings.prompt == "chat" else choice.text) or "")
                reason = choice.finish_reason or reason
            if getattr(chunk, "usage", None) is not None:
                num_tokens = chunk.usage.completion_tokens
        if reason is None or num_tokens is None:
            missing = "a finish reason" if reason is None else "its count of tokens"
            raise Passing("truncated", f"the stream ended without {missing}")
        if reason not in ("stop", "length"):
            raise Passing("server error", f"the completion ended for the reason {reason!r}")
        truncated = reason == "length"
        # Servers count the end token, which no text holds; we don't.
        return Completion("".join(texts), num_tokens if truncated else max(0, num_tokens - 1), truncated)

    def _of_status(self, error: Any) -> Exception:
        status = error.status_code
        if passes(status):
            return Passing(f"HTTP {status}", f"HTTP {status}", retry_after(error.response.headers.get("retry-after")))
        return ValueError(
            f"{self.url} refuses the judge's requests with HTTP {status} ({_words(error)}): mend the engine's settings"
        )


def served_now(settings: OpenAISettings, within_s: float) -> dict[str, Any]:
    """What the endpoint at the settings' `url` says of each model that it serves, by name, before a run is there.

    Raises EndpointGone where it has not answered within so many seconds, ValueError for what waiting will not mend.
    """

    async def ask() -> dict[str, Any]:
        async with client_of(settings, settings.url) as client:
            endpoint = Endpoint(client, settings.url, settings.model, settings, lambda: None)
            return endpoint.cards(await endpoint.models(time.monotonic() + within_s))

    return asyncio.run(ask())


def client_of(settings: OpenAISettings, url: str) -> "AsyncOpenAI":
    """The client of an endpoint. Raises ValueError if the package or the key is not there."""
    openai = require_openai()
    return openai.AsyncOpenAI(
        base_url=url,
        api_key=require_key(settings),
        max_retries=0,
        timeout=openai.Timeout(None, connect=settings.patience.connect_seconds),
        # No proxy stands between a machine and itself, whatever its environment says of proxies.
        http_client=openai.DefaultAsyncHttpxClient(trust_env=urlsplit(url).hostname not in LOOPBACK),
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


def require_key(settings: OpenAISettings) -> str:
    """The endpoint's key, `none` where it takes none. Raises ValueError where its variable is not set."""
    if settings.api_key_env is None:
        return NO_KEY
    key = os.environ.get(settings.api_key_env)
    if not key:
        raise ValueError(
            f"expected the endpoint's key in the environment variable {settings.api_key_env}, it is not set: set it "
            "where the scoring job runs"
        )
    return key


def _named(cards: dict[str, Any]) -> str:
    return ", ".join(sorted(cards)) or "nothing"


def _transport_errors() -> tuple[type[Exception], ...]:
    """What a stream raises when its connection breaks: of httpx, or of httpx2 which the client uses from version 3."""
    loaded = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    return tuple(module.HTTPError for module in loaded)


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200] or type(error).__name__
    cause = " ".join(str(error.__cause__).split())[:200] if error.__cause__ else ""
    return f"{text} {cause}".strip().rstrip(".")
