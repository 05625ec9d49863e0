"""Probing the judge: its own process answers for itself, and here is what it says, in words.

Only processes of the judge's side open the target, so the probes (`eval/probes.py`) run there and tell scores alone,
and so does the comparison of what was trained on with what was asked (`leaks.py`), which tells counts.
"""

import json
import sys
from pathlib import Path
from typing import Any

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.audit import open_record
from megatron_evolve.eval.judge import MANIFEST
from megatron_evolve.leaks import words as leak_words
from megatron_evolve.prepare import told_by


def probe(folder: Path) -> dict[str, Any]:
    """What every probe scored on the judge in `folder`, or on that of the campaign there and whether it leaked."""
    campaign = CampaignFolder(folder).ledger.exists()
    judge = Path(open_record(folder).opened["judge_folder"]) if campaign else folder
    if not campaign and not (folder / MANIFEST).exists():
        raise ValueError(f"expected a frozen judge or a campaign in {folder}, found neither: name the folder of one")
    found = _told("megatron_evolve.eval.probes", "--judge", str(judge))
    leakage = _told("megatron_evolve.leaks", str(folder)) if campaign else None
    return {**found, "ok": found["ok"] and (leakage is None or leakage["ok"]), "leakage": leakage}


def _told(module: str, *arguments: str) -> dict[str, Any]:
    return json.loads(told_by((sys.executable, "-m", module, *arguments)))


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
    lines += leak_words(found["leakage"])
    if found["leakage"] and not found["leakage"]["ok"]:
        lines.append("items of the judge were trained on: its scores speak of memory; freeze another judge")
    else:
        lines.append("the judge scores as it must" if found["ok"] else "the judge errs: score nothing with it")
    return "\n".join(lines)
