"""Readiness: whether the judge's engine can answer, asked before anything is trained for it to judge.

    from the files        prompt and answer fit the context, the adapters that a run may have fit the server
    where jobs run        the client's package, the key, the server's command, the folder of its base model
    from an endpoint      that it answers, which models it serves, how much room they have

A dry run asks the first: it is true on any machine. The second it only tells (`left_open`), for the campaign may run
on another; and it asks no endpoint, so that it says the same off the network. Where jobs run on other hosts the
campaign's first job asks there, by this file's command line:

    python -m megatron_evolve.readiness --engine JSON --out DIR
"""

import argparse
import fnmatch
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_evolve.campaign import Campaign
from megatron_evolve.eval.engines.command import shown_argv, takes_adapter
from megatron_evolve.eval.engines.endpoint import EndpointGone, require_key, require_openai, served_now
from megatron_evolve.eval.engines.settings import OpenAISettings, VllmServer
from megatron_evolve.launch.job import Job
from megatron_evolve.launch.rundir import RunDirError, write_json
from megatron_evolve.longest_question import longest_question
from megatron_evolve.placement import Placement
from megatron_evolve.site import Site
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.recipe import Adapter

if TYPE_CHECKING:
    from megatron_evolve.preflight import Expected

ADAPTER_PATH, RANK_PATH = "recipe.adapter", "recipe.adapter.rank"
READY_FILE = "ready.json"
FIRST_JOB_SECONDS = 900.0  # a shared disk may take minutes to load Python's files


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
    Where jobs run elsewhere an endpoint may be theirs alone to reach: that it does not answer here is told, no more.
    """
    engine = campaign.judge.engine
    if not isinstance(engine, OpenAISettings):
        return
    require_openai()
    if site.launcher == "local":
        _check_place(engine)
    if engine.url is None or not (site.launcher == "local" or _key_is_here(engine)):
        return
    patience, here = engine.patience, site.launcher == "local"
    try:
        cards = served_now(engine, patience.longest_wait_seconds if resumes and here else patience.connect_seconds)
    except EndpointGone as gone:
        if not here:
            print(f"The judge's endpoint does not answer on this machine: {gone}; jobs will ask it", file=sys.stderr)
            return
        elsewhere = "" if resumes else ", or name where it runs as `endpoint` of the site,"  # then it is decided
        raise ValueError(
            f"expected the judge's endpoint to answer before anything is trained, but {gone}: start it{elsewhere} and "
            "give the same command again"
        ) from None
    rooms = [room for card in cards.values() if (room := getattr(card, "max_model_len", None)) is not None]
    if rooms:
        _check_room(campaign, expected, max(rooms), engine.url, "start the endpoint with a longer context")


def left_open(campaign: Campaign, site: Site) -> list[str]:
    """What a dry run does not ask: what this machine would answer, and what the run itself asks first."""
    engine, said = campaign.judge.engine, []
    if not isinstance(engine, OpenAISettings):
        return said
    try:
        require_openai()
        if site.launcher == "local":
            _check_place(engine)
    except ValueError as refusal:
        said.append(f"From this machine the run itself would be refused: {refusal}.")
    if engine.url is not None:
        said.append(f"The run itself first asks {engine.url} which models it serves; a dry run asks nobody.")
    return said


def first_job(campaign: Campaign, site: Site, folder: Path) -> Job | None:
    """The job that asks where jobs run, shaped as those that score; None where that is this machine."""
    engine = campaign.judge.engine
    if not isinstance(engine, OpenAISettings) or site.launcher == "local":
        return None
    # By the settings' digest: a file that is mended before the campaign opens is another question.
    placement, run_dir = Placement.of(campaign, site), (folder / "engine" / digest_of(engine)[:12]).resolve()
    argv = (sys.executable, "-m", "megatron_evolve.readiness", "--engine", json.dumps(engine.model_dump(mode="json")))
    return Job(
        key="engine/ready",
        argv=(*argv, "--out", str(run_dir)),
        run_dir=run_dir,
        time_limit_s=FIRST_JOB_SECONDS,
        done_file=READY_FILE,
        env=placement.environment(trains=False),
        resources=placement.resources(trains=False),
        grace_s=site.grace_seconds,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of that job. Status 0 once the engine has what it needs here; otherwise one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="megatron_evolve.readiness", description=__doc__.splitlines()[0])
    parser.add_argument("--engine", type=json.loads, required=True, help="JSON: settings of an engine `openai`")
    parser.add_argument("--out", type=Path, required=True, help="folder of the job")
    arguments = parser.parse_args(argv)
    try:
        engine = OpenAISettings.parse(arguments.engine, where="engine")
        _check_place(engine)
        models = [] if engine.url is None else sorted(served_now(engine, engine.patience.connect_seconds))
        write_json(arguments.out / READY_FILE, {"models": models})
    except (ValueError, EndpointGone, RunDirError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


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


# --- where jobs run --------------------------------------------------------------------------------------------------


def _check_place(engine: OpenAISettings) -> None:
    """Raises ValueError for what a scoring job needs and would not find on this machine."""
    require_openai()
    require_key(engine)
    if engine.server is None:
        return
    command = shown_argv(engine)[0]
    ours = isinstance(engine.server, VllmServer)
    if shutil.which(command) is None:
        raise ValueError(
            f"expected the command {command!r} of the judge's server on {platform.node()}, found none: install it, or "
            + ("name its path as `vllm` of the site" if ours else "mend the engine's argv")
        )
    base = engine.server.base if ours else None
    if base is not None and Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(
            f"expected the base model of the judge's server in {base}, found no folder: mend `base`, or the site's "
            "`models`"
        )


def _key_is_here(engine: OpenAISettings) -> bool:
    """Whether this process can ask: on a cluster the key may be in the jobs' environment alone."""
    return engine.api_key_env is None or bool(os.environ.get(engine.api_key_env))


if __name__ == "__main__":
    sys.exit(main())
