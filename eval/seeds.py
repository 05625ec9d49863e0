"""Seeds: how much of a score is the luck of one training run.

Replicates of one candidate differ by s^2 on fixed items. Of that psi_rep / 2n is items that flip between them, which
the item variance of a paired difference counts already, so only the excess max(0, s^2 - psi_rep / 2n) is a run's own.
s^2 is taken per run of whatever is judged (dev, external, or the gap between them), because dev and external share the
weights, and pooled within candidates. Made from answers once, kept as moments: the origin's are frozen with the judge.
Letters: k replicates, n items, F families. Every number of a campaign may be an array over campaigns instead, as a
leading axis (`...`): the simulator runs thousands through the very functions that judge one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

RunKey = tuple[str, int]  # candidate, seed


def weight_vector(weights: Mapping[str, float], families: Sequence[str]) -> np.ndarray:
    """Weights in the families' order, summing to 1. Raises ValueError for a family without weight or without items."""
    if missing := sorted(set(families) - set(weights)):
        raise ValueError(f"expected a weight for every family, got none for {', '.join(missing)}: add it to the suite")
    if empty := sorted(name for name, weight in weights.items() if weight and name not in families):
        raise ValueError(
            f"expected items of every weighted family, got none of {', '.join(empty)}: draw the suite again"
        )
    w = np.array([float(weights[name]) for name in families])
    if not (np.isfinite(w).all() and (w >= 0).all() and w.sum() > 0):
        raise ValueError(f"expected finite weights, none negative and not all zero, got {w.tolist()}: mend the suite")
    return w / math.fsum(w)


def total(values: np.ndarray) -> float | np.ndarray:
    """Sum over the last axis; one campaign's is rounded once, at the end, so that no relabelling moves a bit."""
    return math.fsum(values.tolist()) if values.ndim == 1 else values.sum(-1)


def weighted_sum(values_F: np.ndarray, w: np.ndarray) -> float | np.ndarray:
    """Weighted sum over families, (..., F) to (...)."""
    return total(values_F * w)


def sums_by(codes: np.ndarray, values: np.ndarray, num: int) -> np.ndarray:
    """Sum of the items' values by code, (..., n) to (..., num); `codes` below `num` name the group of an item."""
    rows = values.reshape(-1, values.shape[-1])
    place = codes + num * np.arange(len(rows))[:, None]
    return np.bincount(place.ravel(), rows.ravel(), num * len(rows)).reshape(*values.shape[:-1], num)


