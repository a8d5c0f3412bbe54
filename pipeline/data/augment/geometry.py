"""Where pixels go: flips, shifts, crops and turns of a batch, and holes in it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import AugmentSettings
from pipeline.data.augment.draws import Draws

GREY = 128  # what NoisyStudent's code puts where an image has nothing to show


def flip_and_crop(images: Tensor, settings: AugmentSettings, draw: Draws) -> Tensor:
    """Mirror, and shift by whole pixels; pixels keep their values.

    Takes and returns uint8 (B, 3, S, S).
    """
    count, _, height, width = images.shape
    y, x = torch.arange(height).expand(count, -1), torch.arange(width).expand(count, -1)  # (B, S)
    if pad := settings.crop_padding:
        shift = draw.integer("crop", 2 * pad + 1, 2) - pad  # (B, 2), −pad … pad
        y, x = y + shift[:, :1], x + shift[:, 1:]
    if settings.flip:
        x = torch.where(draw.coin("flip")[:, None], x.flip(1), x)
    rows, columns = _reflected(y, height).to(images.device), _reflected(x, width).to(images.device)
    planes = height * torch.arange(3 * count, device=images.device).view(count, 3, 1)
    # Whole rows are copied, several times faster than pixels; only columns are picked one by one.
    picked = images.reshape(-1, width).index_select(0, (planes + rows[:, None]).flatten())
    moved = picked.view_as(images).gather(3, columns[:, None, None].expand(images.shape))
    if pad and settings.border == "zero":
        inside = _inside(y, height)[:, None, :, None] & _inside(x, width)[:, None, None, :]
        moved = moved * inside.to(images.device)
    return moved


def warp(images: Tensor, settings: AugmentSettings, draw: Draws) -> Tensor:
    """Random resized crop, rotation and translation in one bilinear interpolation.

    Takes and returns uint8 (B, 3, S, S).
    """
    count = len(images)
    width = height = torch.ones(count)  # of the window that is shown, as parts of the side
    centre = torch.zeros(count, 2)  # of the window; the image spans −1 … 1
    if settings.random_resized_crop is not None:
        width, height = _window(settings.random_resized_crop, draw)
        centre = draw.signed("crop centre", 2) * (1 - torch.stack([width, height], 1))
    centre = centre + 2 * settings.translate * draw.signed("translate", 2)
    angle = math.radians(settings.rotate) * draw.signed("rotate")
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [cos * width, -sin * height, centre[:, 0], sin * width, cos * height, centre[:, 1]], dim=1
    ).view(count, 2, 3)
    padding = "reflection" if settings.border == "reflect" else "zeros"
    return to_uint8(affine(images.float(), theta, padding))


def cutout(images: Tensor, side: int, draw: Draws) -> Tensor:
    """Grey out a square whose centre is uniform over the image; it may hang over the edge.

    Source: arXiv:1708.04552. Takes and returns uint8 (B, 3, S, S).
    """
    _, _, height, width = images.shape
    place = draw.uniform("cutout", 2)
    top, left = (place[:, 0] * height).long() - side // 2, (place[:, 1] * width).long() - side // 2
    y, x = torch.arange(height) - top[:, None], torch.arange(width) - left[:, None]  # (B, S)
    hole = _inside(y, side)[:, None, :, None] & _inside(x, side)[:, None, None, :]  # (B, 1, S, S)
    return images.masked_fill(hole.to(images.device), GREY)


def affine(images: Tensor, theta: Tensor, padding: str = "zeros") -> Tensor:
    """Bilinear affine warp of square images, float (B, 3, S, S).

    `theta` (B, 2, 3) takes a place in the result to a place in `images`, both (x, y) in −1 … 1.
    """
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, "bilinear", padding, align_corners=False)


def to_uint8(values: Tensor) -> Tensor:
    """Round, and clip to 0 … 255."""
    return values.round().clamp_(0, 255).to(torch.uint8)


def _window(smallest: float, draw: Draws) -> tuple[Tensor, Tensor]:
    """Width and height of crops of random area and of aspect 3/4 to 4/3, as parts of the side, (B,)."""
    area = smallest + (1 - smallest) * draw.uniform("crop area")
    aspect = torch.exp(math.log(4 / 3) * draw.signed("crop aspect"))
    return (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)


def _reflected(index: Tensor, size: int) -> Tensor:
    """Indices beyond either edge, mirrored back inside; the edge itself is not repeated."""
    period = max(2 * (size - 1), 1)
    index = index.remainder(period)
    return torch.minimum(index, period - index).clamp(max=size - 1)


def _inside(index: Tensor, size: int) -> Tensor:
    return (index >= 0) & (index < size)
