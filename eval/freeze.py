"""Freezes a judge in a process of its own, so that no other process ever opens the external target.

    python -m megatron_evolve.eval.freeze --spec SPEC.json --out DIR       freeze, unless DIR holds the judge already
    python -m megatron_evolve.eval.freeze --attach DIR --origin FILE       the origin's scores, DIR/FILE, join the judge
    python -m megatron_evolve.eval.freeze --verify DIR                     hash everything again

Beside the judge it leaves what others may know of it: `suites.json` (weights and sizes) and `withheld.txt` (sha256 of
the target's rule instances, so that no training row equals one), neither of which holds an item, a path or the secret.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from megatron_evolve.eval.engines.settings import EngineSettings
from megatron_evolve.eval.judge import (
    MANIFEST,
    AnyEngine,
    Judge,
    attach_origin,
    freeze_engine,
    freeze_judge,
    load_judge,
    verify_judge,
)
from megatron_evolve.eval.leakage import withheld
from megatron_evolve.eval.suite import CsvSuite, GeneratedSuite, Item, Suite, csv_suite, family_weights, read_csv
from megatron_evolve.launch.rundir import RunDirError, make_folder, read_json, write_json, write_whole

SUITES_FILE = "suites.json"
WITHHELD_FILE = "withheld.txt"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the process. Status 0 once everything is written or verified; otherwise one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="megatron_evolve.eval.freeze", description=__doc__.splitlines()[0])
    parser.add_argument("--spec", type=Path, help="JSON: dev, external, engine, secret")
    parser.add_argument("--out", type=Path, help="folder for the judge")
    parser.add_argument("--attach", type=Path, help="folder of a frozen judge without origin scores")
    parser.add_argument("--origin", help="name of the file of origin scores in that folder")
    parser.add_argument("--verify", type=Path, help="folder of a frozen judge")
    arguments = parser.parse_args(argv)
    try:
        if arguments.verify:
            judge = verify_judge(arguments.verify)
        elif arguments.attach:
            seeds = read_json(arguments.attach / arguments.origin)["seeds"]
            judge = attach_origin(arguments.attach, arguments.origin, seeds)
        else:
            judge = freeze(read_json(arguments.spec), arguments.out)
    except (ValueError, RunDirError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps({"digest": judge.digest, "origin": judge.origin is not None}))
    return 0


def freeze(spec: dict[str, Any], folder: Path) -> Judge:
    """The judge of a specification; the one that stands in `folder` if it was frozen before."""
    if (folder / MANIFEST).exists():
        return load_judge(folder)
    dev, external = _suite(spec["dev"]), _suite(spec["external"])
    rows = read_csv(external) if isinstance(external, CsvSuite) else []
    make_folder(folder)
    write_json(folder / SUITES_FILE, _told(dev, external, rows))
    if rows:
        write_whole(folder / WITHHELD_FILE, "".join(f"{instance}\n" for instance in sorted(withheld(rows))))
    return freeze_judge(folder, dev=dev, external=external, engine=engine_of(spec["engine"]), secret=spec["secret"])


def engine_of(spec: dict[str, Any]) -> AnyEngine:
    """The engine of a specification (its settings, and the version that asks it), with the versions of what decodes."""
    settings = TypeAdapter(EngineSettings).validate_python({k: v for k, v in spec.items() if k != "version"})
    return freeze_engine(settings, spec["version"])


def _suite(spec: dict[str, Any] | None) -> Any:
    if spec is None:
        return None
    if spec["kind"] == "csv":
        return csv_suite(Path(spec["path"]), spec["items"], sealed=spec["sealed"])
    return TypeAdapter(Suite).validate_python(spec)


def _told(dev: GeneratedSuite, external: GeneratedSuite | CsvSuite | None, rows: list[Item]) -> dict[str, Any]:
    """Weights of the families in each score, and how many items a look takes."""
    items = {split: n * len(dev.families) for split, n in dev.items_per_family.items()}
    told: dict[str, Any] = {"weights": {"dev": _weights(dev, []), "external": {}}, "items": items}
    if external is None:
        return told
    told["weights"]["external"] = _weights(external, rows)
    if isinstance(external, GeneratedSuite):
        told["items"] |= {split: n * len(external.families) for split, n in external.items_per_family.items()}
    else:
        told["items"] |= {**external.items, "open": len(rows) - round(len(rows) * external.sealed)}
        told["items"]["final"] = len(rows) - told["items"]["open"]
    return told


def _weights(suite: GeneratedSuite | CsvSuite, rows: list[Item]) -> dict[str, float]:
    if isinstance(suite, GeneratedSuite):
        total = sum(share.weight for share in suite.families.values())
        return {name: share.weight / total for name, share in sorted(suite.families.items())}
    return family_weights(suite, rows)


if __name__ == "__main__":
    sys.exit(main())
