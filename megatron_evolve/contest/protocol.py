"""The protocol of the contest: tune on development surfaces, freeze by digest, run once on held-out ones.

    DIR/attempt.json    phase, size, digests of the policy's and the contest's sources and of the demo, whose settings
                        the policy takes; written when DIR is opened
    DIR/rows.jsonl      one line a finished campaign; what has a line is never run again

A development surface follows from its number. A held-out one follows from both digests too, so that whoever changes a
line or a setting of the policy gets other surfaces, and nobody can have tuned on them; its kinds are more than those of
development.
Every surface gets two campaigns of each method: what differs between them is chance alone.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_evolve.campaign import Campaign
from megatron_evolve.contest.laboratory import Laboratory
from megatron_evolve.contest.product import ProductCampaign, Variant
from megatron_evolve.contest.rivals import RIVALS
from megatron_evolve.contest.space import Lab, demo
from megatron_evolve.contest.surface import FAMILIES, KINDS, ORIGIN, Kind, Surface, draw_surface
from megatron_evolve.contest.unanchored import UnanchoredCampaign
from megatron_evolve.eval.seeds import weight_vector
from megatron_evolve.launch.rundir import Lock, make_folder, read_json, write_json
from megatron_evolve.sources import policy_sources
from megatron_evolve.substrate.digest import digest_of

Phase = Literal["development", "held-out"]
DEVELOPMENT_KINDS: tuple[Kind, ...] = ("no-shift", "cue")
TWINS = 2
ATTEMPT, ROWS = "attempt.json", "rows.jsonl"
PRODUCT = "this policy"

Method = Callable[[Lab], Any]


@dataclass(frozen=True)
class Product:
    """The product, or a variant of it, as a method."""

    variant: Variant
    kind: type[ProductCampaign] = ProductCampaign

    def open(self, lab: Lab) -> ProductCampaign:
        """The campaign before its first round."""
        return self.kind(lab, self.variant, int(lab.rng.integers(1 << 31)))

    def __call__(self, lab: Lab) -> Any:
        return self.open(lab).run()


METHODS: dict[str, Method] = {
    PRODUCT: Product(Variant()),
    "no anchor": Product(Variant(anchor=False), UnanchoredCampaign),
    "no dead ends": Product(Variant(dead_ends=False)),
    "no replicates": Product(Variant(replicates=False)),
    **RIVALS,
}


def budget_of(campaign: Campaign) -> int:
    """Training runs that every method may use: what the product's own plan takes at most."""
    rules, replicates = campaign.constitution, campaign.search.replicates
    explorers = (rules.workers - 1) * replicates.explorer
    return rules.rounds * (rules.anchor_seeds + explorers + replicates.confirm_candidates * replicates.confirm_seeds)


def contest_sources() -> str:
    """Digest of what decides in a campaign and of what draws the contest."""
    return digest_of(policy_sources())


def open_attempt(root: Path, phase: Phase, surfaces: int) -> dict[str, Any]:
    """The attempt in `root`, opened if it is new. Raises ValueError if other code, settings or size opened it."""
    wanted = {"schema": "contest/1", "phase": phase, "surfaces": surfaces}
    return open_folder(root, {**wanted, "code": contest_sources(), "base": digest_of(demo())})


