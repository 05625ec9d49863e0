"""Probing the judge: its own process answers for itself, and here is what it says, in words.

Only the judge's process opens the target, so the probes (`eval/probes.py`) run there and tell scores alone.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.audit import open_record
from megatron_evolve.eval.judge import MANIFEST


def probe(folder: Path) -> dict[str, Any]:
    """What every probe scored on the judge in `folder`, or on the judge of the campaign there."""
    judge = folder
    if CampaignFolder(folder).ledger.exists():
        judge = Path(open_record(folder).opened["judge_folder"])
    elif not (folder / MANIFEST).exists():
        raise ValueError(f"expected a frozen judge or a campaign in {folder}, found neither: name the folder of one")
    argv = (sys.executable, "-m", "megatron_evolve.eval.probes", "--judge", str(judge))
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        told = done.stderr.strip().splitlines()
        raise ValueError(told[-1] if told else "the judge's process failed")
    return json.loads(done.stdout)


def words(found: dict[str, Any]) -> str:
    """The probes as lines of text."""
    lines = []
    for split, one in found["splits"].items():
        lines.append(f"{split}: {one['items']:,} items")
        for name, told in one["probes"].items():
            allowed = f"{told['least']:.3f}" if told["least"] == told["most"] else f"at most {told['most']:.3f}"
            lines.append(f"  {'ok   ' if told['ok'] else 'WRONG'} {name:14} {told['score']:.3f}, must be {allowed}")
    for split, told in (found["headroom"] or {}).items():
        full = f"; saturated: {', '.join(told['saturated'])}" if told["saturated"] else ""
        lines.append(
            f"{'ok   ' if told['ok'] else 'WRONG'} headroom {split}: the origin has {told['origin']:.3f}, "
            f"{100 * told['left']:.1f} pt are left{full}"
        )
    if found["headroom"] is None:
        lines.append("headroom unknown: the origin was not scored yet")
    lines.append("the judge scores as it must" if found["ok"] else "the judge errs: score nothing with it")
    return "\n".join(lines)
