"""From the bytes of any image file to RGB pixels of one size, with a status instead of an exception."""

import gc
import io
import math
import os
import re
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.errors import RunError

MAX_PIXELS = 89_478_485
"""Width times height; more is `too_large`. It is Pillow's own limit: a quarter GiB of RGB."""
MAX_BYTES = 256 << 20
"""Of an encoded image; more is `too_large`."""
SCANNED = 2_000_000_000  # pixels of all scans of a progressive JPEG: 20 scans of the largest image; usual are 10
LARGE = 1 << 25  # pixels; of larger images one is decoded at a time, whatever the number of threads
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
"""What is tried. Pillow knows more, of which EPS would start Ghostscript on bytes from the web."""
TOO_LARGE = f"more than {MAX_PIXELS:,} pixels"
CHUNK = 64  # images that a thread decodes at a time …
CHUNK_BYTES = 16 << 20  # … or less, when they are large
SMALL = 100  # pixels: below, decoding mostly holds the interpreter's lock, and a second thread slows it
T = TypeVar("T")
ORIENTATION = 0x0112  # EXIF tag
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # TIFF tag and its value
OVERSHOOT = 2.0  # greatest value of an image of real numbers from 0 to 1
JPEG_MODES = {"RGB": "RGB", "L": "GRAY"}  # of Pillow, and what simplejpeg calls them
SCAN = b"\xff\xda"  # begins one
JPEG_END = b"\xff\xd9"
EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]+)")
STRAY_BYTES = 7  # so many before a marker some cameras leave; a lost block leaves more
PNG = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
_LARGE = threading.Lock()
_ALONE = threading.Lock()  # held by the one that tries again where memory was short
DEPTH_AT = 24  # place of the bits of a sample in a PNG, whose first chunk is its header


class Status(StrEnum):
    """What happened to an entry's bytes."""

    ok = "ok"
    empty = "empty"
    decode_error = "decode_error"
    too_large = "too_large"


@dataclass(frozen=True)
class Framing:
    """How an image of any shape becomes a square: what timm's evaluation does with the values of these names.

    Attributes:
        crop_pct: the side of the square as a share of what the image is resized to, in (0, 1].
        interpolation: bicubic, bilinear, lanczos, box, hamming or nearest.
        crop_mode: center resizes the shorter side and cuts the centre out; squash resizes both.
    """

    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct (={self.crop_pct:g}) must lie in (0, 1]")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation (={self.interpolation!r}) must be one of {', '.join(INTERPOLATIONS)}")
        if self.crop_mode not in ("center", "squash"):
            raise ValueError(f"crop_mode (={self.crop_mode!r}) must be center or squash")

    def scaled(self, size: int) -> int:
        """What the shorter side is resized to, pixels."""
        return math.floor(size / self.crop_pct)


INTERPOLATIONS = {name.lower(): Image.Resampling[name] for name in Image.Resampling.__members__}
WHOLE = Framing()
"""The whole of the shorter side: what networks trained here are shown."""


class Skipped(NamedTuple):
    """An entry that gave no image."""

    shard: str
    row: int
    key: str
    status: Status
    detail: str


def default_workers(size: int) -> int:
    """Threads that decode best: one for small images, one per core for others (benchmarks/loader.py)."""
    return 1 if size < SMALL else os.cpu_count() or 1


def decode(data: bytes, size: int, framing: Framing = WHOLE) -> tuple[np.ndarray | None, Status, str]:
    """Decode one image; nothing that `data` holds makes it raise, and nothing but what it holds becomes a status.

    The first frame is turned upright as its EXIF says, drawn on white where it is transparent,
    converted to 8-bit RGB, resized (antialiased) and cut as `framing` says; by default its shorter side is brought to
    `size` and its centre cut out, and an image of size × size keeps its pixels. A PNG whose comments, colour profile or
    checksums of these are broken or too long is read without them.

    Returns:
        The pixels, uint8 (size, size, 3), or None; the status; and why, for people.

    Raises:
        RunError: the machine is at fault: there was no memory for it, also when no other was decoded beside it.
    """
    if not data:
        return None, Status.empty, "no bytes"
    if len(data) > MAX_BYTES:
        return None, Status.too_large, f"more than {MAX_BYTES:,} bytes"
    try:
        return _decode_whole(data, size, framing)
    except MemoryError:
        pass  # not in here: what the error holds would stay in memory
    except OSError as error:
        raise RunError(f"an image cannot be decoded here ({error}); run the same command again") from error
    with _ALONE:
        gc.collect()
        try:
            return _decode_whole(data, size, framing)
        except (MemoryError, OSError) as error:
            raise RunError(
                f"there is not enough memory to decode an image of {len(data):,} bytes ({error or 'out of memory'}); "
                "give this command more memory, or fewer --workers, and run it again"
            ) from error


