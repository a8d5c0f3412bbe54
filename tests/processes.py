"""Ending the processes that a test started, whatever became of them."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LIMIT = 900.0  # seconds for anything that a test waits for: many times what it takes, also on a busy machine


def wait_until(true: Callable[[], object], what: str) -> None:
    """Until something is so that another process brings about."""
    end = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < end, f"waited {LIMIT:g} s for {what}"
        time.sleep(0.01)


@contextmanager
def ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """Kill it, and all that it started, when the block ends."""
    with process:
        try:
            yield process
        finally:
            for number in [process.pid, *descendants(process.pid)]:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)


def descendants(number: int) -> list[int]:
    """Children of a process, and theirs."""
    with suppress(OSError):
        children = [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
        return children + [descendant for child in children for descendant in descendants(child)]
    return []
