"""The seam between methods and laboratories: what a method may know of where it searches, and what it may ask for.

A simulated surface (`laboratory.py`) and a frozen substrate that really trains (`workshop.py`) both give a `Space` and
serve a `Lab`, so that one code of each method runs on both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np

from megatron_evolve.campaign import Campaign, find_campaign, load_campaign
from megatron_evolve.substrate.settings import Settings

SPLITS = ("dev-a", "dev-b", "external-a", "external-b")  # what a search may ask; `final` is sealed


@cache
def demo() -> Campaign:
    """The shipped demo, whose sizes a contest takes."""
    return load_campaign(find_campaign("demo"))


class Spent(Exception):
    """The budget of runs is used up."""


@dataclass(frozen=True, eq=False)
class Space:
    """Where methods search.

    campaign   the product's campaign here: its limits, items and looks bind everybody
    view       public view of the substrate (`substrate.manifest.public_view`)
    """

    campaign: Campaign
    view: dict[str, Any]
    origin: Settings
    dev_weights: dict[str, float]
    external_weights: dict[str, float]

    @property
    def substrate(self) -> str:
        """The substrate's digest."""
        return self.view["digest"]

    @property
    def styles(self) -> dict[str, Sequence[str]]:
        """Forms of a completion, by family."""
        return self.view["construction"]["styles"]

    @property
    def families(self) -> tuple[str, ...]:
        """Families of training rows, in the order in which settings are drawn."""
        return tuple(self.styles)

    def num_items(self, split: str) -> int:
        """Items a family of a split; `dev` is both dev halves."""
        judge = self.campaign.judge
        sizes = {**judge.dev.items_per_family, **judge.target_suite.items_per_family}
        return sizes["dev-a"] + sizes["dev-b"] if split == "dev" else sizes[split]


class Trained(Protocol):
    """A trained run, as methods see it."""

    @property
    def settings(self) -> Settings: ...


class Sheet(Protocol):
    """The items of a split in one round."""

    @property
    def split(self) -> str: ...

    @property
    def ids_n(self) -> np.ndarray: ...

    @property
    def families_n(self) -> np.ndarray: ...


class Lab(Protocol):
    """What one campaign of one method may use, and what it has used."""

    rng: np.random.Generator
    budget: int
    runs: int
    looks: int
    seconds: float

    @property
    def space(self) -> Space: ...

    @property
    def left(self) -> int: ...

    def train(self, settings: Settings, start: Any = None) -> Any:
        """One run under a fresh seed; none if it diverged. Raises Spent beyond the budget."""

    def sheet(self, split: str, number: int = 1) -> Any:
        """Items of a split, or of both dev halves (`dev`), in a round."""

    def answers(self, trained: Any, sheet: Any) -> np.ndarray:
        """Which items a run gets right, (n,); neither cost nor look is counted."""

    def scoring_seconds(self, trained: Any, sheet: Any) -> float:
        """CPU-seconds of the job that asks these items."""

    def score(self, trained: Any, sheet: Any) -> float:
        """The weighted score of a run; its cost and its look are counted."""

    def origin_runs(self, settings: Settings, count: int) -> Sequence[Any]:
        """The runs that were frozen with the judge; they count for nobody."""

    def ship(self, settings: Settings) -> Any:
        """What a method ends with: settings that are trained afresh."""
