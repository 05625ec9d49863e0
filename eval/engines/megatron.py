"""Engine `megatron`: the run's own model, decoded greedily with state caches by `generate`."""

from collections.abc import Sequence

from megatron_evolve.eval.engines.seam import Answers, Completion, Examinee, Prompt
from megatron_evolve.eval.engines.settings import MegatronSettings
from megatron_evolve.eval.generate import generate


def ask(settings: MegatronSettings, examinee: Examinee, prompts: Sequence[Prompt]) -> Answers:
    """Every prompt answered by the model as it was trained."""
    tokenizer = examinee.tokenizer
    generations = generate(
        examinee.open(),
        [list(prompt.tokens) for prompt in prompts],
        max_new_tokens=settings.max_new_tokens,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        batch_size=settings.batch_size,
        tell=examinee.tell,
    )
    return Answers(
        tuple(Completion(tokenizer.decode(one.tokens), len(one.tokens), one.truncated) for one in generations)
    )
