"""Discordant items: how few may tell two sides apart before nothing is claimed of their difference.

Where few items do, the variance is made of a handful and is small just where the mean is, so that bounds are false too
often. 10 discordant pairs are the usual condition of McNemar's normal form (5 expected each way: Cochran 1954), as 10
right and 10 wrong answers are that of a share. The looks of a campaign have small levels, at which it takes more: of
campaigns near an accuracy of 0, with the slope exactly at beta0 and 60 % of flips common, up to .10 alarmed with 10 and
.04 with 15 (docs/results/judge.md).
"""

import numpy as np

LEAST_DISCORDANT = 15

_BELOW_ONE_ANSWER = 1e-12  # of a share; what a mean of a few hundred scores errs by


def rarer_answers(score: float | np.ndarray, items: int | np.ndarray) -> float | np.ndarray:
    """Whole right or wrong answers, whichever are fewer, behind a mean score of this many items."""
    return np.floor(items * (np.minimum(score, 1 - np.asarray(score)) + _BELOW_ONE_ANSWER))


def too_few(
    discordant: float | np.ndarray, num_items: int, split: str, what: str = "items tell the two sides apart"
) -> str:
    """Why nothing is claimed where fewer items than needed tell two sides apart, with both counts."""
    counted = int(np.min(discordant))
    some = f"only about {counted:,}" if counted else "none"
    return f"{some} of {num_items:,} {split} {what}, expected {LEAST_DISCORDANT}"
