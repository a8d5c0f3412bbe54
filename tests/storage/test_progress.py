"""How far a stage is: the pace against arithmetic, and what another process may believe of the file."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.storage.progress import PROGRESS_FILE, Pace, Progress, read_progress, time_left


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_pace_is_that_of_the_last_minute() -> None:
    """Two a second for a while, then ten a second for over a minute: what is left goes by the latter."""
    clock = Clock()
    pace = Pace(clock)
    assert pace.seconds_left(100, 5000) is None  # what was there took no time of ours
    done = 100
    for rate, seconds in ((2, 100), (10, 90)):
        for _ in range(seconds):
            clock.now += 1
            done += rate
            left = pace.seconds_left(done, 5000)
        assert left == pytest.approx((5000 - done) / rate, rel=0.02)


def test_of_very_many_calls_few_are_kept() -> None:
    clock = Clock()
    pace = Pace(clock)
    for done in range(100_000):
        clock.now += 0.001
        left = pace.seconds_left(done, 200_000)
    assert left == pytest.approx(100, rel=0.02)
    assert len(pace._seen) < 70


def test_without_progress_nothing_is_promised() -> None:
    clock = Clock()
    pace = Pace(clock)
    for _ in range(5):
        clock.now += 30
        assert pace.seconds_left(3, 10) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""), (0.4, "0 s left"), (89, "89 s left"), (90, "2 min left"), (5000, "83 min left"),
        (5400, "1 h 30 min left"), (86400, "24 h 0 min left"), (259200, "3.0 days left"),
    ],
)  # fmt: skip
def test_time_in_words(seconds: float | None, text: str) -> None:
    assert time_left(seconds) == text


def test_another_process_reads_what_was_written(tmp_path: Path) -> None:
    progress = Progress.now(3, 10, "images", 7.5, {"images_per_second": 2.0})
    progress.write(tmp_path)
    assert read_progress(tmp_path) == progress
    assert progress.is_working()
    assert progress.process == os.getpid()


def test_a_process_that_is_gone_does_not_work() -> None:
    progress = Progress.now(3, 10, "images", None, {})
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert not replace(progress, process=gone.pid).is_working()
    assert not replace(progress, updated=progress.updated - 7200).is_working()  # another one has its number by now
    assert replace(progress, host="elsewhere").is_working()
    assert not replace(progress, host="elsewhere", updated=progress.updated - 61).is_working()
    assert not replace(progress, process=2**70).is_working()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"done": "x"}', "null", '{"done": 1, "total": 2, "unit": 3}'])
def test_what_is_no_progress_is_none(tmp_path: Path, content: str) -> None:
    assert read_progress(tmp_path) is None
    (tmp_path / PROGRESS_FILE).write_text(content)
    assert read_progress(tmp_path) is None
