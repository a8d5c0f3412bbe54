"""Tar archives from anywhere, read from front to back without trusting them.

Every header's checksum is verified, an archive must have its end (others may be joined to it, and are read on), and
what no honest archive of images holds is refused: links, devices, sparse files, names that leave the archive, members
too large for memory. Nothing is held but one member. Plain headers are parsed here, which is many times as fast as
`tarfile`; unusual ones by `tarfile`.
"""

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, NoReturn, cast
from zlib import adler32
from zlib import error as zlib_error

from pipeline.errors import DataError
from pipeline.storage.files import Location, opened

MEMBER_LIMIT = 256 << 20
"""Bytes of one member; a compressed archive of a few MB could otherwise fill any memory."""
EXTENSION_LIMIT = 1 << 20  # bytes of a header that only lengthens the next one: names, pax records
BUFFER = 1 << 20  # bytes read at a time
BLOCK = 512  # bytes
DIGITS = 20  # of a number of bytes, at most
END = bytes(BLOCK)
ZEROS_LIMIT = 16 << 20  # bytes after the end: a small compressed file could otherwise be read for ever
POSIX, GNU = b"ustar\x0000", b"ustar  \x00"
PLAIN = frozenset((b"0", b"\0", b"7"))
FOLDER = b"5"
EXTENSIONS = frozenset((b"x", b"g", b"X", b"L", b"K"))
SPARSE = "is a sparse file"
OTHER = "is a link or a device"


class _Header(NamedTuple):
    name: str
    size: int  # bytes
    kind: bytes


class TarReader:
    """Goes through the plain files of an archive.

    Args:
        file: buffered, at the archive's start; it is read, and sought forwards.
        where: the archive, for messages.
        limit: most bytes that a member may have.
    """

    def __init__(self, file: IO[bytes], where: str, limit: int = MEMBER_LIMIT) -> None:
        self.file, self.where, self.limit = file, where, limit
        self.size = 0
        """Bytes of the member that `next` named last."""
        self._unread = 0  # bytes of it …
        self._padding = 0  # … and from its end to the next header

    def next(self) -> str | None:
        """The name of the next plain file; None at the end. Folders are passed over.

        Raises:
            tarfile.TarError: a header is damaged, or the archive has no end.
            DataError: a member that is refused.
        """
        name: str | None = None
        size: int | None = None
        while (header := self._header()) is not None:
            if header.kind in EXTENSIONS:
                records = self._extension(header)
                name, size = records.get("path", name), _number(records.get("size"), size)
                continue
            member = _Header(name or header.name, header.size if size is None else size, header.kind)
            name = size = None
            if header.kind in PLAIN:
                self._enter(member)
                return member.name
            if header.kind != FOLDER:
                self._refuse(
                    f"{member.name} {SPARSE if header.kind == b'S' else OTHER}; a shard holds plain files only"
                )
            self._enter(member)
        if name is not None:
            raise tarfile.ReadError("the archive ends after a header that announces another")
        return None

    def read(self) -> bytes:
        """The bytes of the member that `next` named last.

        Raises:
            tarfile.ReadError: the archive ends before they do.
        """
        data = self.file.read(self._unread)
        if len(data) < self._unread:
            raise tarfile.ReadError("unexpected end of data")
        self._unread = 0
        return data

    def chunks(self) -> Iterator[bytes]:
        """The same in pieces, for members of any size.

        Raises:
            tarfile.ReadError: the archive ends before they do.
        """
        while self._unread:
            data = self.file.read(min(BUFFER, self._unread))
            if not data:
                raise tarfile.ReadError("unexpected end of data")
            self._unread -= len(data)
            yield data

    def _header(self) -> _Header | None:
        if self._unread > BUFFER:
            self.file.seek(self._unread, io.SEEK_CUR)
        elif self._unread:
            self.read()
        block = self.file.read(self._padding + BLOCK)[self._padding :]
        self._unread = self._padding = 0
        return _parse(block) if block != END else self._after_the_end()

    def _after_the_end(self) -> _Header | None:
        """The first header of an archive that was joined to this one; None where nothing follows but zeros."""
        for _ in range(0, ZEROS_LIMIT, BLOCK):
            if not (block := self.file.read(BLOCK)):
                return None
            if block.count(0) < len(block):
                return self._joined(block)
        self._refuse(f"more than {ZEROS_LIMIT:,} bytes of zeros follow its end; pack it again")

    def _joined(self, block: bytes) -> _Header | None:
        try:
            return _parse(block)
        except tarfile.ReadError:
            self._refuse("what follows its end is neither zeros nor another archive; pack it again, or cut it there")

    def _enter(self, header: _Header) -> None:
        name, size = header.name, header.size
        if name[:1] == "/" or (".." in name and ".." in name.split("/")):
            self._refuse(f"{name} points outside the archive; pack it with relative paths")
        if not 0 <= size <= self.limit:
            self._refuse(
                f"{name} has {size:,} bytes when unpacked, and {self.limit:,} are the limit for one member; "
                "this is no image. Take it out of the archive"
            )
        self.size = self._unread = size
        self._padding = -size % BLOCK

    def _extension(self, header: _Header) -> dict[str, str]:
        """What a header says of the next one: of pax records and long names, `path` and `size`."""
        if not 0 <= header.size <= EXTENSION_LIMIT:
            self._refuse(f"a header of {header.size:,} bytes, and {EXTENSION_LIMIT:,} are the limit for one")
        self._unread, self._padding = header.size, -header.size % BLOCK
        data = self.read()
        if header.kind == b"L":
            return {"path": _text(data)}
        if header.kind == b"K":  # the target of a link, which will be refused
            return {}
        records = _pax_records(data)
        if any(key.startswith("GNU.sparse") for key in records):
            self._refuse(f"{records.get('GNU.sparse.name', 'a member')} {SPARSE}; a shard holds plain files only")
        # What is said of all members (`g`) is a comment or a time; a name or a size for all would be nonsense.
        return records if header.kind != b"g" else {}

    def _refuse(self, reason: str) -> NoReturn:
        raise DataError(f"{self.where}: {reason}")


