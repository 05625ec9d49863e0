"""Leakage of a campaign: was an item of its judge trained on? A gate for people, asked by `verify-eval DIR`.

    python -m megatron_evolve.leaks DIR

Every row that the substrate's weights, the origin and the campaign's runs were trained on is drawn again, as the
trainer drew it, and compared by canonical rule instance with every item that the campaign asked, and with all rows of a
CSV, sealed ones included. A target that tells scores alone shows no item to compare, and that is said. This is a
process of the judge's side: it opens the target as scoring does, tells counts and the ids of items, and no prompt or
answer leaves it. A run that stopped early trained on fewer rows than are drawn here.

Rows of a CSV are withheld from training (`eval/freeze.py`). Items of a generated suite are not: they are drawn by the
same generators under a secret, so a row equals one by chance alone. At challenge difficulty 40,000 rows of each family
held one such pair among 4.8 billion.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.candidate import Candidate, candidate
from megatron_evolve.eval.judge import Judge, load_judge
from megatron_evolve.eval.leakage import NANO_EXEMPT, Leakage, check
from megatron_evolve.eval.suite import FIXED_SPLITS, CsvSuite, Item, draw, read_csv
from megatron_evolve.launch.rundir import RunDirError, read_json
from megatron_evolve.ledger import History
from megatron_evolve.origin import ORIGIN_ROUND
from megatron_evolve.prepare import exclusions, origin_ground
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.manifest import Construction, Substrate, read_manifest
from megatron_evolve.substrate.packing import Packer, Tally, read_excluded
from megatron_evolve.substrate.puzzles.row import Row
from megatron_evolve.substrate.settings import Settings
from megatron_evolve.substrate.tokenizer import challenge_tokenizer

TOLD = 8  # ids of items that are named
UNKNOWN = {  # why nothing of theirs was compared
    "substrate": "its checkpoint was imported, and nobody here knows its rows",
    "origin": "its judge was frozen without the origin's runs",
    "campaign": "no run of it was scored yet",
}


@dataclass(frozen=True)
class Trained:
    """What one training run drew its rows by."""

    settings: Settings
    seed: int
    excluded: frozenset[str] = frozenset()
    trace_share: float = 0.0

    def rows(self, pool: Construction) -> Iterator[Row]:
        """Its rows, in order."""
        mix, recipe = self.settings.mix, self.settings.recipe
        packer = _Unpacked(mix, pool, challenge_tokenizer(), recipe, self.seed, self.excluded, self.trace_share)
        for batch in packer.batches(Tally()):
            yield from batch


class _Unpacked(Packer):
    """The trainer's packer, whose batches are left as rows: nothing is encoded, so any tokenizer will do."""

    def pack(self, rows: list[tuple[Row, str]], tally: Tally) -> list[Row]:
        return [row for row, _ in rows]


def leaks(root: Path) -> dict[str, Any]:
    """What the campaign in `root` was trained on and asked: counts by who trained, ids of what leaked."""
    folder = CampaignFolder(root)
    history = History(folder.ledger)
    opened = history.find("campaign-opened").data
    place, judge_folder = Path(opened["substrate_folder"]), Path(opened["judge_folder"])
    substrate, judge = read_manifest(place), load_judge(judge_folder)
    pool = substrate.construction
    if pool.difficulty == "nano":
        return {"ok": True, "exempt": NANO_EXEMPT, "compared": [], "items": 0, "trained": {}}
    keys = [key.split("/") for key in history.keys("ended")]
    items = asked(judge, sorted({ORIGIN_ROUND, *(int(key[0]) for key in keys)}))
    kept = exclusions(judge_folder)
    held = read_excluded(kept) if kept else frozenset()
    trained = {
        "substrate": (built_by(substrate), pool.replace(cue_rate={})),  # weights are trained without cues
        "origin": (origin_runs(place, judge_folder, substrate, judge, held), pool),
        "campaign": (campaign_runs(folder, keys, held), pool),
    }
    found = {name: compare(runs, its, items) for name, (runs, its) in trained.items() if runs}
    return {
        "ok": not any(one.leaked_rows for one in found.values()),
        "exempt": None,
        "compared": ["dev", "target"] if judge.external else ["dev"],
        "items": len(items),
        "trained": {name: one.model_dump(mode="json") for name, one in found.items()},
    }


def compare(runs: Iterable[Trained], pool: Construction, items: Sequence[Item]) -> Leakage:
    """The rows of these runs against the items."""
    instances = (row.instance for run in runs for row in run.rows(pool))
    return check(instances, items, difficulty=pool.difficulty)


