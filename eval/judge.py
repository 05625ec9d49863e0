"""The judge: what a score means, frozen before a campaign and refused if it changes during one.

A frozen judge is a folder with `manifest.json`: the metric's version, the dev suite, the external suite (or none), the
engine that decodes, the source files that score, and, from a separate step, the scores of the origin. Every section has
its own digest, so a changed byte is found and named, and the digest over the sections is the judge's name. The manifest
holds the judge's secret and the external suite's path: only the processes that score and the controller read it, and
everybody else gets `public_view`.
"""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron_evolve.eval.engines.settings import (
    EngineSettings,
    MegatronSettings,
    OpenAISettings,
    TransformersSettings,
    with_kind,
)
from megatron_evolve.eval.engines.versions import decoding_packages
from megatron_evolve.eval.metric import METRIC_VERSION
from megatron_evolve.eval.suite import CsvSuite, GeneratedSuite, Item, Split, Suite, draw, item_set_digest, read_csv
from megatron_evolve.launch.rundir import make_folder, read_json, write_json
from megatron_evolve.substrate.digest import digest_file, digest_of
from megatron_evolve.substrate.frozen import Frozen

MANIFEST = "manifest.json"
# An endpoint is known by what it serves and says of itself, so it may move to another host, key or path.
MOVABLE = {"url": True, "api_key_env": True, "server": {"executable"}}
MIN_ORIGIN_SEEDS = 8  # verdict: one degree of freedom gives t = 6.3 and no power, seven or more are usable


class Engine(MegatronSettings):
    """What turns a checkpoint and an item into a completion. Two scores compare only if all of it is equal."""

    name: str = Field(default="greedy-cached", description="decoder: greedy, one sample, own state caches")
    version: str = Field(description="version of the package that decodes")


class _Outside(Frozen):
    """What is frozen of an engine that is other people's code, beside its settings."""

    version: str = Field(description="version of the package that asks it")
    packages: dict[str, str] = Field(description="installed version of each package that decodes, where it is known")


class TransformersEngine(_Outside, TransformersSettings):
    """The frozen engine `transformers`."""


class OpenAIEngine(_Outside, OpenAISettings):
    """The frozen engine `openai`. What the server says of itself joins the comparison key when it is asked."""


AnyEngine = Annotated[
    Engine | TransformersEngine | OpenAIEngine, Field(discriminator="kind"), BeforeValidator(with_kind)
]


def freeze_engine(settings: EngineSettings, version: str) -> AnyEngine:
    """Settings with the versions of all that decodes, as far as they are known before it is asked."""
    fields = {**settings.model_dump(), "version": version}
    if isinstance(settings, MegatronSettings):
        return Engine(**fields)
    kind = TransformersEngine if isinstance(settings, TransformersSettings) else OpenAIEngine
    return kind(**fields, packages=decoding_packages(settings))


class OriginScores(Frozen):
    """The frozen scores of the substrate's own recipe, by seed: where the seed variance of every test starts."""

    file: str = Field(description="name of the file within the judge's folder")
    sha256: str
    seeds: tuple[int, ...] = Field(description="the seeds that were trained and scored, each once")

    @model_validator(mode="after")
    def _enough(self) -> "OriginScores":
        if len(set(self.seeds)) < MIN_ORIGIN_SEEDS or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"origin scores need at least {MIN_ORIGIN_SEEDS} different seeds; train and score more")
        return self


