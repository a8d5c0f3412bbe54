"""Decoding: every kind of image to RGB of one size, and a status for everything else."""

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image
from timm.data import create_transform

from pipeline.data.decode import MAX_PIXELS, Framing, Status, decode, decode_stream
from tests.data.made_images import encode, noise


def decoded(data: bytes, size: int) -> np.ndarray:
    image, status, detail = decode(data, size)
    assert (status, detail) == (Status.ok, "")
    assert image is not None
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable
    return image


def refused(data: bytes) -> tuple[Status, str]:
    image, status, detail = decode(data, 8)
    assert image is None
    assert detail
    return status, detail


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_an_image_of_the_size_keeps_its_pixels(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decoded(encode(noise(17), kind, **options), 17), noise(17))


def test_shorter_side_and_centre() -> None:
    """Oracle: Pillow's resize of the whole picture, then a crop of the middle."""
    photo = Image.fromarray(load_sample_image("china.jpg"))  # 640 × 427
    whole = photo.resize((96, 64), Image.Resampling.BICUBIC).crop((16, 0, 80, 64))
    difference = np.asarray(whole, float) - decoded(encode(photo), 64)
    assert np.abs(difference).mean() < 1.5  # 427 / 640 · 96 is 64.05: half a pixel of play at the edge
    tall = decoded(encode(photo.transpose(Image.Transpose.ROTATE_90)), 64)
    turned = np.rot90(decoded(encode(photo), 64))
    assert np.abs(tall.astype(float) - turned).max() <= 2  # rounding, in the other order


@pytest.mark.parametrize("size", [8, 32, 100])
def test_large_jpegs_are_decoded_small_without_a_visible_difference(size: int) -> None:
    """Oracle: the same JPEG decoded in full."""
    photo = Image.fromarray(load_sample_image("flower.jpg"))
    data = encode(photo.resize((1600, 1068)), "JPEG", quality=95)
    full = decoded(encode(Image.open(io.BytesIO(data))), size)
    difference = np.abs(full.astype(float) - decoded(data, size))
    assert difference.mean() < 2.5
    assert np.percentile(difference, 99) < 16


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (100, 0), (255, 255, 255)),
        ("LA", (100, 255), (100, 100, 100)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
        ("I;16", 257 * 99, (99, 99, 99)),
        ("I;16", 128, (0, 0, 0)),
        ("I", 257 * 99, (99, 99, 99)),
    ],
)
def test_modes(mode: str, value: object, expected: tuple[int, int, int]) -> None:
    image = Image.new(mode, (5, 5), value)  # type: ignore[arg-type]
    kind = "TIFF" if mode == "I" else "PNG"
    assert decoded(encode(image, kind), 4)[2, 2].tolist() == list(expected)


def test_sixteen_bits_of_grey_use_the_whole_range() -> None:
    values = np.linspace(0, 65535, 256).reshape(16, 16).round().astype(np.uint16)
    image = decoded(encode(Image.fromarray(values)), 16)
    np.testing.assert_allclose(image[..., 0], values / 257, atol=0.51)


def test_real_numbers_from_zero_to_one() -> None:
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    np.testing.assert_allclose(decoded(encode(values, "TIFF"), 8)[..., 1], values * 255, atol=0.51)
    values[0, 0] = np.nan
    assert decoded(encode(values, "TIFF"), 8)[0, 0, 0] == 0


def test_palette_with_transparency_lies_on_white() -> None:
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    assert decoded(encode(image), 2)[0, 0].tolist() == [10, 20, 30]
    assert decoded(encode(image, transparency=0), 2)[0, 0].tolist() == [255, 255, 255]