def asked(judge: Judge, rounds: Sequence[int]) -> list[Item]:
    """Every item that these rounds ask, each under the name of its split and round; all rows of a CSV."""
    found = []
    for side, suite in (("dev", judge.dev), ("external", judge.external)):
        if isinstance(suite, CsvSuite):
            found += [item.replace(id=f"{side} row {item.id}") for item in read_csv(suite)]
            continue
        for split in suite.items_per_family if suite else ():
            for number in (0,) if split in FIXED_SPLITS else rounds:
                drawn = draw(suite, split=split, round_number=number, secret=judge.secret)
                found += [item.replace(id=f"{split} of round {number}, {item.id}") for item in drawn]
    return found


# --- who trained -----------------------------------------------------------------------------------------------------


def built_by(substrate: Substrate) -> list[Trained]:
    """The build of the weights; none of an imported checkpoint, whose training nobody here knows."""
    build = substrate.build
    if "settings" not in build:
        return []
    settings = Settings.parse(build["settings"], where="settings of the build")
    # A build draws its families in the pool's order, a run in that of its candidate's file, which is by name.
    weight = {name: settings.mix.weight[name] for name in substrate.construction.families}
    in_order = settings.replace(mix=settings.mix.replace(weight=weight))
    return [Trained(in_order, build["seed"], trace_share=build["trace_share"])]


def origin_runs(
    place: Path, judge_folder: Path, substrate: Substrate, judge: Judge, held: frozenset[str]
) -> list[Trained]:
    """The origin's runs, where its judge was frozen with their scores."""
    folder, origin = origin_ground(place, judge_folder, 1.0).folder, candidate(substrate.digest, substrate.default)
    seeds = judge.origin.seeds if judge.origin else ()
    return [_run(folder, ORIGIN_ROUND, origin, seed, held) for seed in seeds]


def campaign_runs(folder: CampaignFolder, keys: Iterable[Sequence[str]], held: frozenset[str]) -> list[Trained]:
    """Every run of the campaign that was scored, those of its closing included."""
    found = []
    for number, name, seed in sorted({(int(key[0]), key[1], int(key[2])) for key in keys if key[3] != "train"}):
        path = folder.candidate(number, name) / "candidate.json"
        if path.exists():  # the origin's frozen runs are asked again under the candidate's name, and trained elsewhere
            found.append(_run(folder, number, Candidate.parse(read_json(path), where=str(path)), seed, held))
    return found


def _run(folder: CampaignFolder, number: int, one: Candidate, seed: int, held: frozenset[str]) -> Trained:
    """A run by what its trainer wrote of it: also whether it left out the rows that the judge withholds."""
    result = folder.run(number, one.id, seed) / "train" / "result.json"
    told = read_json(result)["excluded"]
    if told not in (None, digest_of(sorted(held))):
        raise ValueError(
            f"{result}: expected a run without the rows that its judge withholds, got one without another list: "
            "train it again, or restore the judge that it was trained for"
        )
    return Trained(one.settings, seed, held if told else frozenset())


# --- the process -----------------------------------------------------------------------------------------------------


def words(found: dict[str, Any] | None) -> list[str]:
    """The check as lines of text; none is known of a judge without a campaign."""
    if found is None:
        return ["leakage unknown: a judge alone was not trained for; name the folder of a campaign"]
    if found["exempt"]:
        return [f"leakage not checked: {found['exempt']}"]
    lines, asked_of = [], " and ".join({"dev": "dev", "target": "the target"}[side] for side in found["compared"])
    for name, one in found["trained"].items():
        leaked = one["leaked_items"]
        named = f": {'; '.join(leaked[:TOLD])}{' …' if len(leaked) > TOLD else ''}" if leaked else ""
        lines.append(
            f"{'WRONG' if leaked else 'ok   '} leakage {name}: {one['leaked_rows']:,} of {one['rows']:,} training rows "
            f"are among {found['items']:,} items of {asked_of}{named}"
        )
    lines += [f"leakage {name}: unknown, {why}" for name, why in UNKNOWN.items() if name not in found["trained"]]
    if "target" not in found["compared"]:
        lines.append("leakage target: unknown, this judge holds none of its items; no row was compared with it")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the process. Status 0 once it has said what it found; otherwise one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="megatron_evolve.leaks", description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, metavar="DIR", help="the campaign")
    root = parser.parse_args(argv).root
    try:
        found = leaks(root)
    except (ValueError, RunDirError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
