"""The longest question of a campaign, in tokens: an engine must have room for it, and for what is answered to it.

    python -m megatron_evolve.longest_question --suites JSON (--substrate DIR | --preset NAME)

Of a CSV every row is read. Of a generated suite questions of every family are drawn, without the judge's secret: they
are like the campaign's own and are not those. Only this process opens a CSV: it tells one number.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_evolve.campaign import ExternalCsv, JudgeSpec
from megatron_evolve.eval.engines.seam import Prompt
from megatron_evolve.eval.suite import GeneratedSuite, csv_suite, draw
from megatron_evolve.prepare import told_by
from megatron_evolve.substrate.build import PRESETS
from megatron_evolve.substrate.checkpoint_tokenizer import TOKENIZER_FILE, read_tokenizer
from megatron_evolve.substrate.manifest import read_manifest

if TYPE_CHECKING:
    from megatron_evolve.preflight import Expected

DRAWN = 100  # questions of a family


def longest_question(judge: JudgeSpec, expected: "Expected") -> int | None:
    """Tokens of the longest question; None while nothing here knows how the model cuts text.

    Raises ValueError in one sentence for a CSV that is no target, or holds text that the tokenizer has no tokens for.
    """
    if expected.frozen is not None and (expected.folder / TOKENIZER_FILE).is_file():
        whose = ("--substrate", str(expected.folder))
    elif expected.frozen is None and expected.architecture.name in PRESETS:
        whose = ("--preset", expected.architecture.name)
    else:
        return None
    suites: list[dict[str, Any]] = [judge.dev.model_dump(mode="json")]
    target = judge.target_suite
    if isinstance(target, GeneratedSuite) or (target is not None and target.path is not None):
        suites.append(target.model_dump(mode="json"))
    argv = (sys.executable, "-m", "megatron_evolve.longest_question", "--suites", json.dumps(suites), *whose)
    return json.loads(told_by(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the process. Status 0 once it has told the number; otherwise one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="megatron_evolve.longest_question", description=__doc__.splitlines()[0])
    parser.add_argument("--suites", type=json.loads, required=True, help="JSON: a list of suites")
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("--substrate", type=Path, help="folder of a frozen substrate, whose tokenizer cuts the text")
    whose.add_argument("--preset", choices=PRESETS, help="one that is still to be built")
    arguments = parser.parse_args(argv)
    try:
        if arguments.preset:
            difficulty, tokenizer = PRESETS[arguments.preset].difficulty, PRESETS[arguments.preset].tokenizer()
        else:
            difficulty = read_manifest(arguments.substrate).construction.difficulty
            tokenizer = read_tokenizer(arguments.substrate)
        texts = (text for suite in arguments.suites for text in _questions(suite))
        print(max(len(Prompt.of(text, difficulty, tokenizer).tokens) for text in texts))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _questions(suite: dict[str, Any]) -> Iterator[str]:
    if suite["kind"] == "csv":
        target = ExternalCsv.parse(suite, where="external")
        asked = csv_suite(Path(target.path), target.items, sealed=target.sealed)
        splits = ("open", "final")  # all of it
    else:
        asked = GeneratedSuite.parse({**suite, "items_per_family": {"dev-b": DRAWN}}, where="suite")
        splits = ("dev-b",)
    for split in splits:
        yield from (item.prompt for item in draw(asked, split=split, round_number=0, secret=""))


if __name__ == "__main__":
    sys.exit(main())
