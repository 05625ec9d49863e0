"""Engine `openai`: the run behind an endpoint that runs already, or behind a server that lives as long as the job.

    export --> start --> ready, serves the run, warm --> items --> drain, stop
                 ^                                         |
                 '------- died or stuck, at most k times --'

A server that is started again is asked only what is not answered yet.
"""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_evolve.eval.engines.command import Place, served_name, server_argv, wanted
from megatron_evolve.eval.engines.conversation import Conversation
from megatron_evolve.eval.engines.endpoint import EndpointGone, require_openai
from megatron_evolve.eval.engines.export import exported, write_adapter, write_model
from megatron_evolve.eval.engines.seam import Answers, Examinee, Prompt
from megatron_evolve.eval.engines.server import ModelServer
from megatron_evolve.eval.engines.settings import ADAPTER, MODEL, OpenAISettings
from megatron_evolve.substrate.puzzles.row import COMPLETION_MARK

LOG_FILE = "server.log"


def ask(settings: OpenAISettings, examinee: Examinee, prompts: Sequence[Prompt]) -> Answers:
    """Every prompt answered by the endpoint. Raises ValueError if it serves another model or leaves an item open."""
    require_openai()
    with ExitStack() as stack:
        if settings.server is None:
            adapter = stack.enter_context(exported(examinee, "adapter", write_adapter)) if settings.lora else None
            return ask_running(settings, examinee, prompts, adapter)
        folders = {}
        for word, name, write in ((MODEL, "model", write_model), (ADAPTER, "adapter", write_adapter)):
            if word in wanted(settings):
                folders[name] = stack.enter_context(exported(examinee, name, write))
        return ask_started(settings, examinee, prompts, Place(run=examinee.name, **folders))


def ask_running(
    settings: OpenAISettings, examinee: Examinee, prompts: Sequence[Prompt], adapter: Path | None = None
) -> Answers:
    """The same of an endpoint that runs already, which is told to load `adapter` where one is given."""
    name = served_name(settings, Place(run=examinee.name))
    conversation = Conversation(settings, name, dict(enumerate(prompts)), adapter, examinee.tell)
    ready = settings.patience.connect_seconds
    try:
        about = asyncio.run(conversation.hold(settings.url, lambda: None, ready, _warm_up(examinee)))
    except EndpointGone as gone:
        raise ValueError(f"{gone}: start the server again, then score the run again") from None
    return _answers(conversation, about)


def ask_started(settings: OpenAISettings, examinee: Examinee, prompts: Sequence[Prompt], place: Place) -> Answers:
    """The same of a server that is started for it, and started again while it may be."""
    spec = settings.server
    conversation = Conversation(settings, served_name(settings, place), dict(enumerate(prompts)), tell=examinee.tell)
    server = ModelServer(
        lambda port: server_argv(settings, place, port),
        examinee.work / LOG_FILE,
        drain_seconds=spec.drain_seconds,
        restarts=spec.restarts,
    )
    with server:
        while True:
            try:
                hold = conversation.hold(server.url, server.ended, spec.start_seconds, _warm_up(examinee))
                about = asyncio.run(hold)
                break
            except EndpointGone as gone:
                server.restart(str(gone))
        conversation.account["restarts"] += server.num_restarts
    return _answers(conversation, about)


def _warm_up(examinee: Examinee) -> Prompt:
    """A prompt that belongs to no item: the mark that every question ends with."""
    tokens = tuple(examinee.tokenizer.encode(COMPLETION_MARK))
    return Prompt(text=COMPLETION_MARK, tokens=tokens, message=COMPLETION_MARK.strip())


def _answers(conversation: Conversation, about: dict[str, str]) -> Answers:
    completions = tuple(conversation.answered[number] for number in range(len(conversation.prompts)))
    return Answers(completions, about, {kind: n for kind, n in sorted(conversation.account.items()) if n})