def _decode_whole(data: bytes, size: int, framing: Framing) -> tuple[np.ndarray | None, Status, str]:
    pixels, status, detail = _decode(data, size, framing)
    if status is Status.decode_error and data.startswith(PNG):
        try:
            return _decode(_bare_png(data), size, framing)
        except ValueError:
            return None, status, detail  # of the file as it is
    return pixels, status, detail


def _decode(data: bytes, size: int, framing: Framing) -> tuple[np.ndarray | None, Status, str]:
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                return None, Status.too_large, TOO_LARGE
            if image.info.get("progressive") and (scans := data.count(SCAN)) * image.width * image.height > SCANNED:
                return None, Status.too_large, f"{scans:,} scans of {image.width} × {image.height} pixels"
            return _pixels(image, size, data, framing), Status.ok, ""
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None, Status.too_large, TOO_LARGE
    except UnidentifiedImageError:
        if data[4:8] == b"ftyp" and "HEIF" not in _formats():
            return None, Status.decode_error, "HEIC needs pillow-heif: pip install 'reduced-mpl[heif]'"
        return None, Status.decode_error, f"not an image of a known format ({', '.join(_formats())})"
    except MemoryError:
        raise
    except OSError as error:
        if error.errno is not None:  # the bytes are in memory: it is not they
            raise
        if "out of memory" in str(error):  # also said of sizes that no image has
            bytearray(3 * 4 * MAX_PIXELS)  # raises MemoryError
        return None, Status.decode_error, f"{type(error).__name__}: {error}"[:200]
    except Exception as error:  # Pillow's plugins raise a dozen kinds on malformed bytes
        return None, Status.decode_error, f"{type(error).__name__}: {error}"[:200]


def decode_stream(
    items: Iterable[T], size: int, workers: int = 0, *, data_of: Callable[[T], bytes], framing: Framing = WHOLE
) -> Iterator[tuple[T, np.ndarray | None, Status, str]]:
    """Decode a stream in its order: each item with what `decode` says of its bytes.

    Args:
        items: anything that has bytes.
        size: side in pixels.
        workers: threads (Pillow releases the interpreter's lock while it decodes, which pays for images
            of more than about 100 pixels); 0 is none. At most two chunks per thread are under way.
        data_of: gives an item's bytes.
        framing: how images of another shape become squares.
    """

    def work(chunk: list[T]) -> list[tuple[T, np.ndarray | None, Status, str]]:
        return [(item, *decode(data_of(item), size, framing)) for item in chunk]

    chunks = _chunks(items, data_of)
    if workers < 1:
        for chunk in chunks:
            yield from work(chunk)
        return
    with ThreadPoolExecutor(workers) as threads:
        under_way: deque[Future[list[tuple[T, np.ndarray | None, Status, str]]]] = deque()
        for chunk in chunks:
            under_way.append(threads.submit(work, chunk))
            if len(under_way) > 2 * workers:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()


def _chunks(items: Iterable[T], data_of: Callable[[T], bytes]) -> Iterator[list[T]]:
    """Runs of items of bounded number and bytes."""
    chunk: list[T] = []
    held = 0
    for item in items:
        chunk.append(item)
        held += len(data_of(item))
        if len(chunk) >= CHUNK or held >= CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    # Pillow warns of large images and of odd metadata; here the status says it all.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _pixels(image: Image.Image, size: int, data: bytes, framing: Framing) -> np.ndarray:
    # Of JPEG alone: decodes at 1/2, 1/4 or 1/8, while that is twice as large as needed.
    image.draft("RGB", (2 * framing.scaled(size),) * 2)
    with _LARGE if image.width * image.height > LARGE else nullcontext():
        return _drawn(image, size, data, framing)


def _drawn(image: Image.Image, size: int, data: bytes, framing: Framing) -> np.ndarray:
    picture = _jpeg(image, data) if image.format in ("JPEG", "MPO") and image.mode in JPEG_MODES else image
    picture.load()
    if image.format == "PNG" and "transparency" in image.info:
        image.info["transparency"] = _as_stored(image, data[DEPTH_AT])
    inverted = image.format == "TIFF" and image.mode != "L" and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO  # type: ignore[attr-defined]
    rgb = _rgb(_upright(picture, image), inverted)
    return np.array(_square(rgb, size, framing))  # (size, size, 3)


