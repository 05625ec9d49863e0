"""A tiny campaign: the demo's in everything but size. Its ground, its settings, and the command line that runs it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

import megatron_evolve
from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.audit import open_record
from megatron_evolve.campaign import load_campaign
from megatron_evolve.facts import RoundFacts, round_facts
from megatron_evolve.prepare import judge_folder
from megatron_evolve.substrate.manifest import read_manifest

ABSENT = str(Path(__file__).with_name("absent"))
COMMAND = (sys.executable, "-m", "megatron_evolve.cli")
COMMAND_SECONDS = 600  # a loaded machine; 40 on an idle one
FAMILIES = ("numeral", "gravity", "unit_conversion", "cipher", "bit_manipulation", "equation")

# A worker's program: it keeps what it was asked, so the number of briefs kept before is the attempt.
WORKER = """
import json, os, signal, sys
from pathlib import Path
brief, reply = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
from megatron_evolve.workers.brief import Brief
digest = Brief.parse(brief, where="brief").digest
base = {{"substrate": brief["substrate"]["digest"], "recipe": f"policy/{{brief['policy']['round']}}"}}
def answer(change):
    delta = {{"schema": "delta/1", "base": base, "hypothesis": "Try it.", "change": change}}
    reply.write_text(json.dumps({{"schema": "proposal/1", "brief": digest, "delta": delta}}))
asked = Path({asked!r})
calls = len(asked.read_text()) if asked.exists() else 0
asked.write_text("x" * (calls + 1))
{body}
"""


def environment(**more: str) -> dict[str, str]:
    """The environment of the loop's processes: this package first, one thread each, no pandas."""
    checkout = str(Path(megatron_evolve.__file__).resolve().parent.parent)
    path = os.pathsep.join(part for part in (more.pop("first", ""), ABSENT, checkout) if part)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", **more}


@dataclass(frozen=True)
class Ground:
    """A tiny substrate, a store, and a campaign file on them."""

    root: Path

    substrate = property(lambda self: self.root / "substrate")
    store = property(lambda self: self.root / "store")
    file = property(lambda self: self.root / "tiny.yaml")
    finished = property(lambda self: self.root / "finished")  # the campaign, run once without interruption

    @property
    def judge(self) -> Path:
        """The judge of the campaign in the file. Tests with settings of their own put others beside it."""
        spec = load_campaign(self.file).judge
        return judge_folder(spec, read_manifest(self.substrate), self.store, packed=False).parent

    def settings(self) -> dict[str, Any]:
        """The campaign as it is written in its file."""
        return yaml.safe_load(self.file.read_text())

    def arguments(self, folder: Path, *more: str, file: Path | None = None) -> tuple[str, ...]:
        """The command that runs a campaign on this ground in `folder`."""
        return (*COMMAND, "run", str(file or self.file), "--dir", str(folder), "--store", str(self.store), *more)

    def run(self, folder: Path, *more: str, file: Path | None = None, **env: str) -> subprocess.CompletedProcess:
        """Runs a campaign to its end, or to where it stops."""
        return command(*self.arguments(folder, *more, file=file)[len(COMMAND) :], **env)


def command(*words: object, **env: str) -> subprocess.CompletedProcess:
    """Runs `megatron-evolve` with these words and waits for it."""
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        env=environment(**env),
        capture_output=True,
        text=True,
        check=False,
        timeout=COMMAND_SECONDS,
        stdin=subprocess.DEVNULL,
    )


def suite(seed: int, items: dict[str, int], **weight: Any) -> dict[str, Any]:
    """A generated suite of all families, equation as given."""
    families: dict[str, Any] = {name: {"weight": 1} for name in FAMILIES}
    families["equation"] |= weight
    return {
        "kind": "generated",
        "difficulty": "nano",
        "seed": seed,
        "families": families,
        "items_per_family": items,
    }


def settings_on(substrate: Path) -> dict[str, Any]:
    """A campaign of two rounds with two explorers."""
    return {
        "schema": "campaign/1",
        "name": "tiny",
        "claim": "performance",
        "comparator": "origin",
        "seed": 20260620,
        "open_final": "at-end",
        "substrate": {"path": str(substrate)},
        "judge": {
            "secret": "a-secret-of-the-tests-only",
            "origin_seeds": 8,
            "engine": {"max_new_tokens": 8, "batch_size": 256},
            "dev": suite(1, {"dev-a": 10, "dev-b": 10}, weight=5, cue_rate=0.9),
            "external": suite(2, {"external-a": 5, "external-b": 5, "final": 10}),
        },
        "constitution": {
            "rounds": 2,
            "workers": 3,
            "anchor_seeds": 2,
            "external_looks": 12,
            "promote_probability": 0.51,  # so that chance promotes something, and the end has two sides to compare
            "limits": {"max_steps": 20},
        },
        "search": {"replicates": {"explorer": 1, "confirm_candidates": 1, "confirm_seeds": 1}},
        "launch": {"cores": 2},
    }


def build_tiny(folder: Path) -> None:
    """Freezes a substrate of a few seconds: the nano preset after sixty small steps. It has learnt next to nothing."""
    from megatron_evolve.substrate.build import NANO, build_substrate
    from megatron_evolve.substrate.recipe import Recipe

    long = NANO.pretraining.replace(steps=60, warmup_steps=5, batch_size=32)
    short = Recipe(lr=3e-3, steps=8, warmup_steps=1, batch_size=16)
    build_substrate(replace(NANO, pretraining=long, tuning=short), folder, 0, {"equation": 0.9})


def events(folder: Path) -> list[dict[str, Any]]:
    """The events of a campaign's ledger."""
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_bytes().splitlines()]


def facts_of(root: Path, number: int) -> RoundFacts:
    """What a round of a campaign left behind."""
    record = open_record(root)
    return round_facts(CampaignFolder(root), record.events, record.campaign.seed, number)
