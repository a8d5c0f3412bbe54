"""What a person sees while a stage works: a bar on a terminal, a line per interval otherwise."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tqdm import tqdm

from stages.terminal import plain, say

INTERVAL = 10.0  # seconds between lines where there is no terminal


def on_validation(result: dict[str, Any]) -> str:
    """What a training's record says of its accuracy."""
    validation = result["validation"]
    return "there is no validation split" if validation is None else f"{validation['top1']:.2f}% on validation"


class Console:
    """Text for people, on standard error. Implements `pipeline.training.Observer`.

    Args:
        quiet: only notes.
        prefix: of every line.
        silent: not even notes; for every process of a training but the first.
    """

    def __init__(self, *, quiet: bool = False, prefix: str = "", silent: bool = False) -> None:
        self.quiet, self.prefix, self.silent = quiet or silent, prefix, silent
        self._bar: Any = None
        self._last_line = 0.0
        self._stop = False

    def note(self, text: str) -> None:
        """A line of its own."""
        if self.silent:
            return
        if self._bar is not None:
            tqdm.write(plain(f"{self.prefix}{text}"), file=sys.stderr)
        else:
            say(f"{self.prefix}{text}")

    def progress(self, done: int, total: int, values: dict[str, float]) -> None:
        """Advance the bar, or print a line at most every ten seconds and at the end."""
        if self.quiet:
            return
        if sys.stderr.isatty():
            self._advance(done, total, values)
        elif values and (time.monotonic() - self._last_line > INTERVAL or done == total):
            self._last_line = time.monotonic()
            self.note(f"  {done:,}/{total:,}  {_figures(values)}")

    def _advance(self, done: int, total: int, values: dict[str, float]) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, initial=done, file=sys.stderr, leave=False, dynamic_ncols=True)
        self._bar.update(done - self._bar.n)
        if values:
            self._bar.set_postfix_str(_figures(values))
        if done >= total:
            self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def stop_requested(self) -> bool:
        """Whether Ctrl-C (or SIGTERM) was received inside `graceful_stop`."""
        return self._stop

    @contextmanager
    def graceful_stop(self) -> Iterator[None]:
        """First Ctrl-C: save and stop at the next step. Second: at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True
            self.note("Stopping after this step (again to stop at once) …")

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _figures(values: dict[str, float]) -> str:
    shown = ("loss", "feedback_loss", "labels_changed", "validation_top1", "images_per_second", "rows_per_second")
    short = {"images_per_second": "images/s", "rows_per_second": "rows/s", "validation_top1": "validation top-1"}
    return "  ".join(f"{short.get(name, name)} {values[name]:.4g}" for name in shown if name in values)
