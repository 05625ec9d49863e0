"""The order to stop: from a signal to this process, or from a file that outlives it.

A drain waits for what runs, for hours perhaps. A controller that dies in it, or is put back into a queue, is started
again by no person, so the file stays until somebody's next command is all that can start the campaign again. It is
never forgotten half way: once given, the order holds for this controller, though the file be taken away.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron_evolve.desk import Awaiting, Stopped, Unavailable
from megatron_evolve.retries import Paused

ENDS = (Stopped, Unavailable, Awaiting, Paused)  # with statuses that no scheduler starts again


@dataclass
class StopOrder:
    """Asks whether this controller is to stop.

    file     an operator's order
    signal   whether this process was told to
    moved    whether a scheduler may have told it, which starts it again elsewhere: then the file is for that start too
    """

    file: Path
    signal: Callable[[], bool]
    moved: Callable[[], bool] = lambda: False
    _given: bool = field(default=False, init=False)

    def __call__(self) -> bool:
        self._given = self._given or self.signal() or self.file.exists()
        return self._given

    @contextmanager
    def carried_out(self) -> Iterator[None]:
        """Removes the file once the campaign has closed, or ended so that only a person starts it again."""
        try:
            yield
        except ENDS:
            self._done()
            raise
        self._done()

    def _done(self) -> None:
        if not self.moved():
            self.file.unlink(missing_ok=True)
