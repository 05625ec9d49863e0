"""A conversation with an endpoint: every prompt gets its whole completion, or the job says why not.

Requests are streamed, so that the server's progress is seen while it works. Its token counter (pieces that arrived,
over all requests together) tells a slow server from a stuck one: a request may wait in the server's queue for an hour
as long as others move. The client's own retries are off, since they sleep unseen and know nothing of a stream that
breaks off: here every attempt is counted, and waiting for `Retry-After` is not taken for a server that stands still.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_evolve.eval.engines.endpoint import Endpoint, EndpointGone, Passing, client_of
from megatron_evolve.eval.engines.seam import Completion, Prompt
from megatron_evolve.eval.engines.settings import OpenAISettings

TICK_S = 0.2
WARM_UP = -1  # its number


@dataclass
class Conversation:
    """All that is asked of one run: what was answered so far, over as many servers as it takes."""

    settings: OpenAISettings
    name: str
    prompts: Mapping[int, Prompt]
    adapter: Path | None = None  # to be loaded under the name before anything is asked
    tell: Callable[[int, int], None] = lambda answered, prompts: None
    answered: dict[int, Completion] = field(default_factory=dict)
    account: Counter[str] = field(default_factory=Counter)  # failed attempts by kind

    async def hold(
        self, url: str, ended: Callable[[], str | None], ready_seconds: float, warm_up: Prompt
    ) -> dict[str, str]:
        """Asks the server at `url` what is not answered yet, and returns what it said of itself.

        Before any item: it is up, serves the run under its name, and has answered `warm_up`. Raises EndpointGone, or
        ValueError for what no other server will mend.
        """
        patience = self.settings.patience
        async with client_of(self.settings, url) as client:
            endpoint = Endpoint(client, url, self.name, self.settings, ended)
            deadline = time.monotonic() + ready_seconds
            await endpoint.models(deadline)
            async with endpoint.with_adapter(self.adapter):
                about = await endpoint.introduction(deadline)
                first_s = max(deadline - time.monotonic(), patience.stall_seconds)  # the first token may compile
                await _Asking(self, endpoint, 1, first_s).ask({WARM_UP: warm_up})
                self.answered.pop(WARM_UP)
                left = {number: prompt for number, prompt in self.prompts.items() if number not in self.answered}
                await _Asking(self, endpoint, self.settings.max_new_tokens, patience.stall_seconds).ask(left)
        return about


class _Asking:
    """Some prompts of a conversation, put to one endpoint."""

    def __init__(self, conversation: Conversation, endpoint: Endpoint, max_new_tokens: int, stall_s: float) -> None:
        self._conversation = conversation
        self._endpoint = endpoint
        self._max_new_tokens = max_new_tokens
        self._stall_s = stall_s
        self._in_flight = 0
        self._moved_at = 0.0  # when the token counter last moved, or asking began

    async def ask(self, prompts: Mapping[int, Prompt]) -> None:
        """Puts a completion of every prompt into the conversation, by its number."""
        left = iter(prompts.items())

        async def work() -> None:
            for number, prompt in left:  # shared: each number is taken by one worker
                self._conversation.answered[number] = await self._answer(number, prompt)
                if number != WARM_UP:
                    self._conversation.tell(len(self._conversation.answered), len(self._conversation.prompts))

        at_once = min(self._conversation.settings.concurrency, len(prompts))
        workers = [asyncio.create_task(work()) for _ in range(at_once)]
        everything = asyncio.gather(*workers)
        watch = asyncio.create_task(self._watch())
        try:
            await asyncio.wait({everything, watch}, return_when=asyncio.FIRST_COMPLETED)
            for one in (everything, watch):
                if one.done():
                    one.result()
        finally:
            everything.cancel()
            watch.cancel()
            await asyncio.gather(*workers, everything, watch, return_exceptions=True)

    async def _watch(self) -> None:
        """Raises EndpointGone when the server has ended, or is asked and moves nothing. Never returns."""
        while True:
            await asyncio.sleep(min(TICK_S, self._stall_s / 4))
            if why := self._endpoint.ended():
                raise EndpointGone(why)
            if self._in_flight and time.monotonic() - self._moved_at > self._stall_s:
                raise EndpointGone(
                    f"{self._endpoint.url} is stuck: {self._in_flight} requests are open and no token came for "
                    f"{self._stall_s:g} s"
                )

    async def _answer(self, number: int, prompt: Prompt) -> Completion:
        patience = self._conversation.settings.patience
        for attempt in range(patience.retries + 1):
            try:
                return await self._attempt(prompt)
            except Passing as failure:
                self._conversation.account[failure.kind] += 1
                last = failure
            backoff = min(patience.backoff_seconds * 2**attempt, patience.longest_wait_seconds)
            wait_s = max(last.wait_s, backoff * random.uniform(0.5, 1))  # spread, or all would come back at once
            exhausted = wait_s > patience.longest_wait_seconds or attempt == patience.retries
            # A server that dies drops its connections a moment before it is seen to have ended.
            await asyncio.sleep(TICK_S if exhausted else wait_s)
            if why := self._endpoint.ended():
                raise EndpointGone(why)
            if exhausted:
                break
        what = "the warm-up" if number == WARM_UP else f"item {number + 1} of {len(self._conversation.prompts)}"
        asked = f", and it asks for {last.wait_s:g} s of waiting" if last.wait_s > patience.longest_wait_seconds else ""
        raise ValueError(
            f"{what} has no answer from {self._endpoint.url} after {attempt + 1} attempts; the last one: "
            f"{last}{asked}: look at the server, or give the engine more patience"
        )

    async def _attempt(self, prompt: Prompt) -> Completion:
        if not self._in_flight:
            self._moved()
        self._in_flight += 1
        try:
            return await self._endpoint.attempt(prompt, self._max_new_tokens, self._moved)
        finally:
            self._in_flight -= 1

    def _moved(self) -> None:
        self._moved_at = time.monotonic()
