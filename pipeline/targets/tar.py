"""A tar of images as WebDataset has it, whose members lie where their lengths say: no header is parsed to read it."""

import hashlib
import tarfile
import zlib
from collections.abc import Iterable
from typing import IO

import numpy as np
from numpy.typing import NDArray

from pipeline.storage.files import Location, whole_file

BLOCK = tarfile.BLOCKSIZE  # bytes; a member is one block of header, then its content filled up to whole blocks
RECORD = tarfile.RECORDSIZE
SIGNATURES = (
    *((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tif")),
    *((b"MM\0*", "tif"), (b"\0\0\0\x0cjP  ", "jp2"), (b"\xffO\xffQ", "jp2"), (b"P1", "pbm"), (b"P4", "pbm")),
    *((b"P2", "pgm"), (b"P5", "pgm"), (b"P3", "ppm"), (b"P6", "ppm")),
)


def write_tar(path: Location, prefix: str, images: Iterable[bytes]) -> tuple[int, str]:
    """Write `images` as members PREFIX-000000.jpg, …, whole or not at all; the same bytes every time.

    Returns:
        Bytes and SHA-256 of the tar.
    """
    with whole_file(path) as temporary, temporary.open("wb") as file:
        digest, size = hashlib.sha256(), 0
        for at, image in enumerate(images):
            info = tarfile.TarInfo(f"{prefix}-{at:06d}.{suffix(image)}")
            info.size = len(image)
            member = b"".join((info.tobuf(tarfile.USTAR_FORMAT), image, b"\0" * (-len(image) % BLOCK)))
            digest.update(member)
            file.write(member)
            size += len(member)
        end = b"\0" * (-(size + 2 * BLOCK) % RECORD + 2 * BLOCK)  # two empty blocks end it, whole records fill it
        digest.update(end)
        file.write(end)
    return size + len(end), digest.hexdigest()


def suffix(image: bytes) -> str:
    """The file name suffix of an encoded image, by its first bytes; `img` where they say nothing."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    if image[4:8] == b"ftyp":
        return "avif"
    return next((name for signature, name in SIGNATURES if image.startswith(signature)), "img")


def starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the contents begin of consecutive members, (n,), from the place where the first header begins."""
    whole = BLOCK + -(-lengths // BLOCK) * BLOCK
    result: NDArray[np.int64] = np.cumsum(whole) - whole + BLOCK
    return result


class TarReader:
    """Reads the images of a tar from front to back.

    Args:
        file: the tar, opened; at its beginning.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def next(self, lengths: NDArray[np.int64], sums: NDArray[np.uint32]) -> list[bytes]:
        """The next n images, of these lengths and CRC-32s, (n,).

        Raises:
            OSError: they are not what was written.
        """
        if not len(lengths):
            return []
        begin = starts(lengths)
        end = int(begin[-1] + -(-lengths[-1] // BLOCK) * BLOCK)
        data = self.file.read(end)
        images = [data[a : a + n] for a, n in zip(begin.tolist(), lengths.tolist(), strict=True)]
        for at, (image, length, wanted) in enumerate(zip(images, lengths.tolist(), sums.tolist(), strict=True)):
            if len(image) != length or zlib.crc32(image) != wanted:
                raise OSError(f"image {at} of {len(images)} after byte {self.file.tell() - len(data):,} was changed")
        return images
