"""A campaign file: what an operator writes once, before the first round.

It names the substrate (a preset to build, or a frozen folder), the judge's suites, the constitution, how the search
starts and where jobs run. Nothing in it changes while the campaign runs; the copy in the campaign's folder is the one
that counts.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_evolve.constitution import Constitution
from megatron_evolve.document import find_yaml, load_yaml
from megatron_evolve.eval.engines.settings import EngineSettings, MegatronSettings
from megatron_evolve.eval.suite import GeneratedSuite
from megatron_evolve.launch.rundir import resolved
from megatron_evolve.policy import OPENED_BY_EVIDENCE, Axis, Replicates, check_names
from megatron_evolve.substrate.frozen import Frozen
from megatron_evolve.substrate.layout import Layout

MOST_ITEMS = 100_000  # of a family in a split: each is a puzzle drawn in Python and decoded by every run
SHIPPED = Path(__file__).resolve().parent / "campaigns"


class SubstrateSpec(Frozen):
    """Which frozen ground: a folder, or a preset that is built once and kept."""

    path: str | None = Field(default=None, description="folder of a frozen substrate; none takes the preset's")
    preset: str = Field(
        default="nano-cpu", description="one that is built once and kept, or a nemotron3 size, which is imported once"
    )
    seed: int = Field(default=0, ge=0, description="seed of the build")
    cue_rate: dict[str, float] = Field(
        default_factory=dict,
        description="how often a surface cue gives a family's rule away in the pool of training rows",
    )


class ExternalCsv(Frozen):
    """An external target that is a CSV with the columns id, prompt, answer (and family, subfamily where known)."""

    kind: Literal["csv"] = "csv"
    path: str | None = Field(default=None, description="none: given with --external when the campaign is started")
    items: dict[Literal["external-a", "external-b"], int] = Field(description="rows of each half asked in one round")
    sealed: float = Field(default=0.5, gt=0, lt=1, description="share of the rows kept for the end")


class ExternalScores(Frozen):
    """An external target that tells one number a run, as a leaderboard does, and shows no item.

    All its runs answer the same items in every round, so what selection and the next policy may read of it is released:
    a difference within its standard error as none, one beyond it rounded. Verdicts are computed on the exact numbers.
    """

    kind: Literal["reported", "command"] = Field(
        description="who brings the scores: an operator (`external submit`, for which the campaign waits), or a program"
    )
    items: int = Field(ge=2, description="how many items the number is a mean over, as its publisher says")
    step: float = Field(default=0.0, ge=0, lt=1, description="what it is rounded to; 0 where it is not")
    command: tuple[str, ...] = Field(
        default=(), description="argv of the program; the run's folder follows, one JSON object is printed"
    )
    timeout_s: float = Field(default=600.0, gt=0, description="after which the program is stopped and its reply lost")

    @model_validator(mode="after")
    def _command_where_it_is_called(self) -> "ExternalScores":
        if (self.kind == "command") != bool(self.command):
            raise ValueError(
                "an external target of kind `command` has its argv in `command`, and one of kind `reported` has none: "
                f"got kind {self.kind} and {list(self.command)}"
            )
        return self


class JudgeSpec(Frozen):
    """What a score means in this campaign."""

    dev: GeneratedSuite
    external: Annotated[GeneratedSuite | ExternalCsv | ExternalScores, Field(discriminator="kind")] | None = Field(
        description="none: every verdict stays UNRESOLVED"
    )
    engine: EngineSettings = Field(default=MegatronSettings(), description="how completions are decoded")
    secret: str = Field(min_length=16, description="seeds every draw of items; keep it from workers")
    origin_seeds: int = Field(default=8, ge=8, le=64, description="seeds of the substrate's own recipe, scored once")

    # Here and not in the suite, whose file is among the judge's sources: its digest would move.
    @model_validator(mode="after")
    def _suites_can_be_drawn(self) -> "JudgeSpec":
        for name, suite in (("dev", self.dev), ("external", self.external)):
            for split, items in suite.items_per_family.items() if isinstance(suite, GeneratedSuite) else ():
                if items > MOST_ITEMS:
                    raise ValueError(
                        f"{name}.items_per_family.{split} is at most {MOST_ITEMS}, got {items}; ask for fewer items"
                    )
        return self

    @property
    def target_suite(self) -> GeneratedSuite | ExternalCsv | None:
        """The external target whose items are asked here; none where there is no target or only its scores are told."""
        return None if isinstance(self.external, ExternalScores) else self.external

    @property
    def told_scores(self) -> ExternalScores | None:
        """The external target that tells scores alone."""
        return self.external if isinstance(self.external, ExternalScores) else None


class SearchSpec(Frozen):
    """How the search starts; meta takes it from there."""

    axes: tuple[Axis, ...] | None = Field(default=None, description="none: the generic axes")
    replicates: Replicates = Field(default=Replicates())
    ask_external: Literal["all", "best", "none"] = Field(default="all", description="whose external score is asked")

    @field_validator("axes")
    @classmethod
    def _search_goes_on(cls, axes: tuple[Axis, ...] | None) -> tuple[Axis, ...] | None:
        """Refuses axes of which none would be sure of a worker: findings open and shut two, and a retired one waits."""
        if axes is None:
            return None
        check_names(axes)
        if not any(axis.operator not in OPENED_BY_EVIDENCE and not axis.retired for axis in axes):
            given = ", ".join(f"{axis.name} (retired)" if axis.retired else axis.name for axis in axes)
            raise ValueError(
                f"the search needs an open axis beside {' and '.join(OPENED_BY_EVIDENCE)}, which findings open and "
                f"shut, got {given or 'no axis'}; add one, or leave axes out for the generic ones"
            )
        return axes


class Training(Frozen):
    """How one training run is computed: over which processes, in which pieces. It changes no recipe."""

    ranks: int = Field(default=1, ge=1, description="processes of one run; what the layout leaves is data parallel")
    layout: Layout = Field(default=Layout(), description="parallel sizes")
    micro_rows: int | None = Field(default=None, ge=1, description="most rows that a rank computes at once")
    packed: bool = Field(
        default=False,
        description="rows end to end in place of padded ones, as many as fit in the room of micro_rows whole rows",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="what the backward pass computes again instead of keeping it: nothing, expert layers, all layers",
    )
    experts: Literal["auto", "eager", "triton", "reference"] = Field(
        default="auto", description="maths of the routed experts; auto takes the fused kernels where a GPU is"
    )
    layers: Literal["auto", "pytorch", "transformer-engine"] = Field(
        default="auto", description="norms and dense linear layers; auto takes pytorch's"
    )
    tensorboard: bool = Field(
        default=False, description="also write event files for TensorBoard, where the extra `track` is installed"
    )

    @model_validator(mode="after")
    def _ranks_fit(self) -> "Training":
        self.layout.data_parallel(self.ranks)
        if self.packed and self.layout.cp > 1:
            raise ValueError(
                f"packed rows lie whole on a rank; got cp={self.layout.cp}: set cp to 1 or packed to false"
            )
        return self

    @property
    def options(self) -> tuple[str, ...]:
        """The trainer's arguments."""
        sizes = [f"{name}={size}" for name, size in self.layout if size > 1]
        layout = ("--layout", ",".join(sizes)) if sizes else ()
        micro_rows = ("--micro-rows", str(self.micro_rows)) if self.micro_rows else ()
        recompute = ("--recompute", self.recompute) if self.recompute != "none" else ()
        flags = [f"--{name}" for name in ("packed", "tensorboard") if getattr(self, name)]
        experts = ("--experts", self.experts) if self.experts != "auto" else ()
        layers = ("--layers", self.layers) if self.layers != "auto" else ()
        return (*layout, *micro_rows, *flags, *recompute, *experts, *layers)


