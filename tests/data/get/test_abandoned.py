"""What an import that was killed left beside its data set is removed by the next one; nothing else is."""

import shutil
from pathlib import Path

import filelock
import pytest

from pipeline.data.get.found import Source
from pipeline.data.get.importing import LOCK, import_images
from tests.data.made_images import encode, noise


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            (tmp_path / "photos" / name / f"{i}.png").write_bytes(encode(noise(4 + i + (name == "cat") * 20)))
    return tmp_path / "photos"


def test_what_a_killed_import_left_goes_and_what_is_in_use_or_foreign_stays(photos: Path, tmp_path: Path) -> None:
    killed, used, foreign = (tmp_path / f".out.{name}.importing" for name in ("killed", "used", "mine"))
    for folder in (killed, used, foreign):
        folder.mkdir()
        (folder / "spool").write_bytes(b"x" * 100)
    (killed / LOCK).touch()
    with filelock.FileLock(used / LOCK):
        import_images([Source(photos)], tmp_path / "out")
    assert not killed.exists()
    assert used.exists()
    assert foreign.exists()
    shutil.rmtree(used)
    assert LOCK not in {path.name for path in (tmp_path / "out").iterdir()}
    assert [path.name for path in tmp_path.glob(".*")] == [foreign.name]
