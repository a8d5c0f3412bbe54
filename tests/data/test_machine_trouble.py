"""What the machine does to us is not recorded as the data's fault; what costs too much is a status."""

import errno
import io
import os
import threading
from pathlib import Path

import pytest
from PIL import Image

from pipeline.data import decode as decoding
from pipeline.data.decode import MAX_BYTES, Status, decode
from pipeline.data.readers.folder import FolderShard
from pipeline.errors import DataError, RunError
from pipeline.storage.files import UPLOAD, read_at_most, remove_leftovers
from tests.data.made_images import encode, noise

IMAGE = encode(noise(6))


def failing(times: int, error: BaseException):
    """The decoder, failing the first few times."""
    real, left = decoding._drawn, [times]

    def drawn(*arguments):
        if left[0]:
            left[0] -= 1
            raise error
        return real(*arguments)

    return drawn


def test_an_image_for_which_there_was_no_memory_is_decoded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_drawn", failing(1, MemoryError()))
    pixels, status, _ = decode(IMAGE, 6)
    assert (pixels is not None, status) == (True, Status.ok)


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.ENOSPC, "no space"), OSError(errno.EMFILE, "too many files")]
)
def test_trouble_of_the_machine_that_stays_stops_and_is_no_status(monkeypatch: pytest.MonkeyPatch, error) -> None:
    monkeypatch.setattr(decoding, "_drawn", failing(9, error))
    with pytest.raises(RunError, match="run "):
        decode(IMAGE, 6)


def test_out_of_memory_said_of_impossible_sizes_is_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's decoders say it of bytes that ask for more than any machine has."""
    monkeypatch.setattr(decoding, "_drawn", failing(9, OSError("out of memory error when reading image file")))
    assert decode(IMAGE, 6)[1] is Status.decode_error
    with monkeypatch.context() as patched:
        patched.setattr(decoding, "bytearray", failing(9, MemoryError()), raising=False)
        with pytest.raises(RunError, match="not enough memory"):
            decode(IMAGE, 6)


def test_a_progressive_jpeg_with_scans_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "JPEG", progressive=True)
    assert decode(buffer.getvalue(), 8)[1] is Status.ok
    monkeypatch.setattr(decoding, "SCANNED", 64 * 64 * 5)
    pixels, status, detail = decode(buffer.getvalue(), 8)
    assert (pixels, status) == (None, Status.too_large)
    assert "scans of 64 × 64" in detail


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "LARGE", 10)
    inside, most, lock, real = [0], [0], threading.Lock(), decoding._drawn

    def drawn(*arguments):
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        result = real(*arguments)
        threading.Event().wait(0.01)
        with lock:
            inside[0] -= 1
        return result

    monkeypatch.setattr(decoding, "_drawn", drawn)
    items = [IMAGE] * (decoding.CHUNK * 2 + 1)
    assert all(entry[2] is Status.ok for entry in decoding.decode_stream(items, 6, 3, data_of=bytes))
    assert most == [1]


def test_a_sparse_file_is_not_read_whole(tmp_path: Path) -> None:
    (tmp_path / "big.png").touch()
    os.truncate(tmp_path / "big.png", 40 << 30)
    (sample,) = FolderShard("pool-00000", tmp_path, ("big.png",), ()).read()
    assert len(sample.data) == MAX_BYTES + 1
    assert decode(sample.data, 6)[1] is Status.too_large


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match="no plain file"):
        read_at_most(tmp_path / "pipe.png", 10)
    with pytest.raises(DataError, match="no plain file"):
        list(FolderShard("pool-00000", tmp_path, ("pipe.png",), ()).read())


def test_of_uploads_only_ours_that_are_dead_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead = tmp_path / f"{UPLOAD}999999999-abc_1.mpl.tmp"
    dead.touch()
    foreign = ["mpl-upload-mine.tmp", "mpl-upload-²-x.mpl.tmp", f"mpl-upload-{10**40}-x.mpl.tmp",
               f"{UPLOAD}{os.getpid()}-alive.mpl.tmp"]  # fmt: skip
    for name in foreign:
        (tmp_path / name).touch()
    (tmp_path / f"{UPLOAD}999999998-folder.mpl.tmp").mkdir()
    remove_leftovers()
    assert not dead.exists()
    assert all((tmp_path / name).exists() for name in foreign)