class LaunchSpec(Frozen):
    """Where jobs run."""

    kind: Literal["local"] = "local"
    cores: int | None = Field(default=None, ge=1, description="cores to fill; none takes what this machine gives")
    warm: bool = Field(default=True, description="fork jobs from one parent that has the libraries loaded")
    training: Training = Field(default=Training())
    # Not written: it only saves typing --site, and the folder keeps the site itself.
    site: str | None = Field(default=None, exclude=True, description="site file taken where --site names none")


class Campaign(Frozen):
    """The whole of a campaign file."""

    schema_: Literal["campaign/1"] = Field(default="campaign/1", alias="schema")
    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    claim: Literal["performance", "infrastructure"] = Field(
        default="infrastructure", description="what the campaign may claim: a better recipe, or that the loop closed"
    )
    comparator: Literal["origin"] | None = Field(
        default=None, description="what a performance claim is measured against"
    )
    seed: int = Field(default=0, ge=0, description="every run's seed follows from it")
    substrate: SubstrateSpec = Field(default=SubstrateSpec())
    judge: JudgeSpec
    constitution: Constitution = Field(default=Constitution())
    search: SearchSpec = Field(default=SearchSpec())
    worker: tuple[str, ...] | None = Field(default=None, description="argv of the proposer; none: the default program")
    open_final: Literal["at-end", "by-operator"] = Field(
        default="by-operator",
        description="when the sealed half is opened, once, which closes the campaign: when an operator says so "
        "(`external open-final`), or after the last round, for a campaign that must end by itself",
    )
    launch: LaunchSpec = Field(default=LaunchSpec())

    @model_validator(mode="after")
    def _claim_has_its_comparator(self) -> "Campaign":
        if self.claim == "performance" and self.comparator is None:
            raise ValueError(
                "a performance claim needs a comparator (`comparator: origin`); without one claim infrastructure"
            )
        if self.judge.told_scores and self.claim == "performance":
            raise ValueError(
                "a performance claim is measured on sealed items, and a target that tells scores alone has none: claim "
                "infrastructure"
            )
        if self.judge.told_scores and "cumulative" in self.constitution.gap.estimands:
            raise ValueError(
                "the cumulative estimand asks the origin's frozen runs in every round, and a target that tells scores "
                "alone is not asked for them: leave it out of constitution.gap.estimands"
            )
        return self