def _square(rgb: Image.Image, size: int, framing: Framing) -> Image.Image:
    method = INTERPOLATIONS[framing.interpolation]
    if framing.crop_mode == "squash":
        scaled = (framing.scaled(size),) * 2
    elif framing.crop_pct == 1:
        side = min(rgb.size)
        left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
        box = (left, top, left + side, top + side)
        return rgb if rgb.size == (size, size) else rgb.resize((size, size), method, box=box)
    else:
        shorter = framing.scaled(size)
        scaled = (
            (shorter, shorter * rgb.height // rgb.width)
            if rgb.width <= rgb.height
            else (shorter * rgb.width // rgb.height, shorter)
        )
    resized = rgb if rgb.size == scaled else rgb.resize(scaled, method)
    left, top = (round((side - size) / 2) for side in scaled)  # as torchvision's CenterCrop rounds
    return resized.crop((left, top, left + size, top + size))


def _jpeg(image: Image.Image, data: bytes) -> Image.Image:
    """A JPEG's pixels as Pillow would give them (`image` is opened, and has the size to decode to), or nothing.

    Both are libjpeg-turbo; Pillow does not pass on that bytes inside are missing or changed, and what it drew there.

    Raises:
        ValueError: they are.
    """
    if (turbo := _simplejpeg()) is None:
        return image
    try:
        pixels = turbo.decode_jpeg(data, JPEG_MODES[image.mode], min_height=image.height, min_width=image.width)
    except ValueError as error:
        if "Premature end of JPEG file" in str(error) and not data.endswith(JPEG_END):
            return _jpeg(image, data + JPEG_END)  # if nothing but the mark of its end is missing, it is whole
        if _is_damage(str(error), data):
            raise ValueError(f"bytes inside are missing or changed ({error})") from error
        return image  # Pillow knows of more, and takes what is odd but whole
    if pixels.shape[:2] != (image.height, image.width):
        return image
    return Image.fromarray(pixels[..., 0] if image.mode == "L" else pixels)


@cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:  # a machine that was set up by hand: its pixels are the same
        return None
    return simplejpeg


def _is_damage(told: str, data: bytes) -> bool:
    """Whether a warning of libjpeg's means that the picture is not what was taken."""
    if extra := EXTRANEOUS.search(told):
        count, marker = int(extra[1]), bytes((0xFF, int(extra[2], 16)))
        at = data.rfind(marker)
        padding = marker == JPEG_END and not set(data[at - count : at]) - {0x00, 0xFF}
        return count > STRAY_BYTES and not padding
    return any(words in told for words in ("premature end of data segment", "bad Huffman code", "instead of RST"))


def _upright(picture: Image.Image, image: Image.Image) -> Image.Image:
    """The pixels turned as the EXIF of the image that they are of says."""
    try:
        if (turned := image.getexif().get(ORIENTATION, 1)) == 1:
            return picture
        picture.getexif()[ORIENTATION] = turned
        return ImageOps.exif_transpose(picture)
    except MemoryError:
        raise
    except Exception:  # malformed EXIF is no reason to lose the picture
        return picture


def _as_stored(image: Image.Image, depth: int) -> object:
    """The transparent grey or colour of a PNG as Pillow's pixels have it, which are brought to 8 bits."""
    value = image.info["transparency"]
    if image.mode == "L" and depth < 8:
        return value * 255 // (2**depth - 1)
    if image.mode == "RGB" and depth == 16:
        return tuple(part >> 8 for part in value)
    return value


def _bare_png(data: bytes) -> bytes:
    """A PNG with the chunks that its pixels need, and no others.

    Raises:
        ValueError: it is cut short.
    """
    parts, at = [data[: len(PNG)]], len(PNG)
    while at < len(data):
        if at + 8 > len(data):
            raise ValueError("cut short")
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] in PNG_CHUNKS:
            parts.append(data[at:end])
        if data[at + 4 : at + 8] == b"IEND":
            return b"".join(parts)
        at = end
    raise ValueError("has no end")


def _rgb(image: Image.Image, inverted: bool = False) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image, inverted).convert("RGB")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image, inverted: bool) -> Image.Image:
    """Grey of 16 bits or more to 8.

    The range is what the format has: 0 … 65535 of 16 bits. Of 32 bits no format says what is used: it is the least of
    0 … 1 (real numbers alone), 0 … 255, 0 … 65535 and 0 … 2³² − 1 that holds the greatest value; real numbers up to 2
    are of the range 0 … 1, as resampling overshoots.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    top = values.max(initial=0)
    if image.mode.startswith("I;16") or image.format == "PPM":
        scale = 65535.0
    elif image.mode == "F" and top <= OVERSHOOT:
        scale = 1.0
    else:
        scale = next(limit for limit in (255.0, 65535.0, max(top, 2.0**32 - 1)) if top <= limit)
    shares = np.clip(values / scale, 0, 1)
    if inverted:
        shares = 1 - shares
    if (transparent := image.info.get("transparency")) is not None:
        shares[values == transparent] = 1  # drawn on white
    return Image.fromarray(np.rint(shares * 255).astype(np.uint8))
