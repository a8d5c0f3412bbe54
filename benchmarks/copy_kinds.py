"""Ways to make a copy of a picture that a person would still call a copy, in three groups.

`NAMED` are those that the filter must know about. `DESIGN` were looked at while the comparison was built, the later
half of them once, before covered pictures were provided for. `HELD_OUT` were written after that, and nothing was
changed because of them. A kind is a function of a picture (RGB, any size) and a generator; it gives a picture,
sometimes of another size or mode, which the decode stage brings back.
"""

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageOps

Picture = Image.Image
Kind = Callable[[Picture, np.random.Generator], Picture]
Floats = NDArray[np.float64]
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def saved(image: Picture, kind: str = "JPEG", **options: object) -> Picture:
    """Through a file format and back; JPEG of quality 85 unless given another."""
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 85} | options if kind == "JPEG" else options))
    again = Image.open(file)
    again.load()
    return again


def shifted(image: Picture, right: int, down: int, border: str = "edge") -> Picture:
    """Moved by pixels; `border` as numpy.pad names it."""
    wide = ((max(down, 0), max(-down, 0)), (max(right, 0), max(-right, 0)), (0, 0))
    pixels = np.pad(np.asarray(image), wide, mode=border)  # type: ignore[call-overload]
    top, left = max(-down, 0), max(-right, 0)
    return Image.fromarray(pixels[top : top + image.height, left : left + image.width])


def cropped(image: Picture, left: float, top: float, right: float, bottom: float) -> Picture:
    """Less so many 32nds of its side at each edge, scaled back."""
    w, h = image.width / 32, image.height / 32
    box = (left * w, top * h, image.width - right * w, image.height - bottom * h)
    return image.resize(image.size, BICUBIC, box=box)


def scaled(image: Picture, side: int) -> Picture:
    """To a square of `side`, for 32 pixels; larger pictures in proportion."""
    return image.resize((side * image.width // 32, side * image.height // 32), BICUBIC)


def mapped(image: Picture, change: Callable[[Floats], Floats]) -> Picture:
    """Every value (H, W, 3) in 0 … 1 through a function."""
    values = change(np.asarray(image.convert("RGB"), np.float64) / 255)
    return Image.fromarray(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8))


def noisy(image: Picture, random: np.random.Generator, sigma: float) -> Picture:
    """Gaussian noise of so many grey levels."""
    return mapped(image, lambda v: v + random.normal(0, sigma / 255, v.shape))


def turned(image: Picture, degrees: float) -> Picture:
    """Rotated about the centre and trimmed to what has no empty corners."""
    inner = 1 / (np.cos(np.radians(abs(degrees))) + np.sin(np.radians(abs(degrees))))
    edge = 16 * (1 - inner)
    return cropped(image.rotate(degrees, BICUBIC), edge, edge, edge, edge)


def mirror(image: Picture) -> Picture:
    """Left and right exchanged."""
    return ImageOps.mirror(image)


def framed(image: Picture, width: int, colour: str) -> Picture:
    """A border painted over the edge, so many 32nds wide."""
    image = image.copy()
    ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1), None, colour, width * image.width // 32)
    return image


def boxed(image: Picture, random: np.random.Generator, wide: int, high: int, colour: str) -> Picture:
    """A filled box somewhere, in 32nds of the side."""
    image, unit = image.copy(), image.width // 32
    left, top = random.integers(0, 33 - wide), random.integers(0, 33 - high)
    box = (left * unit, top * unit, (left + wide) * unit - 1, (top + high) * unit - 1)
    ImageDraw.Draw(image).rectangle(box, colour)
    return image


