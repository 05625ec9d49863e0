"""The command line of a server that the scoring job starts, word for word.

In: the settings, and what only the job knows (`Place`). Out: argv. Nothing is started here.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_evolve.eval.engines.settings import (
    ADAPTER,
    MODEL,
    NAME,
    PORT,
    PYTHON,
    RUN,
    CommandServer,
    OpenAISettings,
    VllmServer,
)


@dataclass(frozen=True)
class Place:
    """What a server is told of the run: its digits, its folder, and its adapter's folder if it has one."""

    run: str
    model: Path | None = None
    adapter: Path | None = None

    def fill(self, text: str, **more: str) -> str:
        """`text` with the words in braces replaced. Raises ValueError for one that this run cannot fill."""
        words = {RUN: self.run, PYTHON: sys.executable, **{f"{{{name}}}": value for name, value in more.items()}}
        for word, folder in ((MODEL, self.model), (ADAPTER, self.adapter)):
            if word in text and folder is None:
                raise ValueError(f"{text!r} asks for {word}, which this run does not have: leave it out")
            words[word] = str(folder)
        for word, value in words.items():
            text = text.replace(word, value)
        return text


def wanted(settings: OpenAISettings) -> set[str]:
    """Which folders of the run the server must be told of: MODEL, ADAPTER or both."""
    server = settings.server
    if isinstance(server, VllmServer):
        return {ADAPTER if server.base is not None else MODEL}
    words = (*server.argv, settings.model)
    return {one for one in (MODEL, ADAPTER) if any(one in word for word in words)}


def takes_adapter(settings: OpenAISettings) -> bool:
    """Whether a run is served as its adapter, so that one without any cannot be."""
    return settings.lora if settings.server is None else ADAPTER in wanted(settings)


def served_name(settings: OpenAISettings, place: Place) -> str:
    """The name that the endpoint must list, and answer under."""
    return place.fill(settings.model)


def server_argv(settings: OpenAISettings, place: Place, port: int | str) -> tuple[str, ...]:
    """The command line of the settings' server for this run."""
    server = settings.server
    if isinstance(server, VllmServer):
        return vllm_argv(server, place, served_name(settings, place), port, settings.concurrency)
    return _command_argv(server, place, served_name(settings, place), port)


def shown_argv(settings: OpenAISettings) -> tuple[str, ...]:
    """The command line of any run's server, with what only its scoring job knows left in braces."""
    return server_argv(settings, Place(RUN, Path(MODEL), Path(ADAPTER)), PORT)


def _command_argv(server: CommandServer, place: Place, name: str, port: int | str) -> tuple[str, ...]:
    return tuple(place.fill(word, **{NAME.strip("{}"): name, PORT.strip("{}"): str(port)}) for word in server.argv)


def vllm_argv(server: VllmServer, place: Place, name: str, port: int | str, concurrency: int) -> tuple[str, ...]:
    """`vllm serve`: of the merged run under its name, or of the base model with the adapter as the LoRA of that name.

    `--generation-config vllm` keeps sampling defaults that a checkpoint may bring out of greedy answers.
    """
    lora = server.base is not None
    argv = [server.executable, "serve", place.fill(server.base if lora else MODEL)]
    argv += ["--host", "127.0.0.1", "--port", str(port)]
    if lora:
        argv += ["--enable-lora", "--lora-modules", f"{name}={place.fill(ADAPTER)}"]
        argv += ["--max-lora-rank", str(server.max_lora_rank), "--max-loras", "1"]
    else:
        argv += ["--served-model-name", name]
    argv += ["--tensor-parallel-size", str(server.tensor_parallel), "--dtype", server.dtype]
    argv += ["--gpu-memory-utilization", f"{server.gpu_memory:g}", "--max-num-seqs", str(concurrency)]
    if server.max_model_len is not None:
        argv += ["--max-model-len", str(server.max_model_len)]
    return (*argv, "--generation-config", "vllm", "--seed", "0", *server.flags)
