"""What attempts of the fake cluster leave of their lives: most are measured in whole, some in parts, some not at all.

An attempt may have had two starts, and a start may have been lost from sight: then it left no record but its signs of
life, and its outcome says of its time that nobody took it.
"""

import dataclasses
import os
import random
from pathlib import Path

from megatron_evolve.launch import rundir, starts
from megatron_evolve.launch.job import JobOutcome

SIGN_EVERY_S = 4.0  # jobs take at most 20 s; a start that nobody saw is charged so much more at most
# Which starts told how they ended, and how often that is so. In every third attempt something is not known.
PATTERNS = {(True,): 12, (True, True): 2, (False,): 3, (True, False): 2, (False, True): 1, (False, False): 1}
UNKNOWN_CPU = 0.2  # ranks under srun
_BEGAN_AT = 1_800_000_000.0


def leave(folder: Path, outcome: JobOutcome, rng: random.Random) -> tuple[JobOutcome, float]:
    """Leaves the files of an attempt that took `outcome.seconds`; what is recorded of it, and how many of its seconds
    at most may be charged too much."""
    (pattern,) = rng.choices(list(PATTERNS), list(PATTERNS.values()))
    known = rng.random() >= UNKNOWN_CPU
    share_s = outcome.seconds / len(pattern)
    for number, told in enumerate(pattern):
        if number:
            starts.put_aside(folder, number - 1)
        signs = {rundir.SUPERVISOR_FILE: 0.0, rundir.ALIVE_FILE: share_s // SIGN_EVERY_S * SIGN_EVERY_S}
        for name, after_s in signs.items():
            (folder / name).write_text("{}")
            os.utime(folder / name, (_BEGAN_AT + after_s,) * 2)
        if told:
            own = dataclasses.replace(outcome, seconds=share_s, cpu_seconds=share_s if known else None)
            starts.record(folder, number, own)
    return starts.charged(folder, outcome), SIGN_EVERY_S * pattern.count(False)