class Judge(Frozen):
    """A frozen judge's manifest."""

    schema_: Literal["judge/1"] = Field(default="judge/1", alias="schema")
    metric: str = Field(description="version of the metric")
    engine: AnyEngine
    dev: Suite
    external: Suite | None = Field(description="none: a campaign without a target, whose verdicts stay UNRESOLVED")
    secret: str = Field(min_length=16, description="seeds every draw; whoever knows it can know the items beforehand")
    sources: dict[str, str] = Field(description="sha256 of each source file that draws items or scores completions")
    origin: OriginScores | None = Field(description="none until the origin was trained and scored")
    sections: dict[str, str] = Field(description="sha256 of each field above")
    digest: str = Field(description="sha256 of the sections: the judge's name")

    def suite(self, split: Split) -> GeneratedSuite | CsvSuite:
        """The suite that serves `split`. Raises ValueError if there is no external suite."""
        if split.startswith("dev"):
            return self.dev
        if self.external is None:
            raise ValueError(f"expected an external suite to serve {split}, this judge has none: freeze one with it")
        return self.external

    def items(self, split: Split, round_number: int) -> list[Item]:
        """The items of `split` in that round. For a CSV this opens the external file; pay the look first."""
        return draw(self.suite(split), split=split, round_number=round_number, secret=self.secret)

    def public_view(self) -> dict[str, Any]:
        """What workers and trainers may be told: how they are scored on dev. No path, no secret, no cue, no target."""
        dev = self.dev.model_dump(mode="json")
        if isinstance(self.dev, GeneratedSuite):
            weight = {name: share.weight for name, share in sorted(self.dev.families.items())}
            told = {"difficulty": self.dev.difficulty, "weight": weight, "items_per_family": dev["items_per_family"]}
        else:
            told = {"weight": self.dev.weight, "items": dev["items"]}
        return {"metric": self.metric, "max_new_tokens": self.engine.max_new_tokens, "dev": told}


def comparison_key(judge: Judge, split: Split, items: Sequence[Item], about: Mapping[str, str] | None = None) -> str:
    """Two scores compare if and only if their keys are equal: same metric, engine, suite and items.

    `about`: what the engine said of itself when it was asked.
    """
    engine = judge.engine.model_dump(mode="json", exclude=MOVABLE)
    return digest_of(
        {
            "metric": judge.metric,
            "engine": {**engine, "about": dict(about)} if about else engine,
            "suite": judge.suite(split).digest,
            "items": item_set_digest(items),
        }
    )


def freeze_judge(
    folder: Path,
    *,
    dev: GeneratedSuite | CsvSuite,
    external: GeneratedSuite | CsvSuite | None,
    engine: AnyEngine,
    secret: str | None = None,
) -> Judge:
    """Writes `folder/manifest.json`, readable by its owner alone, and returns the judge.

    `secret` is drawn by the system unless given (a campaign that must be repeatable gives one, 16 characters or more).
    Raises ValueError if the folder holds a judge already, or the suites do not serve what their role needs.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        raise ValueError(
            f"expected no judge in {folder}, found {MANIFEST}: a frozen judge stays; choose another folder"
        )
    for role, suite, needed in (("dev", dev, "dev-b"), ("external", external, "external-b")):
        if suite is not None and needed not in _declared(suite):
            raise ValueError(
                f"expected the {role} suite to declare items for {needed}, which verdicts are made of, got "
                f"{', '.join(_declared(suite))}: add {needed}"
            )
    secret = secret if secret is not None else secrets.token_hex(16)
    for suite in (dev, external):
        if suite is not None:
            for split in _declared(suite):
                draw(suite, split=split, round_number=0, secret=secret)  # so that no round is the first to fail
    fields = {
        "metric": METRIC_VERSION,
        "engine": engine,
        "dev": dev,
        "external": external,
        "secret": secret,
        "sources": judge_sources(),
        "origin": None,
    }
    return _write(folder, fields)


def attach_origin(folder: Path, file: str, seeds: Sequence[int]) -> Judge:
    """The judge with its origin's scores, `folder/file`, written into the manifest. Once: its digest changes with it.

    Comparison keys do not change. Raises ValueError with fewer than 8 seeds, or if origin scores are attached already.
    """
    judge = verify_judge(folder)
    if judge.origin is not None:
        raise ValueError(f"expected no origin scores in {folder}, found {judge.origin.file}: freeze another judge")
    path = Path(folder) / file
    if not path.is_file():
        raise ValueError(f"expected the origin's scores at {path}, found no file: score the origin first")
    origin = {"file": file, "sha256": digest_file(path), "seeds": tuple(seeds)}
    fields = {
        name: getattr(judge, name) for name in Judge.model_fields if name not in ("sections", "digest", "schema_")
    }
    return _write(Path(folder), {**fields, "origin": OriginScores.parse(origin, where="origin scores")})


def load_judge(folder: Path) -> Judge:
    """The manifest, checked against its own digests and this metric. Opens no other file: scoring dev reads no target.

    Raises ValueError that names the section which was changed.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"expected a frozen judge in {folder}, found no {MANIFEST}: freeze one first")
    judge = Judge.parse(read_json(path), where=str(path))
    now = _sections(judge)
    for name in sorted(now.keys() | judge.sections.keys()):
        if now.get(name) != judge.sections.get(name):
            raise ValueError(
                f"{path}: section {name!r} was changed after freezing (expected "
                f"{judge.sections.get(name, 'none')[:12]}, got {now.get(name, 'none')[:12]}): "
                "restore the manifest or freeze a new judge"
            )
    if (found := digest_of(judge.sections)) != judge.digest:
        raise ValueError(
            f"{path}: the sections hash to {found[:12]}, the manifest says {judge.digest[:12]}: restore the manifest "
            "or freeze a new judge"
        )
    if judge.metric != METRIC_VERSION:
        raise ValueError(
            f"expected metric {judge.metric!r}, with which the judge in {folder} was frozen, this package computes "
            f"{METRIC_VERSION!r}: install the version that froze it or freeze a new judge"
        )
    return judge


