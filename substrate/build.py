"""From nothing to a frozen substrate: pre-train a preset's model on its own puzzles, then freeze weights, tokenizer,
manifest.

    python -m megatron_evolve.substrate.build --preset nano-cpu --out DIR --seed N [--cue-rate FAMILY=0.9 ...]

The weights are trained without cues, whatever the pool that candidates will draw from: so substrates that differ only
in their pool share them, and `refreeze` makes one from another in milliseconds. A killed build goes on where it was.
Learning comes in jumps between steps 150 and 450, so a build is a number of steps, never a time.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_evolve.launch.rundir import RunDirError, make_folder, publish, write_whole
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.frozen import nearest
from megatron_evolve.substrate.manifest import (
    MANIFEST,
    Construction,
    Substrate,
    describe_file,
    read_manifest,
    samples_of,
    sealed,
    trainer_sources,
    verify,
    write_manifest,
)
from megatron_evolve.substrate.mix import Mix
from megatron_evolve.substrate.model.architecture import NANO_CPU, Architecture
from megatron_evolve.substrate.packing import Packer
from megatron_evolve.substrate.puzzles import families
from megatron_evolve.substrate.puzzles.row import ANSWER_STYLE
from megatron_evolve.substrate.recipe import Recipe
from megatron_evolve.substrate.settings import Settings
from megatron_evolve.substrate.tokenizer import PieceTokenizer, challenge_tokenizer, nano_tokenizer
from megatron_evolve.substrate.train.fit import RESUME_FOLDER, fit
from megatron_evolve.substrate.train.open import TOKENIZER_FILE, WEIGHTS_FILE
from megatron_evolve.substrate.train.preload import preload

BUILD_FOLDER = "build"  # metrics of the pre-training stay there, nothing in it is frozen
SAVE_EVERY = 50


@dataclass(frozen=True)
class Preset:
    """What a build starts from. `exposure` is the family weight of the pre-training: the dial that sets how hard a
    family is for the frozen model. `trace_share` of the rows carry a trace, so that candidates may ask for either
    form."""

    name: str
    architecture: Architecture
    difficulty: str
    exposure: Mapping[str, float]
    trace_share: float
    pretraining: Recipe
    tuning: Recipe  # the default recipe: plain, not the best

    def tokenizer(self) -> PieceTokenizer:
        return nano_tokenizer() if self.difficulty == "nano" else challenge_tokenizer()

    def mix(self, weight: Mapping[str, float]) -> Mix:
        """Answers only, in these shares."""
        styles = dict.fromkeys(weight, ANSWER_STYLE)
        return Mix(weight=dict(weight), style=styles, difficulty=self.difficulty)

    def construction(self, cue_rate: Mapping[str, float]) -> Construction:
        """The operator's pool with this cue rate by family, 0 where not named. Raises ValueError for an unknown one."""
        for family, rate in cue_rate.items():
            if family not in self.exposure:
                raise ValueError(f"no family {family!r} for a cue rate{nearest(family, list(self.exposure))}")
            if not 0 <= rate <= 1:
                raise ValueError(f"the cue rate of {family} must be in [0, 1]; got {rate}")
        return Construction(
            families=tuple(self.exposure),
            difficulty=self.difficulty,
            cue_rate={family: rate for family, rate in sorted(cue_rate.items()) if rate > 0},
            styles={family: families.styles_of(family, self.difficulty) for family in self.exposure},
        )

    def default(self) -> Settings:
        """Equal shares, answers only, the plain recipe: the origin of every comparison."""
        return Settings(mix=self.mix(dict.fromkeys(self.exposure, 1.0)), recipe=self.tuning)


def _shapes(name: str, **shapes: Any) -> Architecture:
    """The nano architecture with these shapes.

    Weights start three times wider than the 0.02 of large models: at width 64 that reaches the same accuracy about 100
    steps earlier (nano rows, 500 steps: .50 against .37).
    """
    return Architecture.model_validate(NANO_CPU.model_dump() | {"name": name, "init_std": 0.06} | shapes)


NANO = Preset(
    name="nano-cpu",
    architecture=_shapes("nano-cpu"),
    difficulty="nano",
    # Equal shares would leave equation at the guesser's .2 and teach cipher, which is learned in one jump, whole.
    exposure={
        "numeral": 0.3,
        "gravity": 0.95,
        "unit_conversion": 0.95,
        "cipher": 0.9,
        "bit_manipulation": 1.3,
        "equation": 1.35,
    },
    trace_share=0.3,
    pretraining=Recipe(lr=6e-3, steps=420, warmup_steps=20, weight_decay=0.01, prompt_loss_weight=0.3),
    tuning=Recipe(lr=3e-3, steps=140),
)

# Rows of the real task: prompts five times longer, wider rule spaces. A million parameters learn numerals and not much
# else.
CHALLENGE = Preset(
    name="challenge-cpu",
    architecture=_shapes(
        "challenge-cpu",
        hidden_size=96,
        head_dim=24,
        mamba_num_heads=12,
        num_experts=8,
        expert_ffn_size=192,
        shared_ffn_size=192,
        max_sequence_length=512,
    ),
    difficulty="challenge",
    exposure=dict.fromkeys(families.FAMILIES, 1.0),
    trace_share=0.3,
    pretraining=Recipe(
        lr=6e-3,
        steps=300,
        batch_size=32,
        sequence_length=512,
        warmup_steps=20,
        weight_decay=0.01,
        prompt_loss_weight=0.3,
    ),
    tuning=Recipe(lr=3e-3, steps=140, batch_size=32, sequence_length=512),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in (NANO, CHALLENGE)})


