"""The substrate: what every candidate forks and nobody changes, as one manifest with one digest.

A frozen substrate is a folder: `weights.safetensors` (or its shards), `tokenizer.json`, of an imported checkpoint its
other small files, and, written last, `manifest.json`. The manifest names each file with its sha256, the data
construction (which rows the operator's pool can give), the trainer's source files, and the default settings. The digest
over all of that is the substrate's name.

What is checked when. `verify` hashes every byte: at a campaign's start and each time its controller starts again, by
`megatron-evolve verify` and `substrate verify`, and before a copy or an export. `check_start` is for a training run,
which starts a hundred times a campaign on weights of up to 1.1 TB: the manifest, the trainer's sources and every size,
files below 64 MiB whole, and of larger ones a sample, whose digest the manifest holds too. It finds a file that is
missing, truncated, replaced or copied in part; a byte changed between the sampled chunks only `verify` finds.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megatron_evolve.launch.rundir import read_json, write_json
from megatron_evolve.substrate.digest import SAMPLED_FROM_BYTES, digest_file, digest_of, digest_sample
from megatron_evolve.substrate.frozen import Frozen
from megatron_evolve.substrate.settings import Settings

MANIFEST = "manifest.json"

# What times, compiles or plans, and which no trainer imports: it may be updated under a frozen substrate.
MEASURES = ("kernels/bench/", "kernels/gpu_check.py", "kernels/offline.py", "kernels/roofline.py")
MEASURES += ("substrate/gpu_check.py", "substrate/gpu_steps.py", "substrate/plan/", "substrate/speed.py")


class SourceFile(Frozen):
    """A file that belongs to a frozen folder."""

    sha256: str
    bytes: int = Field(ge=0)


class Construction(Frozen):
    """The operator's pool of training rows. Not in the mutation space: a candidate chooses shares, not the pool."""

    families: tuple[str, ...] = Field(min_length=1, description="row generators the pool holds")
    difficulty: Literal["nano", "challenge"] = Field(description="rule spaces and texts of the generators")
    cue_rate: dict[str, float] = Field(
        default_factory=dict, description="how often a surface cue gives a family's rule away in training rows"
    )
    styles: dict[str, tuple[str, ...]] = Field(description="forms of completion that each family's generator offers")


class Substrate(Frozen):
    """A frozen substrate's manifest. `digest` covers every other field."""

    schema_: Literal["substrate/1"] = Field(default="substrate/1", alias="schema")
    name: str = Field(description="preset or operator's name")
    architecture: dict[str, Any] = Field(description="shapes of the model, see substrate/model/architecture.py")
    construction: Construction
    default: Settings = Field(description="the substrate's own recipe and mix: the origin of every comparison")
    build: dict[str, Any] = Field(description="settings and seed that the weights were trained with")
    trainer: dict[str, str] = Field(description="sha256 of each source file that trains and that defines the model")
    files: dict[str, SourceFile] = Field(description="weights and tokenizer, by name within the folder")
    samples: dict[str, str] = Field(default_factory=dict, description="sha256 of the sample of each large file")
    digest: str = Field(description="sha256 of all other fields")

    def weight_paths(self, folder: Path) -> list[Path]:
        """The weight files within the substrate's folder; together they hold each tensor once."""
        return [Path(folder) / name for name in sorted(self.files) if name.endswith(".safetensors")]


def sealed(fields: dict[str, Any]) -> Substrate:
    """A manifest from its fields, with the digest filled in."""
    draft = Substrate.parse({**fields, "digest": ""}, where="substrate manifest")
    return draft.replace(digest=_digest(draft))


def _digest(substrate: Substrate) -> str:
    fields = substrate.model_dump(mode="json", exclude={"digest"})
    if not fields["samples"]:
        del fields["samples"]  # no large file, or frozen before there were samples: its name stays
    return digest_of(fields)


def trainer_sources() -> dict[str, str]:
    """sha256 of each file of `substrate/` and `kernels/` that a trained number rests on, by its path in the package.

    The kernels' tile table is one of them: a tile decides in which order a matrix product adds up.
    """
    root = Path(__file__).resolve().parent.parent
    paths = [path for room in ("kernels", "substrate") for path in (root / room).rglob("*.py")]
    named = {path.relative_to(root).as_posix(): path for path in (*paths, root / "kernels" / "tile_table.json")}
    return {name: digest_file(named[name]) for name in sorted(named) if not name.startswith(MEASURES)}


