"""The new network takes the place of the old, wherever that is interrupted."""

import os
from itertools import count
from pathlib import Path

import pytest

from stages.basis import exchange, finish_exchange

OLD = {"model.safetensors": b"old", "config.json": b"{}", "calibrator.safetensors": b"old", "notes.txt": b"mine"}
NEW = {
    "model.safetensors": b"new",
    "config.json": b"{1}",
    "metrics.csv": b"step",
    "checkpoints/index.json": b"{}",
    "checkpoints/step-00000020/__0_0.distcp": b"new",
}


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Killed(BaseException):
    """What no code handles."""


def test_an_exchange_killed_at_any_moment_is_finished_by_the_next_start(tmp_path: Path, monkeypatch) -> None:
    real = {name: getattr(os, name) for name in ("rename", "replace", "unlink", "rmdir")}
    for moment in count():
        run = tmp_path / str(moment)
        new, folder = run / ".student.new", run / "student"
        put(folder, OLD | {"checkpoints/step-00000010.pt": b"old"})
        put(new, NEW)
        left = moment

        def counted(name: str):
            def call(*args, **more):
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return real[name](*args, **more)

            return call

        with monkeypatch.context() as patched:
            for name in real:
                patched.setattr(os, name, counted(name))
            try:
                exchange(new, folder)
                done = True
            except Killed:
                done = False
        finish_exchange(new, folder)
        if moment == 0:  # nothing had been touched: the training goes on beside, and ends, and then exchanges
            assert files(folder)["model.safetensors"] == b"old"
            exchange(new, folder)
        assert files(run) == {f"student/{name}": data for name, data in (NEW | {"notes.txt": b"mine"}).items()}
        assert [path.name for path in run.iterdir()] == ["student"]
        finish_exchange(new, folder)
        if done:
            break
    assert moment > 10


@pytest.mark.parametrize("present", [OLD, {"notes.txt": b"mine"}], ids=["whole", "none"])
def test_without_an_exchange_nothing_is_moved(tmp_path: Path, present: dict[str, bytes]) -> None:
    put(tmp_path / "student", present)
    put(tmp_path / ".student.new", {"checkpoints/index.json": b"{}"})
    finish_exchange(tmp_path / ".student.new", tmp_path / "student")
    assert files(tmp_path / "student") == present
