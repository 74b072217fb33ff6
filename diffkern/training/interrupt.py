"""Ctrl-C that waits for the end of a training step."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped ``Trainer.fit`` between two steps; ``checkpoint`` is what it saved, or None."""

    def __init__(self, step: int, checkpoint: Path | None) -> None:
        where = f"saved to {checkpoint}" if checkpoint else "nothing saved, there is no output folder"
        super().__init__(f"training interrupted after step {step}; {where}")
        self.checkpoint = checkpoint


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether SIGINT has come; only a second one interrupts at once.

    Off the main thread, where Python delivers no signals, and where SIGINT is ignored (a job
    started in the background by a shell), nothing is changed.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous in (signal.SIG_IGN, None):
        yield lambda: False
        return
    asked = threading.Event()

    def remember(signum: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, remember)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
