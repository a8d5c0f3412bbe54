"""One file over HTTP, with resume: what has arrived is kept, and the rest asked for by range.

A resumed download is never made of two versions of a file: the request names the version of the kept bytes
(`If-Range`), and the answer's is compared. Source: RFC 9110, sections 13.1.5 and 14.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import requests
from urllib3.exceptions import HTTPError

from pipeline.errors import DataError, RunError
from pipeline.storage.files import write_json

CHUNK = 1 << 16  # bytes
RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))
REASONS = {
    401: "it wants a password",
    403: "it forbids this",
    404: "there is no such file",
    410: "the file was withdrawn",
}
Progress = Callable[[int, int | None], None]  # bytes that are there, bytes in all


@dataclass(frozen=True)
class Patience:
    """How long a download goes on trying."""

    attempts: int = 6
    """In a row that bring no further byte."""
    first_wait: float = 1.0
    """Seconds; doubled after every attempt, or what the server asks for."""
    longest_wait: float = 60.0
    timeout: tuple[float, float] = (15.0, 60.0)
    """Seconds to connect, and between two pieces of the answer."""


@dataclass(frozen=True)
class _Version:
    """Which file the kept bytes are of."""

    url: str
    tag: str | None = None
    """A strong ETag, else the time of the last change."""
    total: int | None = None


class _Passing(Exception):
    """Trouble that may pass, and the seconds that the server asks to wait."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


def download(
    url: str,
    part: Path,
    *,
    total: int | None = None,
    patience: Patience | None = None,
    progress: Progress | None = None,
) -> bool:
    """Bring a file to `part`, going on from what lies there.

    Args:
        url: http or https.
        part: the file; a description of what it is of lies beside it, as `<part>.json`.
        total: its bytes, if they are known. They are trusted, and what the server says of them is not.
        patience: how often and how long to try.
        progress: called after every piece.

    Returns:
        Whether any of it had been there before.

    Raises:
        DataError: the server does not have it, gives a longer one, or stays in trouble; or the disk is full.
            What has arrived is kept.
    """
    patience = patience or Patience()
    failures, most_bytes = 0, _size(part)
    resumed = most_bytes > 0
    with requests.Session() as session:
        while True:
            try:
                _attempt(session, url, part, total, patience, progress)
                return resumed
            except (_Passing, requests.RequestException, HTTPError, ConnectionError) as error:
                size = _size(part)
                resumed = resumed or size > 0
                failures = 1 if size > most_bytes else failures + 1
                most_bytes = max(most_bytes, size)
                if failures >= patience.attempts:
                    raise DataError(
                        f"{url}: {_cause(error)}, and {failures} attempts brought nothing more; {size:,} bytes are "
                        "kept. Try again later: the same command goes on from there"
                    ) from error
                requested_wait = error.wait if isinstance(error, _Passing) else 0.0
                time.sleep(min(max(requested_wait, patience.first_wait * 2 ** (failures - 1)), patience.longest_wait))
            except (OSError, RunError) as error:
                raise DataError(f"{part} cannot be written: {error}; free some space and run this again") from error


def discard(part: Path) -> None:
    """Remove a part and its description."""
    part.unlink(missing_ok=True)
    _description(part).unlink(missing_ok=True)


def _attempt(
    session: requests.Session, url: str, part: Path, total: int | None, patience: Patience, progress: Progress | None
) -> None:
    """One request, and its answer into the file."""
    version = _read_version(part)
    have = _size(part) if version is not None and version.url == url else 0
    expected = total if total is not None or version is None else version.total
    if have and have == expected:
        return
    headers = {"Accept-Encoding": "identity"}  # ranges are of the file's own bytes
    if have:
        assert version is not None
        headers["Range"] = f"bytes={have}-"
        if version.tag:
            headers["If-Range"] = version.tag
    with session.get(url, headers=headers, stream=True, timeout=patience.timeout) as answer:
        _refuse_errors(answer, url, part)
        sent = _version_of(answer, url)
        goes_on = answer.status_code == 206 and have and _same(version, sent, answer, have)
        if answer.status_code == 206 and not goes_on:
            discard(part)
            raise _Passing("the file changed on the server, or it answers with other bytes than were asked for")
        if not goes_on:
            discard(part)
            have = 0
            write_json(_description(part), asdict(sent))
        end = total if total is not None else sent.total
        with part.open("ab") as file:
            have = _receive(answer.raw, file, have, end, progress)
        if total is not None and have > total:
            discard(part)
            raise DataError(
                f"{url} gives more than the {total:,} bytes that the manifest states: it is another file. "
                "Nothing was kept; see the data set's homepage for the right address"
            )
        if end is not None and have < end:
            raise _Passing(f"the connection was closed after {have:,} of {end:,} bytes")


def _receive(raw: Any, file: IO[bytes], have: int, end: int | None, progress: Progress | None) -> int:
    """Append what comes, up to one byte beyond `end`. Gives the bytes that are there then."""
    read = getattr(raw, "read1", None) or raw.read  # else a piece that is cut off would be lost
    while end is None or have <= end:
        if not (data := read(CHUNK)):
            break
        file.write(data)
        file.flush()
        have += len(data)
        if progress is not None:
            progress(have, end)
        if have == end:
            break
    return have


def _refuse_errors(answer: requests.Response, url: str, part: Path) -> None:
    status = answer.status_code
    if status in (200, 206):
        return
    if status == 416:  # the kept bytes are more than there are
        discard(part)
        raise _Passing("the server's file is shorter than what was kept of it")
    line = f"{status} {answer.reason or ''}".strip()
    if status in RETRIED:
        wait = answer.headers.get("Retry-After", "")
        raise _Passing(f"the server answers {line}", _number(wait) or 0.0)
    raise DataError(
        f"{url}: the server answers {line}{': ' + REASONS[status] if status in REASONS else ''}. "
        "See the data set's homepage for where it is now"
    )


def _version_of(answer: requests.Response, url: str) -> _Version:
    tag = answer.headers.get("ETag")
    if tag is None or tag.startswith("W/"):  # a weak one says nothing of single bytes
        tag = answer.headers.get("Last-Modified")
    if answer.status_code == 206:
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        total = answer.headers.get("Content-Length", "")
    return _Version(url, tag, _number(total))


def _same(kept: _Version | None, sent: _Version, answer: requests.Response, have: int) -> bool:
    """Whether a partial answer is the rest of what was kept; of versions without a tag, the lengths are compared."""
    assert kept is not None
    start = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    same_version = kept.tag == sent.tag if kept.tag or sent.tag else kept.total == sent.total
    return start == str(have) and same_version


def _read_version(part: Path) -> _Version | None:
    try:
        return _Version(**json.loads(_description(part).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _description(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _size(part: Path) -> int:
    try:
        return os.stat(part).st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _cause(error: Exception) -> str:
    """The cause of an error: requests wraps urllib3's, which wraps the system's."""
    inner: BaseException = error
    while inner.__context__ is not None:
        inner = inner.__context__
    return str(inner) or type(inner).__name__


def _number(text: str) -> int | None:
    """Of a header; None for what is none, or has more digits than a size or a time can have."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None
