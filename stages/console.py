"""What a person sees while a stage works: a bar on a terminal, a line per interval otherwise."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from pipeline.errors import RunError
from pipeline.storage.progress import EVERY, PROGRESS_FILE, Pace, Progress, time_left
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
        self._last_line = self._last_written = 0.0
        self._stop = False
        self._pace = Pace()
        self._folder: Path | None = None
        self._values: dict[str, float] = {}

    def note(self, text: str) -> None:
        """A line of its own."""
        if self.silent:
            return
        if self._bar is not None:
            tqdm.write(plain(f"{self.prefix}{text}"), file=sys.stderr)
        else:
            say(f"{self.prefix}{text}")

    @contextmanager
    def telling(self, folder: Path) -> Iterator[None]:
        """Meanwhile progress is also written into a stage's folder, for `mpl status`."""
        self._folder, self._pace, self._values = folder, Pace(), {}
        try:
            yield
        finally:
            self._folder = None
            with suppress(OSError):
                (folder / PROGRESS_FILE).unlink(missing_ok=True)

    def progress(self, done: int, total: int, values: dict[str, float], unit: str = "steps") -> None:
        """Advance the bar, or print a line at most every ten seconds and at the end; with the time that is left."""
        if self.silent:
            return
        self._values = values or self._values
        left, now = self._pace.seconds_left(done, total), time.monotonic()
        if self._folder is not None and now - self._last_written > EVERY:
            self._last_written = now
            with suppress(OSError, ValueError, RunError):  # a full disk is told of by what matters; NaN is no JSON
                Progress.now(done, total, unit, left, self._values).write(self._folder)
        if self.quiet:
            return
        if sys.stderr.isatty():
            self._advance(done, total, values, unit)
        elif now - self._last_line > INTERVAL or (values and done == total):
            self._last_line = now
            words = (f"{done:,}/{total:,} {unit}", _figures(self._values), time_left(left) if done < total else "")
            self.note("  " + "  ".join(word for word in words if word))

    def _advance(self, done: int, total: int, values: dict[str, float], unit: str) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=total, initial=done, unit=f" {unit}", file=sys.stderr, leave=False, dynamic_ncols=True
            )
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