def written(image: Picture, text: str, colour: str) -> Picture:
    """A line of text at the foot."""
    image = image.copy()
    ImageDraw.Draw(image).text((1, image.height * 21 // 32), text, colour, font_size=image.height * 9 // 32)
    return image


def bright(image: Picture, factor: float) -> Picture:
    return ImageEnhance.Brightness(image).enhance(factor)


def contrast(image: Picture, factor: float) -> Picture:
    return ImageEnhance.Contrast(image).enhance(factor)


def colour(image: Picture, factor: float) -> Picture:
    return ImageEnhance.Color(image).enhance(factor)


def hue(image: Picture, degrees: float) -> Picture:
    bands = list(image.convert("HSV").split())
    bands[0] = bands[0].point(lambda v: int(v + degrees * 256 / 360) % 256)
    return Image.merge("HSV", bands).convert("RGB")


def cast(image: Picture, red: float, green: float, blue: float) -> Picture:
    return mapped(image, lambda v: v * np.array([red, green, blue]))


def blurred(image: Picture, radius: float) -> Picture:
    return image.filter(ImageFilter.GaussianBlur(radius * image.width / 32))


def vignette(image: Picture) -> Picture:
    y, x = np.mgrid[-1 : 1 : image.height * 1j, -1 : 1 : image.width * 1j]
    return mapped(image, lambda v: v * (1 - 0.35 * (x**2 + y**2))[..., None])


def gradient(image: Picture) -> Picture:
    """Light from the left."""
    ramp = np.linspace(1.35, 0.65, image.width)[None, :, None]
    return mapped(image, lambda v: v * ramp)


def speckled(image: Picture, random: np.random.Generator, share: float) -> Picture:
    """Pixels that are black or white."""
    dice = random.random(image.size[::-1])[..., None]
    return mapped(image, lambda v: np.where(dice < share / 2, 0.0, np.where(dice > 1 - share / 2, 1.0, v)))


def skewed(image: Picture, amount: float) -> Picture:
    """Perspective: the upper corners drawn in."""
    w, h, d = image.width, image.height, amount * image.width / 32
    return image.transform((w, h), Image.Transform.QUAD, (d, 0, 0, h, w, h, w - d, 0), BICUBIC)


def sheared(image: Picture, amount: float) -> Picture:
    middle = amount * image.height / 2
    return image.transform(image.size, Image.Transform.AFFINE, (1, amount, -middle, 0, 1, 0), BICUBIC, fillcolor="gray")


def laid_over(image: Picture) -> Picture:
    """A half-transparent white disc on a corner."""
    over = image.copy()
    side = image.width
    ImageDraw.Draw(over).ellipse((side * 0.55, side * 0.55, side * 0.95, side * 0.95), "white")
    return Image.blend(image, over, 0.5)


NAMED: dict[str, Kind] = {
    "JPEG 75": lambda im, r: saved(im, quality=75),
    "JPEG 40": lambda im, r: saved(im, quality=40),
    "PNG": lambda im, r: saved(im, "PNG"),
    "WebP 70": lambda im, r: saved(im, "WEBP", quality=70),
    "mirrored": lambda im, r: saved(mirror(im)),
    "shifted by 1": lambda im, r: saved(shifted(im, 1, 1)),
    "shifted by 2": lambda im, r: saved(shifted(im, 2, 2)),
    "shifted by 2, black edge": lambda im, r: saved(shifted(im, -2, 2, "constant")),
    "brightened by 20%": lambda im, r: saved(bright(im, 1.2)),
    "darkened by 20%": lambda im, r: saved(bright(im, 0.8)),
    "desaturated": lambda im, r: saved(colour(im, 0.0)),
    "cropped by 2": lambda im, r: saved(cropped(im, 2, 2, 2, 2)),
}

DESIGN: dict[str, Kind] = {
    "JPEG 30": lambda im, r: saved(im, quality=30),
    "GIF": lambda im, r: saved(im.quantize(256), "GIF"),
    "BMP": lambda im, r: saved(im, "BMP"),
    "shifted by 2, reflected edge": lambda im, r: saved(shifted(im, 2, -2, "reflect")),
    "shifted by 3": lambda im, r: saved(shifted(im, 3, 3)),
    "shifted by 3, wrapped": lambda im, r: saved(shifted(im, -3, 1, "wrap")),
    "contrast +20%": lambda im, r: saved(contrast(im, 1.2)),
    "contrast −30%": lambda im, r: saved(contrast(im, 0.7)),
    "brightened by 30%": lambda im, r: saved(bright(im, 1.3)),
    "gamma 0.7": lambda im, r: saved(mapped(im, lambda v: v**0.7)),
    "hue by 40°": lambda im, r: saved(hue(im, 40)),
    "warm cast": lambda im, r: saved(cast(im, 1.15, 1.0, 0.75)),
    "cropped by 1": lambda im, r: saved(cropped(im, 1, 1, 1, 1)),
    "cropped by 3": lambda im, r: saved(cropped(im, 3, 3, 3, 3)),
    "cropped by 4 at the left": lambda im, r: saved(cropped(im, 4, 0, 0, 0)),
    "shrunk to 24 and back": lambda im, r: saved(scaled(scaled(im, 24), 32)),
    "saved at 64": lambda im, r: saved(scaled(im, 64)),
    "blur 0.7": lambda im, r: saved(blurred(im, 0.7)),
    "noise 5": lambda im, r: saved(noisy(im, r, 5)),
    "turned by 3°": lambda im, r: saved(turned(im, 3)),
    "frame of 2": lambda im, r: saved(framed(im, 2, "black")),
    "text": lambda im, r: saved(written(im, "img", "white")),
    "posterised to 3 bits": lambda im, r: saved(ImageOps.posterize(im, 3)),
    "autocontrast": lambda im, r: saved(ImageOps.autocontrast(im)),
    "mirrored, shifted by 2, JPEG 50": lambda im, r: saved(shifted(mirror(im), 2, -2), quality=50),
    "grey, cropped by 2, darker": lambda im, r: saved(bright(cropped(im, 2, 2, 2, 2).convert("L"), 0.75)),
    "JPEG 95": lambda im, r: saved(im, quality=95),
    "JPEG 20": lambda im, r: saved(im, quality=20),
    "WebP 30": lambda im, r: saved(im, "WEBP", quality=30),
    "palette of 32": lambda im, r: saved(im.quantize(32), "PNG"),
    "TIFF, grey": lambda im, r: saved(im.convert("L"), "TIFF"),
    "CMYK JPEG": lambda im, r: saved(im.convert("CMYK")),
    "transparent PNG": lambda im, r: saved(im.convert("RGBA"), "PNG"),
    "shifted by 3, black edge": lambda im, r: saved(shifted(im, 3, -3, "constant")),
    "shifted by 3, reflected edge": lambda im, r: saved(shifted(im, -3, -3, "reflect")),
    "shifted by 4 to the right": lambda im, r: saved(shifted(im, 4, 0)),
    "rolled by 2": lambda im, r: saved(ImageChops.offset(im, 2, 2)),
    "darkened by 30%": lambda im, r: saved(bright(im, 0.7)),
    "brightened by 40%": lambda im, r: saved(bright(im, 1.4)),
    "contrast +30%": lambda im, r: saved(contrast(im, 1.3)),
    "contrast −50%": lambda im, r: saved(contrast(im, 0.5)),
    "gamma 1.4": lambda im, r: saved(mapped(im, lambda v: v**1.4)),
    "saturation × 1.6": lambda im, r: saved(colour(im, 1.6)),
    "hue by 120°": lambda im, r: saved(hue(im, 120)),
    "cold cast": lambda im, r: saved(cast(im, 0.75, 0.95, 1.2)),
    "sepia": lambda im, r: saved(ImageOps.colorize(im.convert("L"), (20, 10, 0), (255, 240, 200))),
    "one channel": lambda im, r: saved(im.getchannel("R")),
    "channels exchanged": lambda im, r: saved(Image.merge("RGB", im.split()[::-1])),
    "cropped by 4": lambda im, r: saved(cropped(im, 4, 4, 4, 4)),
    "cropped by 4 above, 2 at the right": lambda im, r: saved(cropped(im, 0, 4, 2, 0)),
    "cropped by 1, 2, 3, 0": lambda im, r: saved(cropped(im, 1, 2, 3, 0)),
    "shrunk to 20 and back": lambda im, r: saved(scaled(scaled(im, 20), 32)),
    "pixels of 2 × 2": lambda im, r: saved(im.resize((16, 16)).resize(im.size, Image.Resampling.NEAREST)),
    "saved at 40": lambda im, r: saved(scaled(im, 40)),
    "saved at 24": lambda im, r: saved(scaled(im, 24)),
    "padded to 40": lambda im, r: saved(ImageOps.expand(im, im.width // 8, "black")),
    "squeezed to 28 across, white sides": lambda im, r: saved(
        ImageOps.expand(im.resize((im.width * 7 // 8, im.height), BICUBIC), (im.width // 16, 0), "white")
    ),
    "blur 1": lambda im, r: saved(blurred(im, 1.0)),
    "median of 3": lambda im, r: saved(im.filter(ImageFilter.MedianFilter(3))),
    "sharpened": lambda im, r: saved(im.filter(ImageFilter.SHARPEN)),
    "unsharp mask": lambda im, r: saved(im.filter(ImageFilter.UnsharpMask(2, 150, 0))),
    "noise 10": lambda im, r: saved(noisy(im, r, 10), "PNG"),
    "salt and pepper, 2%": lambda im, r: saved(speckled(im, r, 0.02), "PNG"),
    "turned by 2°": lambda im, r: saved(turned(im, 2)),
    "turned by −5°": lambda im, r: saved(turned(im, -5)),
    "turned by 4°, grey corners": lambda im, r: saved(im.rotate(4, BICUBIC, fillcolor="gray")),
    "sheared by 0.08": lambda im, r: saved(sheared(im, 0.08)),
    "perspective of 2": lambda im, r: saved(skewed(im, 2)),
    "frame of 1, white": lambda im, r: saved(framed(im, 1, "white")),
    "frame of 3, black": lambda im, r: saved(framed(im, 3, "black")),
    "white box of 8 × 8": lambda im, r: saved(boxed(im, r, 8, 8, "white")),
    "black bar of 32 × 5": lambda im, r: saved(boxed(im, r, 32, 5, "black")),
    "disc laid over": lambda im, r: saved(laid_over(im)),
    "equalised": lambda im, r: saved(ImageOps.equalize(im)),
    "solarised": lambda im, r: saved(ImageOps.solarize(im, 192)),
    "inverted": lambda im, r: saved(ImageOps.invert(im)),
    "vignette": lambda im, r: saved(vignette(im)),
    "light from the left": lambda im, r: saved(gradient(im)),
    "upside down": lambda im, r: saved(ImageOps.flip(im)),
    "turned by 90°": lambda im, r: saved(im.rotate(90)),
    "mirrored, cropped by 3, JPEG 40": lambda im, r: saved(cropped(mirror(im), 3, 3, 3, 3), quality=40),
    "mirrored, shifted by 3, grey": lambda im, r: saved(shifted(mirror(im), 3, 2).convert("L")),
    "turned by 3°, brightened by 20%, WebP 60": lambda im, r: saved(bright(turned(im, 3), 1.2), "WEBP", quality=60),
    "shifted by 1, blur 0.7, contrast −30%": lambda im, r: saved(contrast(blurred(shifted(im, 1, -1), 0.7), 0.7)),
    "saved at 48, mirrored, noise 5": lambda im, r: saved(noisy(scaled(mirror(im), 48), r, 5)),
    "cropped by 2, text, JPEG 60": lambda im, r: saved(written(cropped(im, 2, 2, 2, 2), "abc", "yellow"), quality=60),
    "frame of 2, darkened by 20%, shifted by 1": lambda im, r: saved(
        framed(bright(shifted(im, 1, 1), 0.8), 2, "white")
    ),
    "JPEG 50 five times, shifted by 1 each": lambda im, r: _worn(im),
}


HELD_OUT: dict[str, Kind] = {
    "JPEG 60, WebP 50, JPEG 70 in turn": lambda im, r: saved(
        saved(saved(im, quality=60), "WEBP", quality=50), quality=70
    ),
    "JPEG 2000, 1:6": lambda im, r: saved(im, "JPEG2000", quality_mode="rates", quality_layers=[6]),
    "GIF of 16 colours": lambda im, r: saved(im.quantize(16), "GIF"),
    "shifted by −1 and 3, symmetric edge": lambda im, r: saved(shifted(im, -1, 3, "symmetric")),
    "shifted by 2.5": lambda im, r: saved(_slid(im, 2.5)),
    "brightened by 25%, contrast +20%": lambda im, r: saved(contrast(bright(im, 1.25), 1.2)),
    "contrast +60%": lambda im, r: saved(contrast(im, 1.6)),
    "darkened by 50%": lambda im, r: saved(bright(im, 0.5)),
    "gamma 0.5": lambda im, r: saved(mapped(im, lambda v: v**0.5)),
    "gamma 2": lambda im, r: saved(mapped(im, lambda v: v**2)),
    "hue by −90°": lambda im, r: saved(hue(im, -90)),
    "green cast": lambda im, r: saved(cast(im, 0.8, 1.2, 0.8)),
    "duotone": lambda im, r: saved(ImageOps.colorize(im.convert("L"), "navy", "orange")),
    "cropped by 5": lambda im, r: saved(cropped(im, 5, 5, 5, 5)),
    "cropped by 3 above and at the left": lambda im, r: saved(cropped(im, 3, 3, 0, 0)),
    "cropped by 3 at both sides": lambda im, r: saved(cropped(im, 3, 0, 3, 0)),
    "shrunk to 16 and back": lambda im, r: saved(scaled(scaled(im, 16), 32)),
    "saved at 96, JPEG 30": lambda im, r: saved(scaled(im, 96), quality=30),
    "box blur 3 × 3": lambda im, r: saved(im.filter(ImageFilter.BoxBlur(im.width / 32))),
    "moved while exposed, 3": lambda im, r: saved(_smeared(im)),
    "commonest of 3 × 3": lambda im, r: saved(im.filter(ImageFilter.ModeFilter(3))),
    "noise 15": lambda im, r: saved(noisy(im, r, 15), "PNG"),
    "grain": lambda im, r: saved(mapped(im, lambda v: v * r.normal(1, 0.08, (*v.shape[:2], 1)))),
    "turned by 7°": lambda im, r: saved(turned(im, 7)),
    "turned by −3°, black corners": lambda im, r: saved(im.rotate(-3, BICUBIC)),
    "sheared by −0.1": lambda im, r: saved(sheared(im, -0.1)),
    "barrel": lambda im, r: saved(_barrel(im)),
    "frame of 4, grey": lambda im, r: saved(framed(im, 4, "gray")),
    "white foot of 6": lambda im, r: saved(_footed(im)),
    "round corners": lambda im, r: saved(_rounded(im)),
    "date at the top": lambda im, r: saved(_dated(im)),
    "mark of 7 × 7 in a corner": lambda im, r: saved(_marked(im)),
    "red disc of 10 in the middle": lambda im, r: saved(_disced(im)),
    "three thin lines": lambda im, r: saved(_lined(im)),
    "posterised to 2 bits": lambda im, r: saved(ImageOps.posterize(im, 2)),
    "palette of 8, dithered": lambda im, r: saved(im.quantize(8, dither=Image.Dither.FLOYDSTEINBERG), "PNG"),
    "black and white, dithered": lambda im, r: saved(im.convert("1"), "PNG"),
    "mirrored, turned by 4°, noise 5": lambda im, r: saved(noisy(turned(mirror(im), 4), r, 5)),
    "cropped by 3, gamma 1.4, WebP 40": lambda im, r: saved(
        mapped(cropped(im, 3, 3, 3, 3), lambda v: v**1.4), "WEBP", quality=40
    ),
    "upside down, JPEG 50": lambda im, r: saved(ImageOps.flip(im), quality=50),
    "saved at 28, shifted by 2": lambda im, r: saved(scaled(shifted(im, 2, -2), 28)),
    "grey, frame of 2, JPEG 60": lambda im, r: saved(framed(im.convert("L").convert("RGB"), 2, "white"), quality=60),
    "shifted by 2, box of 6 × 6": lambda im, r: saved(boxed(shifted(im, -2, 1), r, 6, 6, "red")),
    "mirrored, cropped by 2, warm, blur 0.6, JPEG 60": lambda im, r: saved(
        blurred(cast(cropped(mirror(im), 2, 2, 2, 2), 1.1, 1, 0.8), 0.6), quality=60
    ),
}


def _worn(image: Picture) -> Picture:
    for right, down in ((1, 0), (0, 1), (-1, 0), (1, 1), (0, -1)):
        image = saved(shifted(image, right, down), quality=50)
    return image


def _slid(image: Picture, by: float) -> Picture:
    """Moved to the right by so many 32nds, between pixels; black edge."""
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, -by * image.width / 32, 0, 1, 0), BICUBIC)


def _smeared(image: Picture) -> Picture:
    beside = (shifted(image, by, 0) for by in (-1, 1))
    values = [np.asarray(im, np.float64) for im in (image, *beside)]
    return Image.fromarray(np.rint(np.mean(values, axis=0)).astype(np.uint8))


def _barrel(image: Picture) -> Picture:
    """A lens that draws the corners in by about a pixel of 32."""
    w, h = image.size
    corners = [
        (0.0, 0.0),
        (0.5, 0.0),
        (1.0, 0.0),
        (0.0, 0.5),
        (0.5, 0.5),
        (1.0, 0.5),
        (0.0, 1.0),
        (0.5, 1.0),
        (1.0, 1.0),
    ]
    bent = [(x + 0.06 * (x - 0.5) * (y - 0.5) ** 2 * 4, y + 0.06 * (y - 0.5) * (x - 0.5) ** 2 * 4) for x, y in corners]
    pieces = []
    for i in (0, 1, 3, 4):
        box = (
            round(corners[i][0] * w),
            round(corners[i][1] * h),
            round(corners[i + 4][0] * w),
            round(corners[i + 4][1] * h),
        )
        pieces.append(
            (box, tuple(v * s for j in (i, i + 3, i + 4, i + 1) for v, s in zip(bent[j], (w, h), strict=True)))
        )
    return image.transform(image.size, Image.Transform.MESH, pieces, BICUBIC)


def _painted(image: Picture, paint: Callable[[ImageDraw.ImageDraw, float], None]) -> Picture:
    """Painted on, in 32nds of the side."""
    image = image.copy()
    paint(ImageDraw.Draw(image), image.width / 32)
    return image


def _footed(image: Picture) -> Picture:
    return _painted(image, lambda draw, u: draw.rectangle((0, 26 * u, 32 * u, 32 * u), "white"))


def _rounded(image: Picture) -> Picture:
    mask = Image.new("L", image.size, 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, image.width - 1, image.height - 1), image.width / 4, 255)
    return Image.composite(image, Image.new("RGB", image.size, "white"), mask)


def _dated(image: Picture) -> Picture:
    return _painted(image, lambda draw, u: draw.text((u, 0), "12:05", "orange", font_size=9 * u))


def _marked(image: Picture) -> Picture:
    return _painted(image, lambda draw, u: draw.rectangle((24 * u, 24 * u, 31 * u - 1, 31 * u - 1), "blue", "white"))


def _disced(image: Picture) -> Picture:
    return _painted(image, lambda draw, u: draw.ellipse((11 * u, 11 * u, 21 * u, 21 * u), "red"))


def _lined(image: Picture) -> Picture:
    return _painted(
        image,
        lambda draw, u: [draw.line((0, y * u, 32 * u, (y + 4) * u), "white", round(u)) for y in (5, 14, 23)] and None,
    )