def test_cmyk() -> None:
    """Oracle: Pillow's conversion of the decoded file."""
    image = Image.fromarray(load_sample_image("china.jpg")).resize((24, 24)).convert("CMYK")
    data = encode(image, "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decoded(data, 24), expected)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_show_their_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert decoded(data, 6)[3, 3].tolist() == [255, 0, 0]


def test_exif_turns_the_picture_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen, turn by 90 degrees clockwise
    image = decoded(encode(noise(12), exif=exif), 12)
    np.testing.assert_array_equal(image, np.rot90(noise(12), -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # pytest's own filters undo ours
def test_broken_exif_loses_no_picture() -> None:
    data = encode(noise(12), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    decoded(data, 12)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (2, 1)])
def test_tiny_and_narrow_images(shape: tuple[int, int]) -> None:
    image = decoded(encode(np.full((*shape, 3), 90, np.uint8)), 32)
    assert (image == 90).all()


def png_header(width: int, height: int) -> bytes:
    """A PNG of such a size in a hundred bytes: its pixels are missing, but nobody should look."""
    chunks = b""
    for name, body in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"")):
        chunks += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("side", [50_000, 12_000, 9_500])
def test_huge_images_are_refused_by_their_header(side: int) -> None:
    """Below and above the sizes at which Pillow warns and refuses; no memory is taken."""
    assert side * side > MAX_PIXELS
    status, detail = refused(png_header(side, side))
    assert status is Status.too_large
    assert detail == "more than 89,478,485 pixels"


