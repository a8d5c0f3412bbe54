"""How far a stage is, in a small file beside its record: another process can see it (`mpl status`)."""

import os
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import RunError
from pipeline.storage.files import read_json, write_json

PROGRESS_FILE = "progress.json"
EVERY = 2.0  # seconds between two writings
WINDOW = 60.0  # seconds that the pace is measured over
SPACING = 1.0  # seconds between two measurements that are kept
FORGOTTEN = 3600.0  # seconds of silence after which a process of that number is taken for another one


class Pace:
    """Units a second over the last minute, and what is left at that pace.

    Args:
        clock: seconds; grows.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def seconds_left(self, done: int, total: int) -> float | None:
        """Seconds from `done` to `total`; None while nothing is known. What the first call has done took no time."""
        now = self._clock()
        if not self._seen or now - self._seen[-1][0] >= SPACING:
            self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= WINDOW:
            self._seen.popleft()
        began, before = self._seen[0]
        if done <= before or now <= began:
            return None
        return (total - done) * (now - began) / (done - before)


@dataclass(frozen=True)
class Progress:
    """How far a stage is.

    Attributes:
        done, total: of `unit`.
        unit: steps, images, shards, stages.
        seconds_left: at the present pace; None: not known yet.
        values: figures by name.
        process, host: who works.
        updated: seconds since the epoch.
    """

    done: int
    total: int
    unit: str
    seconds_left: float | None
    values: dict[str, float]
    process: int
    host: str
    updated: float

    @classmethod
    def now(cls, done: int, total: int, unit: str, seconds_left: float | None, values: dict[str, float]) -> "Progress":
        """Of this process."""
        return cls(done, total, unit, seconds_left, values, os.getpid(), socket.gethostname(), time.time())

    def write(self, folder: Path) -> None:
        """Into a stage's folder; whole or not at all."""
        write_json(folder / PROGRESS_FILE, asdict(self))

    def is_working(self) -> bool:
        """Whether the process is there; of another host, whether it wrote within a minute."""
        silence = time.time() - self.updated
        if self.host != socket.gethostname():
            return silence < WINDOW
        try:
            os.kill(self.process, 0)
        except PermissionError:  # it is there, and somebody else's
            pass
        except (OSError, OverflowError):
            return False
        return silence < FORGOTTEN


def read_progress(folder: Path) -> Progress | None:
    """What a stage last wrote; None: nothing, or nothing that can be read."""
    try:
        content: dict[str, Any] = read_json(folder / PROGRESS_FILE)
        return TypeAdapter(Progress).validate_python(content)
    except (RunError, ValidationError):
        return None


def time_left(seconds: float | None) -> str:
    """'40 s left', '8 min left', '2 h 10 min left', or nothing."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s left"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min left"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min left" if hours < 48 else f"{hours / 24:.1f} days left"