def describe_file(path: Path) -> SourceFile:
    """Size and digest of a file about to be frozen."""
    return SourceFile(sha256=digest_file(path), bytes=path.stat().st_size)


def samples_of(folder: Path, files: dict[str, SourceFile]) -> dict[str, str]:
    """The samples of those files in `folder` that are too large to be hashed at every start."""
    large = [name for name, file in files.items() if file.bytes >= SAMPLED_FROM_BYTES]
    return {name: digest_sample(folder / name) for name in large}


def write_manifest(folder: Path, substrate: Substrate) -> None:
    """Writes the manifest, last of the folder's files: a folder without it is not a substrate."""
    write_json(folder / MANIFEST, substrate.model_dump(mode="json", by_alias=True))


def read_manifest(folder: Path) -> Substrate:
    """The manifest alone, without looking at the files it names. Raises ValueError in one sentence."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} is no frozen substrate: expected {MANIFEST} in it; run `megatron-evolve substrate build`"
        )
    substrate = Substrate.parse(read_json(path), where=str(path))
    if _digest(substrate) != substrate.digest:
        raise ValueError(
            f"{path} was changed after freezing: its fields hash to {_digest(substrate)[:12]}, it says "
            f"{substrate.digest[:12]}; restore the file or freeze a new substrate"
        )
    return substrate


def verify(folder: Path, *, trainer: bool = True) -> Substrate:
    """The manifest, after every byte it names was hashed again.

    Raises ValueError naming the first file that differs. `trainer=False` leaves the source files out, for looking at a
    substrate that another version of the package froze.
    """
    substrate = read_manifest(folder)
    for name, expected in substrate.files.items():
        _check_size(Path(folder) / name, expected)
        _check_digest(Path(folder) / name, digest_file, expected.sha256)
    if trainer:
        _check_trainer(substrate)
    return substrate


def check_start(folder: Path, *, files: bool = True, trainer: bool = True) -> Substrate:
    """The manifest, after what a process that computes with the substrate checks first: seconds at any size.

    `files` is asked of one process a node, whose disk the others share; `trainer` as in `verify`. Raises ValueError.
    """
    substrate = read_manifest(folder)
    if trainer:
        _check_trainer(substrate)
    if not files:
        return substrate
    for name, expected in substrate.files.items():  # sizes first: they cost nothing and tell most
        _check_size(Path(folder) / name, expected)
    for name, expected in substrate.files.items():
        sample = substrate.samples.get(name)
        look, digest = (digest_file, expected.sha256) if sample is None else (digest_sample, sample)
        _check_digest(Path(folder) / name, look, digest)
    return substrate


def _check_size(path: Path, expected: SourceFile) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the substrate names it with {expected.bytes} bytes; restore it")
    if path.stat().st_size != expected.bytes:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, the substrate was frozen with {expected.bytes}; restore it"
        )


def _check_digest(path: Path, look: Callable[[Path], str], expected: str) -> None:
    found = look(path)
    if found != expected:
        part = " of its sample" if look is digest_sample else ""
        raise ValueError(
            f"{path} was changed: expected sha256{part} {expected[:12]}, got {found[:12]}; restore it or build anew"
        )


def _check_trainer(substrate: Substrate) -> None:
    now = trainer_sources()
    changed = sorted(
        name for name in now.keys() | substrate.trainer.keys() if now.get(name) != substrate.trainer.get(name)
    )
    if changed:
        raise ValueError(
            f"the trainer's source changed since substrate {substrate.digest[:8]} was frozen ({', '.join(changed[:3])}"
            f"{', …' if len(changed) > 3 else ''}): scores would not compare; check out the version that froze it, "
            "or build and freeze a new substrate"
        )


def public_view(substrate: Substrate) -> dict[str, Any]:
    """What a worker may know of the substrate: names, shapes, default settings; no paths."""
    view = substrate.model_dump(mode="json", include={"name", "architecture", "default", "digest"})
    construction = substrate.construction
    view["construction"] = {
        "families": list(construction.families),
        "difficulty": construction.difficulty,
        "styles": {family: list(styles) for family, styles in construction.styles.items()},
    }
    return json.loads(json.dumps(view))