def test_pillows_warnings_do_not_reach_the_person() -> None:
    decode(encode(noise(2)), 2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        decode.__globals__["_formats"].cache_clear()
        decode(png_header(9_500, 9_500), 8)
    assert seen == []


def test_no_bytes() -> None:
    assert refused(b"") == (Status.empty, "no bytes")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_files(kind: str, part: float) -> None:
    data = encode(noise(64), kind)
    status, _ = refused(data[: int(len(data) * part)])
    assert status is Status.decode_error


def test_details_are_the_same_every_time() -> None:
    """They are stored, and stored files are compared."""
    assert refused(b"junk" * 9) == refused(b"junk" * 9)
    assert "0x" not in refused(b"junk" * 9)[1]


def test_postscript_is_not_run() -> None:
    """Pillow would hand it to Ghostscript."""
    status, detail = refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    assert status is Status.decode_error
    assert "known format" in detail


FILES = [
    encode(noise(20), "PNG"),
    encode(noise(20), "JPEG"),
    encode(noise(20), "WEBP"),
    encode(Image.fromarray(noise(20)).quantize(16), "GIF"),
    encode(noise(20), "TIFF", compression="tiff_lzw"),
    encode(noise(20), "BMP"),
    encode(noise(20), "PPM"),
]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=8),
    st.integers(0, 4000),
)
def test_damaged_files_never_raise(data: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    damaged = bytearray(data)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    image, status, detail = decode(bytes(damaged[:cut]), 16)
    assert (image is None) == (status is not Status.ok) == bool(detail)
    assert image is None or image.shape == (16, 16, 3)


@given(st.binary(max_size=200))
def test_random_bytes_never_raise(data: bytes) -> None:
    assert decode(data, 8)[1] in (Status.empty, Status.decode_error)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_streams_keep_their_order(workers: int) -> None:
    items = [(i, encode(noise(4 + i % 5, i)) if i % 7 else b"junk") for i in range(300)]
    out = list(decode_stream(iter(items), 4, workers, data_of=lambda item: item[1]))
    assert [item for item, _, _, _ in out] == items
    for (number, data), image, status, detail in out:
        expected = decode(data, 4)
        assert (status, detail) == expected[1:], number
        np.testing.assert_array_equal(image, expected[0])  # type: ignore[arg-type]


def test_streams_read_ahead_within_bounds() -> None:
    """At most two chunks for each thread, and the one that is being filled."""
    taken = 0

    def items():  # type: ignore[no-untyped-def]
        nonlocal taken
        for _ in range(10_000):
            taken += 1
            yield encoded

    encoded = encode(noise(2))
    stream = decode_stream(items(), 2, 2, data_of=lambda data: data)
    next(stream)
    assert taken <= 64 * (2 * 2 + 1)
    stream.close()  # type: ignore[attr-defined]


# --- the same picture in any format -----------------------------------------------------------------------

GREY = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
WIDE = GREY.astype(np.uint16) * 257  # the same greys in 16 bits


def saved(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(name + data) if crc is None else crc
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


def png_of(samples: bytes, depth: int, colour: int, *more: bytes, side: int = 8) -> bytes:
    """A PNG of rows of samples, each row without its filter byte."""
    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    row = len(samples) // side
    lines = b"".join(b"\0" + samples[at : at + row] for at in range(0, len(samples), row))
    parts = (chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def pgm(values: np.ndarray, top: int) -> bytes:
    return b"P5 8 8 %d\n" % top + values.astype(">u2").tobytes()


def tiff(values: np.ndarray, kind: int, white_is_zero: bool) -> bytes:
    """Uncompressed, little-endian: samples as they are, `kind` 1 for whole numbers, 3 for real ones."""
    data, bits = values.tobytes(), values.dtype.itemsize * 8
    tags = [(256, 8), (257, 8), (258, bits), (259, 1), (262, 0 if white_is_zero else 1), (273, 8), (277, 1), (278, 8),
            (279, len(data)), (339, kind)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


RGB16 = np.stack([WIDE] * 3, 2).astype(">u2").tobytes()
TWINS = {
    "png, 16 bits": saved(WIDE, "PNG"),
    "png, 16 bits, colour": png_of(RGB16, 16, 2),
    "png, palette": saved(GREY, "PNG", optimize=True),
    "tiff, 8 bits": saved(GREY, "TIFF"),
    "tiff, 16 bits": saved(WIDE, "TIFF"),
    "tiff, white is zero": tiff(255 - GREY, 1, white_is_zero=True),
    "tiff, 16 bits, white is zero": tiff(65535 - WIDE, 1, white_is_zero=True),
    "tiff, real, white is zero": tiff((1 - GREY / 255).astype("<f4"), 3, white_is_zero=True),
    "tiff, real numbers to 1": tiff((GREY / 255).astype("<f4"), 3, white_is_zero=False),
    "tiff, real numbers to 255": tiff(GREY.astype("<f4"), 3, white_is_zero=False),
    "tiff, real numbers to 65535": tiff(WIDE.astype("<f4"), 3, white_is_zero=False),
    "pgm, 8 bits": saved(GREY, "PPM"),
    "pgm, 16 bits": pgm(WIDE, 65535),
    "bmp": saved(GREY, "BMP"),
    "webp": saved(np.stack([GREY] * 3, 2), "WEBP", lossless=True),
    "gif": saved(GREY, "GIF"),
}


@pytest.mark.parametrize("name", TWINS)
def test_the_same_picture_in_any_format(name: str) -> None:
    pixels, status, detail = decode(TWINS[name], 8)
    assert (status, detail) == (Status.ok, "")
    np.testing.assert_array_equal(pixels, np.stack([GREY] * 3, 2))


@pytest.mark.parametrize("dark", [saved(WIDE // 300, "PNG"), pgm(WIDE // 300, 65535), saved(WIDE // 300, "TIFF")])
def test_a_dark_picture_of_16_bits_stays_dark(dark: bytes) -> None:
    """Values up to 215 of 65,535: they are not taken for 8 bits."""
    pixels, _, _ = decode(dark, 8)
    assert pixels is not None
    assert pixels.max() == 1


def test_a_real_number_beyond_one_does_not_change_the_others() -> None:
    values = (GREY / 255).astype("<f4")
    values[0, 0], values[0, 1] = 1.01, np.nan
    pixels, status, _ = decode(tiff(values, 3, white_is_zero=False), 8)
    assert status is Status.ok
    expected = GREY.copy()
    expected[0, :2] = 255, 0
    np.testing.assert_array_equal(pixels[..., 0], expected)


@pytest.mark.parametrize(
    ("samples", "depth", "colour", "transparent", "painted"),
    [
        (GREY.tobytes(), 8, 0, 100, GREY == 100),
        (WIDE.astype(">u2").tobytes(), 16, 0, 100 * 257, GREY == 100),
        (bytes([0b00011011] * 16), 2, 0, 2, np.tile([False, False, True, False], (8, 2))),
        (bytes([0x3C] * 32), 4, 0, 12, np.tile([False, True], (8, 4))),
    ],
)
def test_a_transparent_grey_is_white(samples: bytes, depth: int, colour: int, transparent: int, painted: Any) -> None:
    opaque, _, _ = decode(png_of(samples, depth, colour), 8)
    pixels, status, _ = decode(png_of(samples, depth, colour, chunk(b"tRNS", struct.pack(">H", transparent))), 8)
    assert status is Status.ok
    assert painted.any()
    np.testing.assert_array_equal(pixels, np.where(painted[..., None], 255, opaque))


def test_a_transparent_colour_of_16_bits_is_white() -> None:
    more = chunk(b"tRNS", struct.pack(">HHH", *[100 * 257] * 3))
    pixels, _, _ = decode(png_of(RGB16, 16, 2, more), 8)
    np.testing.assert_array_equal(pixels[..., 0], np.where(GREY == 100, 255, GREY))


LONG = b"Comment\0\0" + zlib.compress(bytes(2 << 20))
TROUBLES = {
    "a long comment": chunk(b"zTXt", LONG),
    "a long profile": chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2 << 20))),
    "a comment's checksum": chunk(b"tEXt", b"Comment\0hello", crc=1),
    "a time's checksum": chunk(b"tIME", bytes(7), crc=1),
    "a comment that is no text": chunk(b"iTXt", b"\xff\xff"),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_whole_pixels_are_used_whatever_the_comments(name: str) -> None:
    pixels, status, _ = decode(png_of(GREY.tobytes(), 8, 0, TROUBLES[name]), 8)
    assert status is Status.ok
    np.testing.assert_array_equal(pixels[..., 0], GREY)


def test_broken_pixels_are_not_used() -> None:
    good = png_of(GREY.tobytes(), 8, 0, TROUBLES["a comment's checksum"])
    at = good.index(b"IDAT") + 8
    for bad in (good[:at] + b"\xff" + good[at + 1 :], good[: at + 10], good[:-12]):
        assert decode(bad, 8)[1] is Status.decode_error


def test_heic() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    picture = np.stack([np.kron(GREY, np.ones((8, 8), np.uint8))] * 3, 2)
    pillow_heif.from_pillow(Image.fromarray(picture)).save(buffer, quality=90)
    pixels, status, _ = decode(buffer.getvalue(), 64)
    assert status is Status.ok
    assert np.abs(pixels.astype(int) - picture).mean() < 4


# --- framing: as timm's evaluation does it ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (97, 64), (64, 97), (64, 64), (40, 31), (500, 60)])
@pytest.mark.parametrize(
    "framing",
    [
        Framing(0.875),
        Framing(0.95, "bilinear"),
        Framing(0.8, "lanczos"),
        Framing(1.0, "bilinear", "squash"),
        Framing(0.9, "bicubic", "squash"),
    ],
    ids=str,
)
def test_framing_gives_the_pixels_of_timms_evaluation(shape: tuple[int, int], framing: Framing) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8))
    transform = create_transform(
        input_size=(3, 64, 64), is_training=False, mean=(0.0,) * 3, std=(1.0,) * 3,
        crop_pct=framing.crop_pct, interpolation=framing.interpolation, crop_mode=framing.crop_mode,
    )  # fmt: skip
    expected = (transform(picture) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image, status, _ = decode(encode(picture, "PNG"), 64, framing)
    assert status is Status.ok
    assert np.array_equal(image, expected)


def test_by_default_an_image_of_the_size_is_not_cropped_and_with_a_framing_it_is() -> None:
    picture = Image.fromarray(noise(32))
    whole, cropped = (decode(encode(picture, "PNG"), 32, framing)[0] for framing in (Framing(), Framing(0.5)))
    assert np.array_equal(whole, np.asarray(picture))
    assert np.array_equal(cropped, np.asarray(picture.resize((64, 64), Image.Resampling.BICUBIC))[16:48, 16:48])


# --- JPEG: the pixels of Pillow, and what it does not tell --------------------------------------------------

PHOTOGRAPH = Image.fromarray(load_sample_image("china.jpg")).crop((0, 0, 320, 213))
JPEG_KINDS = [
    {"quality": quality, "subsampling": subsampling, "progressive": progressive}
    for quality, subsampling, progressive in ((50, 2, False), (90, 0, False), (90, 1, True), (30, 2, True))
]


def by_pillow(data: bytes, size: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (2 * size, 2 * size))
    upright = ImageOps.exif_transpose(image.convert("RGB"))
    side = min(upright.size)
    left, top = (upright.width - side) / 2, (upright.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(upright.resize((size, size), Image.Resampling.BICUBIC, box=box))


@pytest.mark.parametrize("options", JPEG_KINDS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [16, 45, 128])
def test_a_jpeg_has_the_pixels_that_pillow_gives(mode: str, size: int, options: dict[str, Any]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for more in ({}, {"exif": exif}):
        data = encode(PHOTOGRAPH.convert(mode), "JPEG", **options, **more)
        assert np.array_equal(decoded(data, size), by_pillow(data, size))


@pytest.mark.parametrize("options", JPEG_KINDS, ids=str)
def test_a_jpeg_with_bytes_missing_inside_is_told(options: dict[str, Any]) -> None:
    """Where it can be: a baseline stream that falls into step again, with as many blocks, looks whole."""
    data = encode(PHOTOGRAPH, "JPEG", **options)
    random, begin = np.random.default_rng(0), data.index(b"\xff\xda") + 20
    told = 0
    for _ in range(60):
        at = int(random.integers(begin, len(data) - 60))
        image, status, detail = decode(data[:at] + data[at + int(random.integers(1, 40)) :], 128)
        if image is None:
            assert status is Status.decode_error
            assert "bytes inside are missing or changed" in detail or "broken data stream" in detail
            told += 1
    assert told / 60 > (0.65 if options["progressive"] else 0.3)


def test_without_simplejpeg_the_pixels_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(PHOTOGRAPH, "JPEG", quality=80)
    before = decoded(data, 48)
    monkeypatch.setattr("pipeline.data.decode._simplejpeg", lambda: None)
    assert np.array_equal(decoded(data, 48), before)


@pytest.mark.parametrize("options", JPEG_KINDS, ids=str)
def test_a_jpeg_cut_short_is_told(options: dict[str, Any]) -> None:
    data = encode(PHOTOGRAPH, "JPEG", **options)
    cut = [decode(data[: int(len(data) * share)], 64)[0] is None for share in np.linspace(0.1, 0.995, 40)]
    assert all(cut)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-2],  # without its end marker
        lambda data: data + b"more" * 20,
        lambda data: data[:-2] + bytes(300) + data[-2:],  # padded
        lambda data: data[:-2] + b"\x12\x34" + data[-2:],  # two stray bytes, as some cameras leave
        lambda data: data[:2] + b"\xff\xfe\x00\x20" + bytes(30) + data[2:],  # a comment
        lambda data: data[:2] + b"\xff\xe1\x00\x20Exif\x00\x00" + b"\xee" * 24 + data[2:],  # EXIF that is none
    ],
)
@pytest.mark.parametrize("options", JPEG_KINDS[:3:2], ids=str)
def test_a_jpeg_that_is_odd_but_whole_is_used(change: Any, options: dict[str, Any]) -> None:
    data = encode(PHOTOGRAPH, "JPEG", **options)
    assert np.array_equal(decoded(change(data), 64), decoded(data, 64))
