"""What a person sees while a stage works, on a terminal and without one, and what `mpl status` sees meanwhile."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.storage.progress import PROGRESS_FILE, Pace, Progress, read_progress
from pipeline.storage.runs import STARTED_FILE
from stages import console as module
from stages.console import Console
from stages.status import progress_text
from stages.terminal import say, sign_of_life


class Clock:
    """In the place of `time`: a test moves it."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(module, "Pace", lambda: Pace(made.monotonic))
    return made


def test_a_line_for_each_interval_with_the_time_that_is_left(clock: Clock, capsys) -> None:
    """Ten steps a second of a thousand: at most a line in ten seconds, and each is right about the rest."""
    console = Console()
    for step in range(1, 1001):
        clock.now += 0.1
        console.progress(step, 1000, {"loss": 0.5, "images_per_second": 640.0} if step % 50 == 0 else {})
    lines = capsys.readouterr().err.splitlines()
    assert 9 <= len(lines) <= 12
    assert lines[4].startswith("  ")
    done = int(lines[4].split("/")[0].replace(",", ""))
    assert f"/1,000 steps  loss 0.5  images/s 640  {(1000 - done) / 10:.0f} s left" in lines[4]
    assert lines[-1] == "  1,000/1,000 steps  loss 0.5  images/s 640"


def test_progress_lies_beside_the_record_while_the_stage_works(clock: Clock, tmp_path: Path, capsys) -> None:
    console = Console(quiet=True)
    with console.telling(tmp_path):
        for done in range(0, 60, 10):
            clock.now += 5
            console.progress(done, 100, {"images_per_second": 2.0}, "images")
        found = read_progress(tmp_path)
        assert found is not None
        assert (found.done, found.total, found.unit, found.seconds_left) == (50, 100, "images", pytest.approx(25))
        console.progress(60, 100, {"loss": float("nan")})  # what JSON does not know hurts nothing
        clock.now += 5
        console.progress(70, 100, {})
    assert not (tmp_path / PROGRESS_FILE).exists()
    console.progress(80, 100, {})
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""


def test_status_shows_what_is_at_work(mpl, run: Path) -> None:
    """A stage that another process works on; when that is gone, it is unfinished."""
    folder = run / "train-reduced-other"
    folder.mkdir()
    (folder / STARTED_FILE).write_text(json.dumps({"started": "2026-01-01T00:00:00+00:00"}))
    progress = Progress.now(120, 600, "steps", 240.0, {"images_per_second": 512.4})
    progress.write(folder)
    line = next(line for line in mpl("status", "--run", run).out.splitlines() if "train-reduced-other" in line)
    assert "working" in line
    assert f"120 of 600 steps, 512 images/s, 4 min left, process {progress.process}" in line
    found = json.loads(mpl("status", "--run", run, "--json").out)["stages"]
    assert next(row for row in found if row["stage"] == "train-reduced-other")["progress"]["done"] == 120
    replace(progress, process=2**22 + 1).write(folder)
    line = next(line for line in mpl("status", "--run", run).out.splitlines() if "train-reduced-other" in line)
    assert "unfinished" in line


def test_a_sign_of_life_where_nothing_else_is_said(capsys) -> None:
    sign_of_life("loading", after=0.01)
    for _ in range(500):
        if said := capsys.readouterr().err:
            break
        time.sleep(0.01)
    assert said == "loading\n"
    sign_of_life("loading", after=0.05)
    say("something else")
    sign_of_life("loading", after=0.05)()
    time.sleep(0.2)
    assert capsys.readouterr().err == "something else\n"


def test_silence_is_told() -> None:
    progress = Progress.now(1, 2, "shards", None, {})
    assert "last heard" not in progress_text(progress)
    assert "last heard of 5 min ago" in progress_text(replace(progress, updated=progress.updated - 300))
