"""Versions of the packages that decode: frozen with the judge, and the same again whenever it scores."""

from collections.abc import Mapping
from importlib import metadata

from megatron_evolve.eval.engines.settings import CommandServer, EngineSettings, OpenAISettings, TransformersSettings

# transformers takes the two kernels where they are installed, and they round otherwise than its own code.
IN_PROCESS = ("torch", "transformers", "mamba-ssm", "causal-conv1d")
ABSENT = "absent"


def decoding_packages(settings: EngineSettings) -> dict[str, str]:
    """Installed version of each package that moves this engine's completions, `absent` for one that is not there.

    Of a server that runs elsewhere nothing is known here: what it says of itself is asked when it is.
    """
    names: tuple[str, ...] = ()
    if isinstance(settings, TransformersSettings):
        names = IN_PROCESS
    elif isinstance(settings, OpenAISettings) and settings.server is not None:
        names = settings.server.packages if isinstance(settings.server, CommandServer) else ("vllm",)
    return {name: _installed(name) for name in names}


def check_packages(settings: EngineSettings, frozen: Mapping[str, str]) -> None:
    """Raises ValueError unless the packages that decode are those the judge was frozen with."""
    now = decoding_packages(settings)
    for name, version in frozen.items():
        if now.get(name) != version:
            raise ValueError(
                f"expected {name} {version}, with which the judge's engine was frozen, found {now.get(name)}: scores "
                "would not compare; install that version, or freeze a new judge"
            )


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ABSENT
