"""The scenarios: what explorers truly gain on dev and outside, harmless and harmful.

A scenario is a response surface. Each of the seven explorers follows an axis with a true gain on dev and on the
external target, drawn once a campaign; moving the standing settings along an axis leaves the share `kept` of its gain.
Shares of a mix are taken from somewhere, so a gain is uneven over families: `uneven` is the standard deviation of what
one family gains and the others pay, `slope` the share of that which arrives outside.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from megatron_evolve.gap import OVERALL
from megatron_evolve.simulate.noise import FAMILIES

EVERYWHERE = (OVERALL, *FAMILIES)

Gains = Callable[[np.random.Generator, tuple[int, int]], tuple[np.ndarray, np.ndarray]]  # (B, K) -> d, t: (B, K, F)


@dataclass(frozen=True)
class Scenario:
    """One kind of campaign. `apart`: the scopes (overall, families) in which dev and target truly part.

    external_share: items of the target over those of dev-B. ask: whose external score is asked, as in a policy.
    """

    name: str
    about: str
    gains: Gains
    apart: tuple[str, ...] = ()
    uneven: float = 0.0
    slope: float = 0.0
    kept: float = 1.0
    external_share: float = 1.0
    ask: str = "all"
    lie: float = 0.0
    drift: float = 0.0

    @property
    def harmless(self) -> bool:
        return not self.apart

    def draw(self, rng: np.random.Generator, campaigns: int, explorers: int) -> tuple[np.ndarray, np.ndarray]:
        """True gains on dev and outside by campaign, axis and family."""
        d, t = self.gains(rng, (campaigns, explorers))
        spread = self.uneven * rng.normal(size=d.shape)
        spread -= spread.mean(-1, keepdims=True)
        return d + spread, t + self.slope * spread


def _everywhere(d: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return d[..., None] * np.ones(len(FAMILIES)), t[..., None] * np.ones(len(FAMILIES))


def _all_at(d: float, t: float) -> Gains:
    return lambda rng, size: _everywhere(np.full(size, d), np.full(size, t))


def _spread(mean: float, sd: float, slope: float, residual: float = 0.005, shift: float = 0.0) -> Gains:
    """d ~ N(mean, sd), t = slope (d - shift) + N(0, residual)."""

    def gains(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        d = rng.normal(mean, sd, size)
        return _everywhere(d, slope * (d - shift) + residual * rng.normal(size=size))

    return gains


def _one(d: float, t: float) -> Gains:
    """One axis at (d, t), the others at nothing."""

    def gains(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        lone = np.arange(size[1]) == rng.integers(0, size[1], size[0])[:, None]
        return _everywhere(d * lone, t * lone)

    return gains


def _in_one_family(d: float, t: float) -> Gains:
    def gains(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        where = np.eye(len(FAMILIES))[0] * np.ones((*size, 1))
        return d * where, t * where

    return gains


_TRACKS = Scenario(
    "tracks",
    "gains of N(+2, 2) pt, .8 of them arrive; a promoted axis keeps half",
    _spread(0.02, 0.02, 0.8),
    uneven=0.02,
    slope=0.8,
    kept=0.5,
)

SCENARIOS: Mapping[str, Scenario] = {
    one.name: one
    for one in (
        Scenario("null", "nothing changes anything", _all_at(0.0, 0.0)),
        Scenario("tiny", "gains of N(0, .4) pt, .8 of them arrive", _spread(0.0, 0.004, 0.8, residual=0.0)),
        _TRACKS,
        Scenario(
            "slope-at-beta",
            "all seven at +10 pt dev, exactly half arrives",
            _all_at(0.10, 0.05),
            uneven=0.02,
            slope=0.5,
        ),
        replace(
            _TRACKS, name="noisy-external", about="as tracks, the target asks a fifth of the items", external_share=0.2
        ),
        replace(_TRACKS, name="few-looks", about="as tracks, the target is asked of one explorer", ask="best"),
        replace(
            _TRACKS,
            name="lying-seed",
            about="as tracks, one explorer's run of the campaign is 6 pt lucky on dev alone",
            lie=0.06,
        ),
        Scenario("decoupled", "all seven at +3 pt dev, nothing arrives", _all_at(0.03, 0.0), EVERYWHERE),
        Scenario(
            "decoupled-domain",
            "all seven at +15 pt dev in one family, nothing arrives",
            _in_one_family(0.15, 0.0),
            (OVERALL, FAMILIES[0]),
        ),
        Scenario("inverse", "gains of N(+3, 2) pt, outside -.6 of them", _spread(0.03, 0.02, -0.6), EVERYWHERE),
        Scenario(
            "one-exploiter", "one of seven at +9 dev and -4 outside, six at nothing", _one(0.09, -0.04), EVERYWHERE
        ),
        Scenario(
            "drift",
            "explorers at nothing; the standing settings gain 1.5 pt a round on dev alone",
            _all_at(0.0, 0.0),
            EVERYWHERE,
            drift=0.015,
        ),
        Scenario(
            "offset",
            "gains of N(+3, 2) pt, outside .8 of what exceeds 3 pt: ranks track, the level does not",
            _spread(0.03, 0.02, 0.8, shift=0.03),
            EVERYWHERE,
        ),
    )
}


def scenario(name: str) -> Scenario:
    """A scenario by name. Raises ValueError for an unknown one."""
    if name not in SCENARIOS:
        raise ValueError(f"expected a scenario, got {name!r}: choose from {', '.join(SCENARIOS)}")
    return SCENARIOS[name]
