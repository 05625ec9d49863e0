"""Being told to stop: SIGTERM sets a flag that the training loop reads between two steps.

Schedulers and supervisors send SIGTERM and wait a while before they kill. Ranks hear it at different moments, or not
all of them, so the loop asks whether any rank has (`Trainer.on_any_rank`): all save and leave after the same step.
"""

import signal
from types import FrameType, TracebackType

AGAIN_STATUS = 75  # EX_TEMPFAIL: saved, the same command goes on; as the launcher's and the controller's own


class Interrupted(Exception):
    """Training stopped as asked, saved after `steps` steps, on all ranks."""

    def __init__(self, steps: int) -> None:
        super().__init__(f"stopped as asked and saved after step {steps}: the same command goes on from there")
        self.steps = steps


class StopFlag:
    """Whether this process was told to stop while the flag listened.

    Entered before torch is imported, which takes seconds: until then SIGTERM would kill at once.
    """

    def __init__(self) -> None:
        self._asked = False

    def __call__(self) -> bool:
        return self._asked

    def __enter__(self) -> "StopFlag":
        self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True
