"""The seam of the engines: prompts in, completions out, whoever decodes.

    items --judge--> prompts --ask(engine, examinee)--> completions --judge--> scores

An engine is told prompts and the run, never an item: what it could give away it does not have. Its answer comes whole,
one completion for each prompt in their order, or not at all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_evolve.eval.engines.settings import check_clamp
from megatron_evolve.eval.engines.versions import check_packages
from megatron_evolve.substrate.chat import puzzle_prompt
from megatron_evolve.substrate.checkpoint_tokenizer import CheckpointTokenizer
from megatron_evolve.substrate.digest import digest_file
from megatron_evolve.substrate.manifest import Substrate
from megatron_evolve.substrate.puzzles.row import CHALLENGE_SUFFIX, question_text
from megatron_evolve.substrate.tokenizer import PieceTokenizer

if TYPE_CHECKING:
    from megatron_evolve.eval.judge import AnyEngine

AnyTokenizer = PieceTokenizer | CheckpointTokenizer
CHECKPOINT_MANIFEST = "checkpoint/manifest.json"


@dataclass(frozen=True)
class Prompt:
    """One question in the three forms that an engine may want."""

    text: str  # what the model reads, up to where it answers
    tokens: tuple[int, ...]  # the same, as the substrate's tokenizer cuts it
    message: str  # what a user says where the server knows the chat format

    @classmethod
    def of(cls, prompt: str, difficulty: str, tokenizer: AnyTokenizer) -> "Prompt":
        """As rows are written to train on: in the chat format for a real checkpoint's tokenizer, plain otherwise."""
        if isinstance(tokenizer, CheckpointTokenizer):
            text, message = puzzle_prompt(prompt), prompt + CHALLENGE_SUFFIX
        else:
            text = message = question_text(prompt, difficulty)  # exported, its chat template is the message itself
        return cls(text, tuple(tokenizer.encode(text)), message)


@dataclass(frozen=True)
class Completion:
    """What came back. `num_tokens` does not count the end token; `truncated`: the budget ended before the model did."""

    text: str
    num_tokens: int
    truncated: bool


@dataclass(frozen=True)
class Answers:
    """Completions in the order of the prompts, and what is known of the engine only once it has run.

    `about` is what it said of itself and belongs to the comparison key; `account` counts what went wrong on the way.
    """

    completions: tuple[Completion, ...]
    about: Mapping[str, str] = field(default_factory=dict)
    account: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Examinee:
    """The run that is asked, and a folder for what an engine leaves behind.

    An engine calls `tell` with how many prompts are answered and how many there are.
    """

    substrate_folder: Path
    substrate: Substrate
    run: Path
    tokenizer: AnyTokenizer
    work: Path
    tell: Callable[[int, int], None] = lambda answered, prompts: None

    @property
    def is_substrate(self) -> bool:
        """Whether it is the substrate's own model."""
        return self.run.resolve() == self.substrate_folder.resolve()

    @cached_property
    def name(self) -> str:
        """Twelve digits that name the weights: of the checkpoint's manifest, or of the substrate itself."""
        if self.is_substrate:
            return self.substrate.digest[:12]
        path = self.run / CHECKPOINT_MANIFEST
        if not path.is_file():
            raise ValueError(f"expected a trained run in {self.run}, found no {CHECKPOINT_MANIFEST}: train it first")
        return digest_file(path)[:12]

    def open(self) -> Any:
        """The model, in evaluation mode. Raises ValueError if the checkpoint is damaged or of another substrate."""
        from megatron_evolve.substrate.train.open import open_trained

        return open_trained(self.substrate_folder, self.substrate, self.run)


def ask(engine: "AnyEngine", examinee: Examinee, prompts: Sequence[Prompt]) -> Answers:
    """Every prompt answered by the judge's engine. Raises ValueError in one sentence if one of them can't be."""
    check_packages(engine, getattr(engine, "packages", {}))
    check_clamp(engine, examinee.substrate.architecture["dt_min"])
    if engine.kind == "megatron":
        from megatron_evolve.eval.engines.megatron import ask as decode
    elif engine.kind == "transformers":
        from megatron_evolve.eval.engines.in_process import ask as decode
    else:
        from megatron_evolve.eval.engines.served import ask as decode
    answers = decode(engine, examinee, prompts)
    assert len(answers.completions) == len(prompts), f"{engine.kind}: {len(answers.completions)} of {len(prompts)}"
    return answers
