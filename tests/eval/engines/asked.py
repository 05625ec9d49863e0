"""What the engines' tests ask: prompts, a run without a model, and settings whose patience fits a test."""

from pathlib import Path
from typing import Any

from megatron_evolve.eval.engines.seam import Completion, Examinee, Prompt
from megatron_evolve.eval.engines.settings import OpenAISettings, Patience
from megatron_evolve.substrate.tokenizer import nano_tokenizer
from tests.eval.engines.fake_endpoint import answer_of, pieces_of

SHORT = {
    "connect_seconds": 5,
    "stall_seconds": 30,
    "request_seconds": 30,
    "retries": 3,
    "backoff_seconds": 0.01,
    "longest_wait_seconds": 2,
}


def prompts(count: int) -> list[Prompt]:
    """Nano prompts, all different."""
    return [Prompt.of(f"numeral\n{100 + number}", "nano", nano_tokenizer()) for number in range(count)]


def expected(asked: list[Prompt], max_new_tokens: int) -> list[Completion]:
    """What the fake endpoint answers to prompts as text."""
    wanted = []
    for prompt in asked:
        pieces, reason, num_tokens = pieces_of(prompt.text, max_new_tokens)
        cut = reason == "length"
        wanted.append(Completion("".join(pieces), num_tokens if cut else num_tokens - 1, cut))
        assert cut or wanted[-1].text == answer_of(prompt.text)
    return wanted


def examinee(folder: Path) -> Examinee:
    """A run with a checkpoint's manifest and nothing else: enough to be named."""
    run = folder / "run"
    (run / "checkpoint").mkdir(parents=True, exist_ok=True)
    (run / "checkpoint" / "manifest.json").write_text("{}")
    return Examinee(folder / "substrate", None, run, nano_tokenizer(), folder / "work")


def settings(patience: dict[str, Any] | None = None, **changes: Any) -> OpenAISettings:
    """An endpoint's settings with the patience of a test."""
    document = {"kind": "openai", "max_new_tokens": 40, "concurrency": 4, **changes}
    return OpenAISettings(**document, patience=Patience(**{**SHORT, **(patience or {})}))
