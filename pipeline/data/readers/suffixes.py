"""Which files are images: by the name where it says so, else by the first bytes."""

from collections.abc import Callable
from functools import cache

from PIL import Image

from pipeline.data.decode import FORMATS

IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib"),
        *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".avif", ".avifs"),
        *(".heic", ".heif", ".hif", ".jxl"),
    )
)
"""Lower case. Files of these names are samples, whether or not they can be decoded."""
OTHER_SUFFIXES = frozenset(
    (
        *(
            ".cls",
            ".json",
            ".jsonl",
            ".txt",
            ".caption",
            ".cap",
            ".csv",
            ".tsv",
            ".xml",
            ".yaml",
            ".yml",
            ".md",
            ".html",
        ),
        *(
            ".htm",
            ".url",
            ".npy",
            ".npz",
            ".pyd",
            ".pkl",
            ".pickle",
            ".pth",
            ".pt",
            ".safetensors",
            ".parquet",
            ".arrow",
        ),
        *(".id", ".idx", ".inx", ".index", ".ten", ".tenb", ".log", ".py", ".sh", ".ini", ".db", ".lock", ".pdf"),
        *(".mp3", ".wav", ".flac", ".m4a", ".mp4", ".mov", ".avi", ".mkv", ".webm", ".srt"),
        *(".tar", ".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar"),
    )
)
"""Lower case. Files of these names are no images, and are not opened to see; they may go with one."""
NO_IMAGE = "neither its name nor its first bytes are an image's"
HEAD = 32  # bytes that tell a format


def starts_an_image(head: bytes) -> bool:
    """Whether the first `HEAD` bytes of a file are an image's: by Pillow's own tests, and those of HEIC and JPEG XL."""
    if head[4:8] == b"ftyp":
        return head[8:12] in (b"heic", b"heix", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis")
    return head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")) or any(test(head) for test in _tests())


@cache
def _tests() -> tuple[Callable[[bytes], object], ...]:
    Image.init()
    tests = (Image.OPEN[name][1] for name in FORMATS if name in Image.OPEN)
    return tuple(test for test in tests if test is not None)
