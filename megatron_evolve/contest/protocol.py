"""The protocol of the contest: tune on development surfaces, freeze by digest, run once on held-out ones.

    DIR/attempt.json    phase, digest of the policy's and the contest's sources, size; written when DIR is opened
    DIR/rows.jsonl      one line a finished campaign; what has a line is never run again

A development surface follows from its number. A held-out one follows from the digest too, so that whoever changes a
line of the policy gets other surfaces, and nobody can have tuned on them; its kinds are more than those of development.
Every surface gets two campaigns of each method: what differs between them is chance alone.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_evolve.constitution import Constitution
from megatron_evolve.contest.laboratory import Laboratory, Trained
from megatron_evolve.contest.product import ProductCampaign, Variant, campaign_of
from megatron_evolve.contest.rivals import RIVALS
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

Method = Callable[[Laboratory], Trained]


def _product(variant: Variant, kind: type[ProductCampaign] = ProductCampaign) -> Method:
    return lambda lab: kind(lab, variant, int(lab.rng.integers(1 << 31))).run()


METHODS: dict[str, Method] = {
    PRODUCT: _product(Variant()),
    "no anchor": _product(Variant(anchor=False), UnanchoredCampaign),
    "no dead ends": _product(Variant(dead_ends=False)),
    "no replicates": _product(Variant(replicates=False)),
    **RIVALS,
}


def budget_of(rules: Constitution) -> int:
    """Training runs that every method may use: what the product's own plan takes at most."""
    replicates = campaign_of(Variant()).search.replicates
    explorers = (rules.workers - 1) * replicates.explorer
    return rules.rounds * (rules.anchor_seeds + explorers + replicates.confirm_candidates * replicates.confirm_seeds)


def contest_sources() -> str:
    """Digest of what decides in a campaign and of what draws the contest."""
    return digest_of(policy_sources())


def open_attempt(root: Path, phase: Phase, surfaces: int) -> dict[str, Any]:
    """The attempt in `root`, opened if it is new. Raises ValueError if other code or another size opened it."""
    wanted = {"schema": "contest/1", "phase": phase, "surfaces": surfaces, "code": contest_sources()}
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
        yield number, draw_surface(kinds[number % len(kinds)], *_material(attempt), number)


def _material(attempt: dict[str, Any]) -> tuple[str, ...]:
    return ("held-out", attempt["code"]) if attempt["phase"] == "held-out" else ("development",)


def run_attempt(root: Path, phase: Phase, surfaces: int, methods: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Runs what is missing of an attempt and returns all its rows. Raises ValueError in one sentence."""
    if surfaces < 2:
        raise ValueError(f"expected at least 2 surfaces, got {surfaces}: an interval needs two")
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"expected a method, got {name!r}: choose from {', '.join(METHODS)}")
    chosen = list(methods) or list(METHODS)
    _check_optuna(chosen)
    attempt = open_attempt(root, phase, surfaces)
    with Lock(root / "lock"):
        rows = read_rows(root)
        done = {(row["method"], row["surface"], row["twin"]) for row in rows}
        for number, surface in surfaces_of(attempt):
            for twin in range(TWINS):
                for name in chosen:
                    if (name, number, twin) not in done:
                        rows.append(_append(root, one_campaign(attempt, number, surface, twin, name)))
    return rows


def _check_optuna(chosen: Sequence[str]) -> None:
    if any(name.startswith("TPE") for name in chosen):
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise ValueError(
                "expected optuna, against which this policy is compared, found none: pip install optuna, or name the "
                "methods without TPE"
            ) from None


def one_campaign(attempt: dict[str, Any], number: int, surface: Surface, twin: int, name: str) -> dict[str, Any]:
    """One campaign of one method, as its row."""
    seed = digest_of({"attempt": _material(attempt), "surface": number, "twin": twin, "method": name})
    budget = budget_of(campaign_of(Variant()).constitution)
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


def _append(root: Path, row: dict[str, Any]) -> dict[str, Any]:
    with open(root / ROWS, "ab", buffering=0) as file:
        file.write(json.dumps(row).encode() + b"\n")
    if sys.stderr.isatty():
        print(f"{row['method']}, surface {row['surface']}: {100 * row['gain']:+.1f} pt", file=sys.stderr)
    return row


def result(root: Path) -> dict[str, Any]:
    """An attempt with its rows, as a reader finds it."""
    return {**read_json(root / ATTEMPT), "rows": read_rows(root)}