def verify_judge(folder: Path) -> Judge:
    """The judge, after the scoring sources, the suites' CSV files and the origin's scores were hashed again.

    For freeze, start and end of a campaign. Raises ValueError naming the first file that differs.
    """
    judge = load_judge(folder)
    now = judge_sources()
    changed = sorted(name for name in now.keys() | judge.sources.keys() if now.get(name) != judge.sources.get(name))
    if changed:
        raise ValueError(
            f"the judge's source changed since {judge.digest[:8]} was frozen ({', '.join(changed[:3])}"
            f"{', …' if len(changed) > 3 else ''}): scores would not compare; check out the version that froze it, "
            "or freeze a new judge"
        )
    for suite in (judge.dev, judge.external):
        if isinstance(suite, CsvSuite):
            read_csv(suite)
    if judge.origin is not None:
        _check_origin(Path(folder) / judge.origin.file, judge.origin)
    return judge


def judge_sources() -> dict[str, str]:
    """sha256 of every source file of `eval/` and of the puzzles, by path relative to the package root."""
    here = Path(__file__).resolve().parent
    puzzles = here.parent / "substrate" / "puzzles"
    files = [*here.rglob("*.py"), *puzzles.rglob("*.py")]
    return {path.relative_to(here.parent).as_posix(): digest_file(path) for path in sorted(files)}


def _declared(suite: GeneratedSuite | CsvSuite) -> list[str]:
    return list(suite.items_per_family if isinstance(suite, GeneratedSuite) else suite.items)


def _sections(judge: Judge) -> dict[str, str]:
    whole = judge.model_dump(mode="json", by_alias=True, exclude={"sections": True, "digest": True, "engine": MOVABLE})
    for suite in (whole["dev"], whole["external"]):
        if suite is not None:
            # A CSV is known by its bytes, so a judge may move to where the file lies elsewhere.
            suite.pop("path", None)
    return {name: digest_of(value) for name, value in whole.items()}


def _write(folder: Path, fields: dict[str, Any]) -> Judge:
    draft = Judge.parse({**fields, "sections": {}, "digest": ""}, where="judge")
    sections = _sections(draft)
    judge = draft.replace(sections=sections, digest=digest_of(sections))
    make_folder(folder)
    write_json(folder / MANIFEST, judge.model_dump(mode="json", by_alias=True))
    (folder / MANIFEST).chmod(0o600)
    return judge


def _check_origin(path: Path, origin: OriginScores) -> None:
    if not path.is_file():
        raise ValueError(f"expected the origin's scores at {path}, found no file: restore it or score the origin again")
    if (found := digest_file(path)) != origin.sha256:
        raise ValueError(
            f"expected {path} with sha256 {origin.sha256[:12]}, got {found[:12]}: restore it or score the origin again"
        )