def family_means(correct_Rn: np.ndarray, codes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of each run over the items of each family, (..., R, F); `codes` names the family of an item."""
    return sums_by(codes, correct_Rn, len(counts)) / counts


@dataclass(frozen=True, eq=False)
class Replicates:
    """k runs of one candidate on one split, reduced to what the seed variance of any weighting needs.

    means_kF: score of each run by family. flips_F: variance that item flips alone give one run's family mean, which is
    psi_rep / 2n of the family (here the mean square of run x item within it, exact for any k).
    """

    candidate: str
    seeds: tuple[int, ...]
    families: tuple[str, ...]
    means_kF: np.ndarray
    flips_F: np.ndarray

    @classmethod
    def of(
        cls, runs: Sequence[RunKey], families: Sequence[str], codes: np.ndarray, correct_kn: np.ndarray
    ) -> "Replicates":
        """From the answers of k runs to the same n items. Raises ValueError for fewer than two of one candidate."""
        candidates = {name for name, _ in runs}
        if len(candidates) != 1 or len(runs) < 2:
            raise ValueError(f"expected at least 2 runs of one candidate, got {list(runs)}: one seed shows no variance")
        counts = np.bincount(codes, minlength=len(families))
        means = family_means(correct_kn, codes, counts)
        centred = means - means.mean(-2, keepdims=True)
        residual = correct_kn - correct_kn.mean(-2, keepdims=True) - centred[..., codes]
        square = sums_by(codes, (residual**2).sum(-2), len(families))
        flips = square / ((len(runs) - 1) * (counts - 1.0) * counts)
        return cls(candidates.pop(), tuple(seed for _, seed in runs), tuple(families), means, flips)

    def without(self, seeds: set[int]) -> "Replicates":
        """The same with fewer runs."""
        keep = [position for position, seed in enumerate(self.seeds) if seed not in seeds]
        left = tuple(self.seeds[position] for position in keep)
        return Replicates(self.candidate, left, self.families, self.means_kF[..., keep, :], self.flips_F)

    def to_dict(self) -> dict:
        return {
            "candidate": self.candidate,
            "seeds": list(self.seeds),
            "families": list(self.families),
            "means": self.means_kF.tolist(),
            "flips": self.flips_F.tolist(),
        }

    @classmethod
    def from_dict(cls, data: Mapping) -> "Replicates":
        means, flips = np.array(data["means"], dtype=float), np.array(data["flips"], dtype=float)
        return cls(data["candidate"], tuple(data["seeds"]), tuple(data["families"]), means, flips)


@dataclass(frozen=True)
class SeedVariance:
    """Variance s^2 between replicates of one run's score on fixed items, the flips' share of it, and its df."""

    replicate: float | np.ndarray
    flips: float | np.ndarray
    df: float

    @property
    def excess(self) -> float | np.ndarray:
        return np.maximum(0.0, self.replicate - self.flips)

    def draws(self) -> tuple[np.ndarray, np.ndarray]:
        """What the excess may truly be, with probabilities: df s^2 / W - psi_rep / 2n, not below 0, W ~ chi^2(df).

        The generalized pivot of Weerahandi (1993). It gives Student's t where items add nothing and the normal where
        seeds add nothing, and is false at most 1.15 times as often as it says between them, from 1 df on and down to
        level .002 (simulated). Satterthwaite's combined df was false up to 15 times as often there, since s^2 less its
        flips is no chi^2; counting the flips' df back in cost all power below 8 df.
        """
        chi2, probability = _chi2_nodes(self.df)
        squares, flips = (np.asarray(one)[..., None] for one in (self.df * self.replicate, self.flips))
        return np.maximum(0.0, squares / chi2 - flips), probability


Term = tuple[float, Replicates, Mapping[str, float]]  # factor, replicates of one split, family weights


@lru_cache(maxsize=256)
def _chi2_nodes(df: float) -> tuple[np.ndarray, np.ndarray]:
    """Quadrature of chi^2(df): the trapezoid rule in log W, which agrees with Student's t to 7 digits at 64 nodes."""
    from scipy.special import chdtri

    log_w = np.linspace(math.log(chdtri(df, 1 - 1e-9)), math.log(chdtri(df, 1e-12)), 64)
    log_density = df / 2 * log_w - np.exp(log_w) / 2
    probability = np.exp(log_density - log_density.max())
    return np.exp(log_w), probability / probability.sum()


def seed_variance(groups: Sequence[Sequence[Term]]) -> SeedVariance | None:
    """Pooled within candidates. A group is one candidate; its score per run is the sum of its terms.

    One term (1, dev, w) gives the variance of dev; (beta0, dev, w) with (-1, external, v) that of the gap, which holds
    whatever dev and external share through the weights. None where no candidate has a second run.
    """
    squares = flips = df = 0.0
    for group in groups:
        score, flip = 0.0, 0.0
        for factor, replicates, weights in group:
            w = weight_vector(weights, replicates.families)
            by_run = np.moveaxis(replicates.means_kF, -2, 0)
            score = score + factor * np.array([weighted_sum(means_F, w) for means_F in by_run])
            flip = flip + factor**2 * weighted_sum(replicates.flips_F, w**2)
        degrees = len(score) - 1
        squares = squares + ((score - score.mean(0)) ** 2).sum(0)
        flips = flips + degrees * flip
        df += degrees
    return SeedVariance(squares / df, flips / df, df) if df else None


@dataclass(frozen=True, eq=False)
class RunReplicates:
    """One candidate's replicates on dev and, for the same seeds, on external."""

    dev: Replicates
    external: Replicates | None = None

    def __post_init__(self) -> None:
        dev, external = self.dev, self.external
        if external is not None and (dev.candidate, dev.seeds) != (external.candidate, external.seeds):
            raise ValueError(
                f"expected the same runs on dev and external, got {dev.candidate} {list(dev.seeds)} and "
                f"{external.candidate} {list(external.seeds)}: score both splits of each run"
            )

    def to_dict(self) -> dict:
        return {"dev": self.dev.to_dict(), "external": self.external.to_dict() if self.external else None}

    @classmethod
    def from_dict(cls, data: Mapping) -> "RunReplicates":
        external = data["external"]
        return cls(Replicates.from_dict(data["dev"]), Replicates.from_dict(external) if external else None)


@dataclass(frozen=True, eq=False)
class SeedPool:
    """Replicates that tell how much one seed is worth: the origin's frozen ones and those of all rounds so far.

    A run that comes twice (the origin's come again where the cumulative estimand asks it) counts at its first coming
    only: it is one draw of the seed, however often it is scored. So put the origin first.
    """

    groups: tuple[RunReplicates, ...]
    _known: dict[tuple, SeedVariance | None] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        seen: set[tuple[str, int]] = set()
        kept = []
        for group in self.groups:
            again = {seed for seed in group.dev.seeds if (group.dev.candidate, seed) in seen}
            seen |= {(group.dev.candidate, seed) for seed in group.dev.seeds}
            if again:
                external = group.external.without(again) if group.external else None
                group = RunReplicates(group.dev.without(again), external)
            if len(group.dev.seeds) >= 2:
                kept.append(group)
        object.__setattr__(self, "groups", tuple(kept))

    def plus(self, groups: Iterable[RunReplicates]) -> "SeedPool":
        return SeedPool((*self.groups, *groups))

    def variance(
        self, dev: float, dev_weights: Mapping[str, float], external: float, external_weights: Mapping[str, float]
    ) -> SeedVariance | None:
        """Of `dev x dev score + external x external score` per run. A review asks a hundred times for the same few."""
        asked = (dev, *sorted(dev_weights.items()), external, *sorted(external_weights.items()))
        if asked not in self._known:
            self._known[asked] = self._variance(dev, dev_weights, external, external_weights)
        return self._known[asked]

    def _variance(
        self, dev: float, dev_weights: Mapping[str, float], external: float, external_weights: Mapping[str, float]
    ) -> SeedVariance | None:
        groups = [group for group in self.groups if group.external is not None or not external]
        return seed_variance(
            [
                [(dev, group.dev, dev_weights)] * bool(dev)
                + [(external, group.external, external_weights)] * bool(external)
                for group in groups
            ]
        )