def preset_named(name: str) -> Preset:
    """The preset of this name. Raises ValueError with the nearest ones."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}{nearest(name, list(PRESETS))}")
    return PRESETS[name]


def build_substrate(preset: Preset, folder: Path, seed: int, cue_rate: Mapping[str, float] | None = None) -> Substrate:
    """Train and freeze `preset` in `folder`; one seed, one digest on one machine. A finished build is verified and
    returned.

    Joins a process group of one for the training and leaves it. Raises ValueError if `folder` holds another substrate.
    """
    construction = preset.construction(cue_rate or {})
    recipe, mix = preset.pretraining, preset.mix(preset.exposure)
    record = {"preset": preset.name, "seed": seed, "trace_share": preset.trace_share}
    record["settings"] = Settings(mix=mix, recipe=recipe).model_dump(mode="json")
    if (folder / MANIFEST).is_file():
        return _finished(folder, record, construction)
    make_folder(folder)
    tokenizer = preset.tokenizer()
    architecture = preset.architecture.with_vocab(tokenizer.vocab_size)
    packer = Packer(mix, preset.construction({}), tokenizer, recipe, seed, trace_share=preset.trace_share)
    _pretrain(packer, architecture, folder, digest_of({**record, "architecture": architecture.model_dump()}))
    write_whole(folder / TOKENIZER_FILE, tokenizer.to_json())
    return _freeze(
        folder,
        (WEIGHTS_FILE, TOKENIZER_FILE),
        name=preset.name,
        architecture=architecture.model_dump(mode="json"),
        construction=construction,
        default=preset.default(),
        build=record,
    )


def refreeze(folder: Path, new_folder: Path, *, construction: Construction) -> Substrate:
    """A sibling of the substrate in `folder`: the same weights, another pool. The trainer is this version's.

    Raises ValueError if `new_folder` holds a substrate with another pool or other weights.
    """
    old = verify(folder, trainer=False)
    if (new_folder / MANIFEST).is_file():
        new = _finished(new_folder, old.build, construction)
        if new.files != old.files:
            raise ValueError(f"{new_folder} holds a substrate with other weights than {folder}; choose another folder")
        return new
    make_folder(new_folder)
    for name in old.files:
        partial = new_folder / f".{name}.tmp"
        shutil.copyfile(folder / name, partial)  # never in memory: an imported checkpoint may have a terabyte
        publish(partial, new_folder / name)
    same = {"name": old.name, "architecture": old.architecture, "default": old.default, "build": old.build}
    return _freeze(new_folder, tuple(old.files), construction=construction, **same)


def _finished(folder: Path, record: dict[str, Any], construction: Construction) -> Substrate:
    found = read_manifest(folder)
    if (found.build, found.construction) != (record, construction):
        raise ValueError(
            f"{folder} holds substrate {found.digest[:8]} of another build (preset, seed, pool or settings differ); "
            "choose another folder or remove it"
        )
    return verify(folder)


def _pretrain(packer: Packer, architecture: Architecture, folder: Path, run: str) -> None:
    """Writes the trained weights to `folder`. Raises ValueError if the training diverges."""
    preload()
    from megatron_evolve.substrate.model import build
    from megatron_evolve.substrate.model.weights import save_weights

    build.start(packer.seed)
    try:
        model = build.build_model(architecture, seed=packer.seed)
        make_folder(folder / BUILD_FOLDER)
        teller = _Teller(packer.recipe.steps)
        fitted = fit([model], packer, folder / BUILD_FOLDER, run=run, save_every=SAVE_EVERY, tell=teller)
        if fitted.diverged is not None:
            raise ValueError(
                f"the build diverged at step {fitted.diverged[0]}: {fitted.diverged[1]}; choose another seed or lr"
            )
        save_weights(model, folder / WEIGHTS_FILE)
    finally:
        build.stop()
    shutil.rmtree(folder / BUILD_FOLDER / RESUME_FOLDER, ignore_errors=True)


class _Teller:
    """Progress on stderr: a line every five seconds."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._start = self._told = time.monotonic()
        self._first: int | None = None

    def __call__(self, step: int, loss: float) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = step
        if now - self._told < 5 and step + 1 < self._steps:
            return
        self._told = now
        left = (now - self._start) / (step + 1 - self._first) * (self._steps - step - 1)
        print(f"step {step + 1} of {self._steps}, loss {loss:.3f}, {left:.0f} s left", file=sys.stderr, flush=True)


def _freeze(folder: Path, names: tuple[str, ...], **fields: Any) -> Substrate:
    files = {name: describe_file(folder / name) for name in names}
    samples = samples_of(folder, files)
    substrate = sealed({**fields, "trainer": trainer_sources(), "files": files, "samples": samples})
    write_manifest(folder, substrate)
    return substrate


def main(argv: list[str]) -> int:
    """Build one substrate; prints its digest."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_evolve.substrate.build", description="pre-train and freeze"
    )
    parser.add_argument("--preset", required=True, help=", ".join(PRESETS))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument(
        "--cue-rate", nargs="*", default=[], metavar="FAMILY=RATE", help="cue of the pool; 0 if not named"
    )
    arguments = parser.parse_args(argv)
    try:
        cue_rate = dict(_cue_rate(text) for text in arguments.cue_rate)
        substrate = build_substrate(preset_named(arguments.preset), arguments.out, arguments.seed, cue_rate)
    except (ValueError, OSError, RunDirError) as error:
        print(f"megatron-evolve substrate build: {error}", file=sys.stderr)
        return 1
    print(substrate.digest)
    return 0


def _cue_rate(text: str) -> tuple[str, float]:
    family, _, rate = text.partition("=")
    try:
        return family, float(rate)
    except ValueError:
        raise ValueError(f"expected FAMILY=RATE such as cipher=0.9, got {text!r}") from None


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