@contextmanager
def open_tar(place: Location, limit: int = MEMBER_LIMIT) -> Iterator[TarReader]:
    """Open an archive, plain or compressed by gzip, bzip2 or xz.

    Raises:
        DataError: it is missing, damaged, cut short or no tar (also inside the `with`), or holds what is refused.
    """
    try:
        with opened(place) as source, io.BufferedReader(cast(Any, source), BUFFER) as file:
            stream = _decompressed(file)
            yield TarReader(stream, str(place), limit)
            if stream is not file:
                stream.read(BUFFER)  # to the checksum that ends a compressed file
    except FileNotFoundError as error:
        raise DataError(f"{place}: there is no such file") from error
    except (tarfile.TarError, OSError, EOFError, zlib_error, lzma.LZMAError) as error:
        raise DataError(
            f"{place} cannot be read to its end ({error}): it is no tar, or was cut short; get it again"
        ) from error


def _decompressed(file: Any) -> IO[bytes]:
    start = file.peek(6)
    raw: Any = None
    if start.startswith(b"\x1f\x8b"):
        raw = gzip.GzipFile(fileobj=file)
    elif start.startswith(b"BZh"):
        raw = bz2.BZ2File(file)
    elif start.startswith(b"\xfd7zXZ\0"):
        raw = lzma.LZMAFile(file)  # noqa: SIM115  # closed with the reader around it
    return file if raw is None else io.BufferedReader(raw, BUFFER)


def _parse(block: bytes) -> _Header:
    """One header."""
    if len(block) < BLOCK:
        raise tarfile.ReadError("no further header: the archive has no end")
    magic = block[257:265]
    if magic in (POSIX, GNU) and block[124] < 0x80 and _checksum(block) == _octal(block[148:156]):
        name = _text(block[:100])
        if magic == POSIX and block[345]:
            name = f"{_text(block[345:500])}/{name}"
        kind, size = block[156:157], _octal(block[124:136])
        if kind == b"\0" and name.endswith("/"):
            kind = FOLDER
        return _Header(name, size, kind)
    try:  # the oldest form, sizes in base 256, checksums of signed bytes, or rubbish
        info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError as error:
        raise tarfile.ReadError(f"no further header: {error}") from error
    return _Header(info.name, info.size, info.type)


def _checksum(block: bytes) -> int:
    """The sum of all bytes, those of the checksum itself taken for spaces.

    Adler-32's lower half is the sum plus one, modulo 65,521, which 256 bytes cannot reach.
    """
    halves = (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2
    return halves - sum(block[148:156]) + 8 * 32


def _octal(field: bytes) -> int:
    try:
        return int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        return -1  # of no checksum, and no size


def _text(field: bytes) -> str:
    """Up to the first NUL; bytes that are no UTF-8 as \\xff, so that a key can be shown and stored."""
    return field.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _number(text: str | None, otherwise: int | None) -> int | None:
    """Of a record; −1, which is no size, for what is no number."""
    if text is None:
        return otherwise
    return int(text) if text.isascii() and text.isdigit() and len(text) <= DIGITS else -1


def _pax_records(data: bytes) -> dict[str, str]:
    """`<length> <key>=<value>\\n`, one after another."""
    records, at, data = {}, 0, data.rstrip(b"\0")
    while at < len(data):
        space = data.find(b" ", at, at + DIGITS)
        length = data[at : max(space, at)]
        end = at + int(length) if length.isdigit() else -1
        if not space + 1 < end - 1 < len(data) or data[end - 1 : end] != b"\n":
            raise tarfile.ReadError("a pax header is damaged")
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals:
            raise tarfile.ReadError("a pax header is damaged")
        records[key.decode("utf-8", "backslashreplace")] = _text(value)
        at = end
    return records
