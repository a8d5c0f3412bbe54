"""Downloads from a server that misbehaves."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.get.download import Patience, download
from pipeline.errors import DataError
from tests.data.file_server import Server, file_server

CONTENT = np.random.RandomState(0).bytes(300_000)
QUICK = Patience(attempts=3, first_wait=0.01, longest_wait=0.05, timeout=(60, 60))


@pytest.fixture
def server() -> Iterator[Server]:
    with file_server(CONTENT) as server:
        yield server


def get(server: Server, tmp_path: Path, total: int | None = len(CONTENT)) -> Path:
    part = tmp_path / "a.part"
    download(f"{server.url}/a", part, total=total, patience=QUICK)
    return part


@pytest.mark.parametrize("total", [len(CONTENT), None])
def test_a_break_goes_on_from_what_arrived(server: Server, tmp_path: Path, total: int | None) -> None:
    """Every byte is sent once."""
    server.breaks = [100_000, 50_001]
    told: list[tuple[int, int | None]] = []
    part = tmp_path / "a.part"
    download(f"{server.url}/a", part, total=total, patience=QUICK, progress=lambda *a: told.append(a))
    assert part.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=150001-"]
    assert server.sent == len(CONTENT)
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert told == sorted(told)


def test_without_ranges_it_begins_anew(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.breaks = [100_000]
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.sent == len(CONTENT) + 100_000


def test_a_break_that_stays_is_given_up_and_kept(server: Server, tmp_path: Path) -> None:
    server.breaks = [70_000, 0, 0, 0, 0]
    with pytest.raises(DataError, match=r"3 attempts brought nothing more; 70,000 bytes are kept.*goes on from there"):
        get(server, tmp_path)
    assert (tmp_path / "a.part").read_bytes() == CONTENT[:70_000]
    server.breaks = []
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=70000-"


@pytest.mark.parametrize("claim", [1_000, 299_999, 300_001, 900_000])
def test_a_wrong_content_length_does_no_harm_where_the_manifest_states_it(
    server: Server, tmp_path: Path, claim: int
) -> None:
    server.claims = claim
    if claim == 1_000:
        server.ranges = False  # nothing but the first thousand bytes can be had
        with pytest.raises(DataError, match=r"closed after 1,000 of 300,000 bytes"):
            get(server, tmp_path)
    else:
        assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_content_length_too_long_is_noticed_where_nothing_states_it(server: Server, tmp_path: Path) -> None:
    server.claims = 400_000
    server.ranges = False
    with pytest.raises(DataError, match="3 attempts brought nothing more"):
        get(server, tmp_path, None)


def test_a_longer_file_is_refused_and_not_kept(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gives more than the 1,000 bytes that the manifest states"):
        get(server, tmp_path, 1_000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("status", "reason"), [(404, "there is no such file"), (403, "it forbids this"), (410, "gone")]
)
def test_lasting_refusals_are_told_at_once(server: Server, tmp_path: Path, status: int, reason: str) -> None:
    server.statuses = [status]
    with pytest.raises(DataError, match=rf"/a: the server answers {status} .*{'' if status == 410 else reason}"):
        get(server, tmp_path)
    assert len(server.asked) == 1


def test_passing_refusals_are_tried_again(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 429]
    assert get(server, tmp_path).read_bytes() == CONTENT
    server.statuses = [503] * 9
    (tmp_path / "a.part").unlink()
    with pytest.raises(DataError, match=r"the server answers 503 .*3 attempts brought nothing"):
        get(server, tmp_path)


@pytest.mark.parametrize("honours", [True, False])
@pytest.mark.parametrize("tag", ['"two"', None])
def test_a_file_that_changes_between_attempts_is_not_glued(
    server: Server, tmp_path: Path, honours: bool, tag: str | None
) -> None:
    """With If-Range honoured the server sends the whole; else the other ETag is noticed."""
    server.breaks = [0, 0, 0]
    server.breaks[0] = 100_000
    with pytest.raises(DataError):
        get(server, tmp_path)
    server.content = other = np.random.RandomState(1).bytes(len(CONTENT))
    server.tag, server.honours_if_range, server.breaks = tag, honours, []
    assert get(server, tmp_path).read_bytes() == other


def test_kept_bytes_of_another_address_or_beyond_the_end_are_dropped(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "a.part"
    part.write_bytes(b"of unknown origin")
    assert get(server, tmp_path).read_bytes() == CONTENT
    part.write_bytes(CONTENT + b"more")
    assert get(server, tmp_path, None).read_bytes() == CONTENT
    part.write_bytes(CONTENT[:500])
    download(f"{server.url}/b", part, total=len(CONTENT), patience=QUICK)
    assert part.read_bytes() == CONTENT
    assert server.asked[-1] is None


def test_nobody_answers(tmp_path: Path) -> None:
    with file_server() as gone:
        pass
    with pytest.raises(DataError, match=r"Connection refused.*3 attempts"):
        get(gone, tmp_path)


def test_a_place_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"a\.part cannot be written"):
        download(f"{server.url}/a", tmp_path / "file" / "a.part", total=len(CONTENT), patience=QUICK)


def test_a_disk_that_is_full(server: Server, tmp_path: Path) -> None:
    """A limit on the size of files stands in for it. What has arrived serves the next attempt."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"a\.part cannot be written: .*free some space and run this again"):
            get(server, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=150000-"]


def test_a_killed_client_goes_on(server: Server, tmp_path: Path) -> None:
    """SIGKILL in the middle; the second process asks for the rest alone."""
    server.slow = 0.2
    part = tmp_path / "a.part"
    program = (
        "import sys; from pathlib import Path; from pipeline.data.get.download import download; "
        "download(sys.argv[1], Path(sys.argv[2]), total=300_000)"
    )
    arguments = [sys.executable, "-c", program, f"{server.url}/a", str(part)]
    process = subprocess.Popen(arguments)
    deadline = time.monotonic() + 400
    while (part.stat().st_size if part.exists() else 0) < 50_000 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = part.stat().st_size
    assert 50_000 <= kept < len(CONTENT)
    server.slow = 0
    subprocess.run(arguments, check=True, timeout=400)
    assert hashlib.sha256(part.read_bytes()).digest() == hashlib.sha256(CONTENT).digest()
    assert server.asked == [None, f"bytes={kept}-"]
