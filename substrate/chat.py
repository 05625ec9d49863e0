"""The chat format of the Nemotron-3 checkpoints: what the model reads up to its answer, and what it should write.

    <|im_start|>system
    <|im_end|>
    <|im_start|>user
    QUESTION<|im_end|>
    <|im_start|>assistant
    <think>
    TRACE
    </think>
    ANSWER<|im_end|>

Thinking is on or off for the whole text: off, the answer follows an empty `<think></think>` at once. The system turn is
always there, empty where nothing is said. Token for token the prompt formatter `nemotron-nano-v3` of nemo-toolkit 3.
"""

from megatron_evolve.substrate.puzzles.row import ANSWER_STYLE, BOX_CLOSE, BOX_OPEN, CHALLENGE_SUFFIX, Row

TURN, END = "<|im_start|>", "<|im_end|>"
THINK, THOUGHT = "<think>", "</think>"


def chat_prompt(question: str, *, system: str = "", thinking: bool = True) -> str:
    """The text that the model goes on from, for one question."""
    turns = "".join(f"{TURN}{role}\n{text}{END}\n" for role, text in (("system", system), ("user", question)))
    return f"{turns}{TURN}assistant\n" + (f"{THINK}\n" if thinking else f"{THINK}{THOUGHT}")


def puzzle_prompt(prompt: str) -> str:
    """A puzzle as the challenge's metric asks it: its suffix, no system text, thinking on."""
    return chat_prompt(prompt + CHALLENGE_SUFFIX)


def puzzle_parts(row: Row, style: str) -> tuple[str, str, str]:
    """Prompt, thinking and boxed answer of a row, which a completion's end of text follows."""
    trace = "" if style == ANSWER_STYLE else row.traces[style]
    return puzzle_prompt(row.prompt), f"{trace.strip()}\n{THOUGHT}\n", f"{BOX_OPEN}{row.answer}{BOX_CLOSE}"