def find_campaign(name: str) -> Path:
    """Path of a campaign file: a path that exists, or the name of a shipped campaign."""
    return find_yaml(name, SHIPPED, "campaign file")


def load_campaign(path: Path, *, external: Path | None = None) -> Campaign:
    """The campaign of a file, with the external CSV put in. Raises ValueError in one sentence."""
    return with_external(Campaign.parse(load_yaml(path), where=str(path)), external)


def with_external(campaign: Campaign, external: Path | None) -> Campaign:
    """The campaign with the path of its external CSV. Raises ValueError if one is missing or not wanted."""
    target = campaign.judge.external
    if external is None:
        if isinstance(target, ExternalCsv) and target.path is None:
            raise ValueError(f"campaign {campaign.name} needs its external target: add --external FILE.csv")
        return campaign
    if not isinstance(target, ExternalCsv):
        raise ValueError(
            f"campaign {campaign.name} has no CSV as external target: leave --external out, or declare one"
        )
    return campaign.replace(judge=campaign.judge.replace(external=target.replace(path=str(resolved(external)))))


def plan_of(campaign: Campaign) -> dict[str, Any]:
    """What the campaign will use, at most, for the statement before it starts."""
    rules = campaign.constitution
    replicates = campaign.search.replicates
    explorers = (rules.workers - 1) * replicates.explorer
    confirmed = min(replicates.confirm_candidates, rules.workers - 1) * replicates.confirm_seeds
    return {
        "rounds": rules.rounds,
        "candidates_per_round": rules.workers,
        "runs_per_round": rules.anchor_seeds + explorers + confirmed,
        "runs": rules.rounds * (rules.anchor_seeds + explorers + confirmed),
        "external_looks": rules.external_looks,
    }


def looks_a_round(campaign: Campaign) -> int:
    """External looks that a round asks for: a candidate on each of two halves is two, where there are halves."""
    if campaign.judge.external is None:
        return 0
    asked = {"all": campaign.constitution.workers, "best": 2, "none": 0}[campaign.search.ask_external]
    return asked if campaign.judge.told_scores else 2 * asked
