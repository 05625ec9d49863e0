"""Readiness: whether the judge's engine can answer, asked before anything is trained for it to judge.

    from the files      prompt and answer fit the context, the adapters that a run may have fit the server
    from this machine   the client's package, the key, the server's command, the folder of its base model
    from an endpoint    that it answers, which models it serves, how much room they have

A dry run asks the first: it is true on any machine. The second it only tells (`left_open`), for the campaign may run
on another; and it asks no endpoint, so that it says the same off the network, and nobody hears of it.
"""

import fnmatch
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_evolve.campaign import Campaign
from megatron_evolve.eval.engines.command import shown_argv, takes_adapter
from megatron_evolve.eval.engines.endpoint import EndpointGone, require_key, require_openai, served_now
from megatron_evolve.eval.engines.settings import OpenAISettings, VllmServer
from megatron_evolve.longest_question import longest_question
from megatron_evolve.site import Site
from megatron_evolve.substrate.recipe import Adapter

if TYPE_CHECKING:
    from megatron_evolve.preflight import Expected

ADAPTER_PATH, RANK_PATH = "recipe.adapter", "recipe.adapter.rank"


def check_fits(campaign: Campaign, expected: "Expected") -> None:
    """Raises ValueError for an engine that could not take the runs or the questions of the campaign."""
    engine = campaign.judge.engine
    if not isinstance(engine, OpenAISettings):
        return
    if takes_adapter(engine):
        _check_adapter(campaign, expected.default.recipe.adapter)
    if isinstance(engine.server, VllmServer):
        # Without the option vLLM takes the length that the model's config names.
        room = engine.server.max_model_len or expected.architecture.max_sequence_length
        _check_room(campaign, expected, room, "its vLLM", "raise the server's max_model_len")


def check_ready(campaign: Campaign, site: Site, expected: "Expected", *, resumes: bool) -> None:
    """Raises ValueError unless this machine has what the engine needs, and an endpoint that runs answers as it should.

    It is waited for as long as for a connection; by a campaign that goes on, which an endpoint that is just being
    started again should not end, as long as for any retry. Nothing is written, so the same command goes on after it.
    """
    engine = campaign.judge.engine
    if not isinstance(engine, OpenAISettings):
        return
    _check_machine(engine, site)
    if engine.url is None or _pods_alone_have_the_key(engine, site):
        return
    patience = engine.patience
    try:
        cards = served_now(engine, patience.longest_wait_seconds if resumes else patience.connect_seconds)
    except EndpointGone as gone:
        raise ValueError(
            f"expected the judge's endpoint to answer before anything is trained, but {gone}: start it, or name where "
            "it runs as `endpoint` of the site, and give the same command again"
        ) from None
    rooms = [room for card in cards.values() if (room := getattr(card, "max_model_len", None)) is not None]
    if rooms:
        _check_room(campaign, expected, max(rooms), engine.url, "start the endpoint with a longer context")


def left_open(campaign: Campaign, site: Site) -> list[str]:
    """What a dry run does not ask: what the run itself will, what this machine would answer, what nobody asks."""
    engine, said = campaign.judge.engine, []
    if not isinstance(engine, OpenAISettings):
        return said
    try:
        _check_machine(engine, site)
    except ValueError as refusal:
        said.append(f"From this machine the run itself would be refused: {refusal}.")
    if engine.url is not None and _pods_alone_have_the_key(engine, site):
        said.append(f"Nobody asks {engine.url} before the first scoring job: {engine.api_key_env} is not set here.")
    elif engine.url is not None:
        said.append(f"The run itself first asks {engine.url} which models it serves; a dry run asks nobody.")
    elif site.launcher != "local":
        command = shown_argv(engine)[0]
        said.append(f"Whether {command!r} is there where jobs run is not asked: the first scoring job will tell.")
    return said


def pattern_of(space: Sequence[str], path: str) -> str | None:
    """The pattern of a mutation space by which a delta may change `path`."""
    return next((pattern for pattern in space if fnmatch.fnmatchcase(path, pattern)), None)


# --- from the files --------------------------------------------------------------------------------------------------


def _check_adapter(campaign: Campaign, adapter: Adapter | None) -> None:
    """Raises ValueError unless every run of the campaign has an adapter that the server takes."""
    space, server = campaign.constitution.mutation_space, campaign.judge.engine.server
    if adapter is None:
        raise ValueError(
            f"the judge's engine of campaign {campaign.name} serves a run's adapter, and its substrate's recipe has "
            "none: let the server take the whole model ({model}, or vLLM without a `base`), or freeze a recipe with one"
        )
    if (pattern := pattern_of(space, ADAPTER_PATH)) is not None:
        raise ValueError(
            f"campaign {campaign.name} lets a delta change {ADAPTER_PATH} ({pattern} in constitution.mutation_space) "
            "and so train without one, and its judge's engine serves nothing else: name the settings that may change, "
            "without this one"
        )
    if not isinstance(server, VllmServer):  # whose limit nobody tells
        return
    if adapter.rank > server.max_lora_rank:
        raise ValueError(
            f"the judge's vLLM of campaign {campaign.name} takes adapters of rank {server.max_lora_rank} at most, and "
            f"its runs have rank {adapter.rank}: raise the server's max_lora_rank"
        )
    if (pattern := pattern_of(space, RANK_PATH)) is not None:
        raise ValueError(
            f"campaign {campaign.name} lets a delta raise {RANK_PATH} ({pattern} in constitution.mutation_space), and "
            f"its judge's vLLM takes adapters of rank {server.max_lora_rank} at most: name the settings that may "
            "change, without this one"
        )


def _check_room(campaign: Campaign, expected: "Expected", room: int, whose: str, remedy: str) -> None:
    """Raises ValueError unless the longest question and its answer fit a context of `room` tokens together."""
    longest, answer = longest_question(campaign.judge, expected), campaign.judge.engine.max_new_tokens
    if (longest or 1) + answer > room:
        asked = "any question" if longest is None else f"a question of up to {longest:,}"
        raise ValueError(
            f"the judge of campaign {campaign.name} asks for up to {answer:,} new tokens after {asked}, and {whose} "
            f"has room for {room:,} in all: lower judge.engine.max_new_tokens or {remedy}"
        )


# --- from this machine -----------------------------------------------------------------------------------------------


def _check_machine(engine: OpenAISettings, site: Site) -> None:
    """Raises ValueError for what jobs need and this machine lacks, as far as jobs find here what they will find."""
    require_openai()
    if not _pods_alone_have_the_key(engine, site):
        require_key(engine)
    if engine.server is None or site.launcher != "local":
        return
    command = shown_argv(engine)[0]
    ours = isinstance(engine.server, VllmServer)
    if shutil.which(command) is None:
        raise ValueError(
            f"expected the command {command!r} of the judge's server on this machine, found none: install it, or "
            + ("name its path as `vllm` of the site" if ours else "mend the engine's argv")
        )
    base = engine.server.base if ours else None
    if base is not None and Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(
            f"expected the base model of the judge's server in {base}, found no folder: mend `base`, or the site's "
            "`models`"
        )


def _pods_alone_have_the_key(engine: OpenAISettings, site: Site) -> bool:
    """Whether pods have a Secret in their environment, and this process has not the key that it may hold."""
    secret = site.kubernetes is not None and site.kubernetes.secret is not None
    return secret and engine.api_key_env is not None and not os.environ.get(engine.api_key_env)
