r"""Probes of the judge: answers whose score is known beforehand, scored as a run's answers are.

    python -m megatron_evolve.eval.probes --judge DIR

    gold           the right answer in a box                             every item right
    gold-leak      the right answer, then another one in the last box    none right: the last word counts
    planted-wrong  another item's answer of the same family              none right
    shuffled-gold  the right answers, dealt to other items               no more than share an answer
    constant       the commonest answer of the split, to every item      no better than guessing: at most half
    empty          nothing                                               none right
    truncated      the question repeated, cut off as the box opens       none right

The process opens the target as every scoring does, and tells scores alone: no item, no answer. No candidate is asked,
so no look is spent; the items are those of a round that no campaign reaches. Beside the probes stands the headroom:
what the origin's frozen scores leave to be gained.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_evolve.eval.judge import Judge, verify_judge
from megatron_evolve.eval.metric import RELATIVE_TOLERANCE
from megatron_evolve.eval.score import ItemRows, answer_row, split_scores
from megatron_evolve.eval.suite import Item, family_weights
from megatron_evolve.launch.rundir import RunDirError, read_json

PROBE_ROUND = 2_000_000  # above any campaign's rounds and any trial's
PROBED = ("dev-b", "external-b")
# A suite that one fixed answer solves to more than half, or whose origin leaves less than 3 points, tells nobody apart.
CONSTANT_LIMIT, HEADROOM = 0.5, 0.03

Asked = Sequence[Item]


@dataclass(frozen=True)
class Probe:
    """What is answered to every item, and the score that a sound judge gives it."""

    name: str
    answer: Callable[[Asked], list[str]]
    least: float
    most: Callable[[Asked, Mapping[str, float]], float]
    truncated: bool = False


def boxed(answer: str) -> str:
    """An answer as a model ends its text: in the box."""
    return f"So the answer is \\boxed{{{answer}}}"


def differ(one: str, other: str) -> bool:
    """Whether no reading of the rules could take one for the other: apart from case and by ten tolerances."""
    try:
        a, b = float(one), float(other)
    except ValueError:
        return one.strip().lower() != other.strip().lower()
    return abs(a - b) > 10 * RELATIVE_TOLERANCE * max(abs(a), abs(b))


def wrong_answers(items: Asked) -> list[str]:
    """For each item the answer of the next one of its family that differs; one made up where all are alike."""
    found = []
    for place, item in enumerate(items):
        others = (other.answer for other in (*items[place + 1 :], *items[:place]) if other.family == item.family)
        found.append(next((answer for answer in others if differ(answer, item.answer)), f"not {item.answer} at all"))
    return found


def dealt(items: Asked) -> list[str]:
    """The answers, each dealt to the next item of its family."""
    answers: dict[int, str] = {}
    for family in {item.family for item in items}:
        mine = [place for place, item in enumerate(items) if item.family == family]
        for place, following in zip(mine, (*mine[1:], mine[0]), strict=True):
            answers[place] = items[following].answer
    return [answers[place] for place in range(len(items))]


def commonest(items: Asked) -> list[str]:
    """The most frequent right answer, given to every item."""
    return [Counter(item.answer for item in items).most_common(1)[0][0]] * len(items)


def _share_alike(items: Asked, weights: Mapping[str, float]) -> float:
    """Score of dealt answers by our own reading: those that do not differ from the right one."""
    alike = [(item.family, not differ(item.answer, answer)) for item, answer in zip(items, dealt(items), strict=True)]
    return sum(
        weight * sum(same for name, same in alike if name == family) / sum(name == family for name, _ in alike)
        for family, weight in weights.items()
    )


def none(items: Asked, weights: Mapping[str, float]) -> float:
    """The limit of a probe that must not score at all."""
    return 0.0


PROBES = (
    Probe("gold", lambda items: [boxed(item.answer) for item in items], 1.0, lambda items, weights: 1.0),
    Probe(
        "gold-leak",
        lambda items: [
            f"{boxed(item.answer)}. No: {boxed(wrong)}" for item, wrong in zip(items, wrong_answers(items), strict=True)
        ],
        0.0,
        none,
    ),
    Probe("planted-wrong", lambda items: [boxed(answer) for answer in wrong_answers(items)], 0.0, none),
    Probe("shuffled-gold", lambda items: [boxed(answer) for answer in dealt(items)], 0.0, _share_alike),
    Probe(
        "constant",
        lambda items: [boxed(answer) for answer in commonest(items)],
        0.0,
        lambda items, weights: CONSTANT_LIMIT,
    ),
    Probe("empty", lambda items: [""] * len(items), 0.0, none),
    Probe("truncated", lambda items: [f"{item.prompt}\n\\boxed{{" for item in items], 0.0, none, truncated=True),
)


def probe_split(judge: Judge, split: str) -> dict[str, Any]:
    """Score of every probe on one split, with what a sound judge gives it."""
    items = judge.items(split, PROBE_ROUND)
    weights = family_weights(judge.suite(split), items)
    found = {}
    for probe in PROBES:
        rows = [
            answer_row(item, split, text, truncated=probe.truncated, num_tokens=len(text.split()))
            for item, text in zip(items, probe.answer(items), strict=True)
        ]
        scores = split_scores(ItemRows.of(rows), weights)
        least, most, score = probe.least, probe.most(items, weights), scores.overall.mean
        found[probe.name] = {
            "score": score,
            "least": least,
            "most": most,
            "ok": least - 1e-9 <= score <= most + 1e-9,
            "families": {name: one.mean for name, one in scores.families.items()},
        }
    return {"items": len(items), "probes": found}


def headroom(judge: Judge, folder: Path) -> dict[str, Any] | None:
    """What the origin leaves to be gained on each split; none before it was scored."""
    if judge.origin is None:
        return None
    means = read_json(folder / judge.origin.file)["means"]
    found = {}
    for split in PROBED:
        if split in means:
            weights = family_weights(judge.suite(split), judge.items(split, PROBE_ROUND))
            score = sum(weight * means[split][family] for family, weight in weights.items())
            full = sorted(name for name, mean in means[split].items() if 1 - mean < HEADROOM)
            found[split] = {"origin": score, "left": 1 - score, "ok": 1 - score >= HEADROOM, "saturated": full}
    return found


def verify_eval(folder: Path) -> dict[str, Any]:
    """Every probe of a frozen judge. `ok` only if all scores are what they must be and there is something to gain."""
    judge = verify_judge(folder)
    splits = {split: probe_split(judge, split) for split in PROBED if split == "dev-b" or judge.external is not None}
    left = headroom(judge, Path(folder))
    sound = all(one["ok"] for split in splits.values() for one in split["probes"].values())
    return {
        "schema": "verify-eval/1",
        "judge": judge.digest,
        "ok": sound and all(one["ok"] for one in (left or {}).values()),
        "splits": splits,
        "headroom": left,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the process. Status 0 once it has said what it found; otherwise one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="megatron_evolve.eval.probes", description=__doc__.splitlines()[0])
    parser.add_argument("--judge", type=Path, required=True, help="folder of the frozen judge")
    try:
        found = verify_eval(parser.parse_args(argv).judge)
    except (ValueError, RunDirError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
