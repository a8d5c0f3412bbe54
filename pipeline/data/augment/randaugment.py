"""RandAugment of a batch, each image with operations of its own (arXiv:1909.13719).

The images of a layer are grouped by operation, and each group is treated at once; the five geometric
operations form one group. Pixels are rounded to 8 bits after every operation, as in Pillow, which is
the reference for all of them. The strength of an operation is between −1 and 1: the recipe's magnitude
over 10, with a random sign where the operation has two directions. More magnitude means a stronger
effect for all of them (in NoisyStudent's code it means a weaker one for posterize and solarize).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.config import AugmentSettings
from pipeline.data.augment.draws import Draws
from pipeline.data.augment.geometry import GREY, affine, to_uint8

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
# At full strength; torchvision's RandAugment has the same values.
ROTATE = 30.0  # degrees
SHEAR = 0.3
TRANSLATE = 150 / 331  # of the side
ENHANCE = 0.9  # factors of brightness, colour, contrast and sharpness are 1 ± this
POSTERIZE = 4  # bits taken away


def randaugment(images: Tensor, settings: AugmentSettings, draw: Draws) -> Tensor:
    """Apply `settings.randaugment_layers` random operations to each image.

    Takes uint8 (B, 3, S, S) on any device and returns the same kind; the input is left as it was.
    """
    images = images.clone()
    names = settings.randaugment_operations
    for layer in range(settings.randaugment_layers):
        chosen = draw.integer(f"operation {layer}", len(names))
        if settings.randaugment_probability < 1:
            chosen[~draw.coin(f"acts {layer}", settings.randaugment_probability)] = -1
        sign = torch.where(draw.coin(f"sign {layer}"), 1.0, -1.0)
        _layer(images, names, chosen, sign * settings.randaugment_magnitude / 10)
    return images


def apply(images: Tensor, name: str, strength: Tensor) -> Tensor:
    """One operation on all images: uint8 (B, 3, S, S) and strengths (B,) in, uint8 (B, 3, S, S) out."""
    if name in GEOMETRIC:
        return _geometric(images, _theta([name] * len(images), strength))
    return PIXELWISE[name](images, strength)


def _layer(images: Tensor, names: tuple[str, ...], chosen: Tensor, strength: Tensor) -> None:
    """Change `images` in place; `chosen` (B,) are indices of `names`, −1 for none."""
    choices = chosen.tolist()
    groups: dict[str, list[int]] = {}  # by what treats them: rows, in ascending order
    for row, choice in enumerate(choices):
        if choice >= 0 and names[choice] != "identity":
            groups.setdefault("geometric" if names[choice] in GEOMETRIC else names[choice], []).append(row)
    if not groups:
        return
    order = torch.tensor([row for rows in groups.values() for row in rows])
    sizes = [len(rows) for rows in groups.values()]
    on_device = order.to(images.device)  # one transfer for all groups
    groups_of_rows = zip(groups.items(), order.split(sizes), on_device.split(sizes), strict=True)
    for (kind, rows), on_cpu, index in groups_of_rows:
        group, strengths = images[index], strength[on_cpu]
        if kind == "geometric":
            images[index] = _geometric(group, _theta([names[choices[row]] for row in rows], strengths))
        else:
            images[index] = PIXELWISE[kind](group, strengths)


def _geometric(images: Tensor, theta: Tensor) -> Tensor:
    # Shifted by the fill, so that what lies outside, zero, is grey.
    return to_uint8(affine(images.float().sub_(GREY), theta).add_(GREY))


def _theta(names: list[str], strength: Tensor) -> Tensor:
    """Output to input coordinates of each image, (B, 2, 3); shears keep the upper left corner."""
    kind = torch.tensor([GEOMETRIC.index(name) for name in names])

    def of(name: str, value: Tensor) -> Tensor:
        return torch.where(kind == GEOMETRIC.index(name), value, 0.0)

    angle = of("rotate", strength * math.radians(ROTATE))
    shear_x, shear_y = of("shear_x", strength * SHEAR), of("shear_y", strength * SHEAR)
    shift_x, shift_y = (
        of("translate_x", strength * 2 * TRANSLATE),
        of("translate_y", strength * 2 * TRANSLATE),
    )
    cos, sin = angle.cos(), angle.sin()
    rows = [cos, shear_x - sin, shear_x + shift_x, shear_y + sin, cos, shear_y + shift_y]
    return torch.stack(rows, dim=1).view(-1, 2, 3)


def _identity(images: Tensor, strength: Tensor) -> Tensor:
    return images


def _invert(images: Tensor, strength: Tensor) -> Tensor:
    return 255 - images


def _posterize(images: Tensor, strength: Tensor) -> Tensor:
    dropped = (strength.abs() * POSTERIZE).round().to(torch.uint8)
    return images & _per_image(255 - (2**dropped - 1), images)


def _solarize(images: Tensor, strength: Tensor) -> Tensor:
    threshold = _per_image(256 * (1 - strength.abs()), images)
    return torch.where(images >= threshold, 255 - images, images)


def _autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    """Stretch each channel to 0 … 255."""
    low, high = images.amin((2, 3), keepdim=True).int(), images.amax((2, 3), keepdim=True).int()
    stretched = (images - low) * 255 // (high - low).clamp(min=1)
    return torch.where(high > low, stretched, images).to(torch.uint8)


def _equalize(images: Tensor, strength: Tensor) -> Tensor:
    """Flatten each channel's histogram by Pillow's integer rule.

    By that rule an image of fewer than about 256 pixels is left as it is.
    """
    pixels = images.flatten(2).flatten(0, 1).long()  # (B · 3, S · S)
    histogram = torch.zeros(len(pixels), 256, dtype=torch.long, device=images.device)
    histogram.scatter_add_(1, pixels, torch.ones_like(pixels))
    brightest = histogram.gather(1, pixels.amax(1, keepdim=True))
    step = (pixels.shape[1] - brightest) // 255
    below = histogram.cumsum(1) - histogram
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    equalized = table.gather(1, pixels)
    return torch.where(step > 0, equalized, pixels).view_as(images).to(torch.uint8)


def _brightness(images: Tensor, strength: Tensor) -> Tensor:
    return _enhance(images, torch.zeros_like(images), strength)


def _color(images: Tensor, strength: Tensor) -> Tensor:
    return _enhance(images, _luma(images).expand_as(images), strength)


def _contrast(images: Tensor, strength: Tensor) -> Tensor:
    luma = _luma(images)
    count = luma[0].numel()
    mean = (2 * luma.sum((1, 2, 3), keepdim=True) + count) // (2 * count)  # rounded half up
    return _enhance(images, mean.expand_as(images), strength)


def _sharpness(images: Tensor, strength: Tensor) -> Tensor:
    """Away from, or towards, the mean of 3 × 3 pixels (weights 1, the middle 5); the edge stays."""
    whole = images.int()
    rows = whole[..., :-2, :] + whole[..., 1:-1, :] + whole[..., 2:, :]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    blurred = whole.clone()
    blurred[..., 1:-1, 1:-1] = (2 * (box + 4 * whole[..., 1:-1, 1:-1]) + 13) // 26  # rounded
    return _enhance(images, blurred, strength)


def _enhance(images: Tensor, dull: Tensor, strength: Tensor) -> Tensor:
    """Between `dull` (factor 0) and the image (factor 1), or beyond the image (factor > 1)."""
    factor = _per_image(1 + ENHANCE * strength, images)
    dull = dull.float()
    return to_uint8(dull + factor * (images.float() - dull))


def _luma(images: Tensor) -> Tensor:
    """Pillow's grey: ITU-R 601-2 in 16-bit fixed point, int32 (B, 1, S, S)."""
    red, green, blue = images.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16)[:, None]


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images.device).view(-1, 1, 1, 1)


PIXELWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": _identity,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": _invert,
    "posterize": _posterize,
    "solarize": _solarize,
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
}