def open_folder(root: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The attempt that a folder holds, opened if it is new. Raises ValueError in one sentence if it is another one."""
    path = root / ATTEMPT
    make_folder(root)
    if not path.exists():
        write_json(path, wanted)
    found = read_json(path)
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{root} holds an attempt with {name} {str(found.get(name))[:12]}, now it is {str(value)[:12]}: a "
                "frozen policy is run once; check out the code that opened it, or open another folder and count it as "
                "a further attempt"
            )
    return found


def surfaces_of(attempt: dict[str, Any]) -> Iterator[tuple[int, Surface]]:
    """The attempt's surfaces, each kind in turn."""
    held_out = attempt["phase"] == "held-out"
    kinds = KINDS if held_out else DEVELOPMENT_KINDS
    for number in range(attempt["surfaces"]):
        yield number, draw_surface(kinds[number % len(kinds)], *material_of(attempt), number)


def material_of(attempt: dict[str, Any]) -> tuple[str, ...]:
    """What an attempt's seeds follow from: of a held-out one, the code and the settings."""
    return ("held-out", attempt["code"], attempt["base"]) if attempt["phase"] == "held-out" else ("development",)


def run_attempt(root: Path, phase: Phase, surfaces: int, methods: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Runs what is missing of an attempt and returns all its rows. Raises ValueError in one sentence."""
    if surfaces < 2:
        raise ValueError(f"expected at least 2 surfaces, got {surfaces}: an interval needs two")
    chosen = chosen_methods(methods, list(METHODS))
    attempt = open_attempt(root, phase, surfaces)
    with Lock(root / "lock"):
        rows = read_rows(root)
        require_optuna(unfinished(chosen, rows, surfaces * TWINS))
        done = {(row["method"], row["surface"], row["twin"]) for row in rows}
        for number, surface in surfaces_of(attempt):
            for twin in range(TWINS):
                for name in chosen:
                    if (name, number, twin) not in done:
                        rows.append(append_row(root, one_campaign(attempt, number, surface, twin, name)))
                        if sys.stderr.isatty():
                            print(f"{name}, surface {number}: {100 * rows[-1]['gain']:+.1f} pt", file=sys.stderr)
    return rows


def chosen_methods(named: Sequence[str], usual: Sequence[str]) -> list[str]:
    """The methods named, or the usual ones. Raises ValueError for an unknown one."""
    for name in named:
        if name not in METHODS:
            raise ValueError(f"expected a method, got {name!r}: choose from {', '.join(METHODS)}")
    return list(named or usual)


def unfinished(chosen: Sequence[str], rows: Sequence[dict[str, Any]], campaigns: int) -> list[str]:
    """Of the methods chosen those that have fewer rows than an attempt has campaigns of each."""
    found = Counter(row["method"] for row in rows)
    return [name for name in chosen if found[name] < campaigns]


def require_optuna(methods: Sequence[str]) -> None:
    """Raises ValueError where one of these methods is Optuna's and Optuna is missing."""
    if any(name.startswith("TPE") for name in methods):
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise ValueError(
                "expected optuna, against which this policy is compared, found none: pip install optuna, or name the "
                "methods without TPE"
            ) from None


def one_campaign(attempt: dict[str, Any], number: int, surface: Surface, twin: int, name: str) -> dict[str, Any]:
    """One campaign of one method, as its row."""
    seed = digest_of({"attempt": material_of(attempt), "surface": number, "twin": twin, "method": name})
    budget = budget_of(demo())
    lab = Laboratory(surface, np.random.default_rng(int(seed[:16], 16)), budget)
    start = time.process_time()
    shipped = METHODS[name](lab)
    sealed, again = lab.sealed(shipped)
    origin = surface.learnt(ORIGIN)
    dev_weights = weight_vector(surface.dev_weights, FAMILIES)
    dev_gain = (surface.accuracies(shipped.learnt)[0] - surface.accuracies(origin)[0]) @ dev_weights
    return {
        "method": name,
        "surface": number,
        "kind": surface.kind,
        "twin": twin,
        "gain": sealed - surface.external_score(origin),
        "again": again - surface.external_score(origin),
        "dev_gain": float(dev_gain),
        "runs": lab.runs,
        "looks": lab.looks,
        "cpu_seconds": lab.seconds,
        "own_cpu_seconds": time.process_time() - start,
    }


def read_rows(root: Path) -> list[dict[str, Any]]:
    """The rows of an attempt; a last line that a crash cut off is dropped, and its campaign run again."""
    path = root / ROWS
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def append_row(root: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Adds a finished campaign's line and returns it as a reader finds it."""
    line = json.dumps(row).encode()
    with open(root / ROWS, "ab", buffering=0) as file:
        file.write(line + b"\n")
    return json.loads(line)


def result(root: Path) -> dict[str, Any]:
    """An attempt with its rows, as a reader finds it."""
    return {**read_json(root / ATTEMPT), "rows": read_rows(root)}
