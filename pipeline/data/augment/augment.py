"""Augmentation of whole batches, on the device where the images are.

All random numbers of a batch are drawn on the CPU from seeds derived from the caller's, so that every
device sees the same images (interpolation may round a rare pixel to the next grey level), and a process
may augment its slice of a global batch alone.
"""

import torch
from torch import Tensor

from pipeline.config import AugmentSettings
from pipeline.data.augment.draws import Draws
from pipeline.data.augment.geometry import cutout, flip_and_crop, warp
from pipeline.data.augment.randaugment import randaugment

__all__ = ["AugmentSettings", "augment", "normalize"]


def augment(
    images: Tensor,
    settings: AugmentSettings,
    generator_seed: int,
    *,
    first: int = 0,
    total: int | None = None,
) -> Tensor:
    """Augment a batch at random.

    Args:
        images: uint8 (B, 3, S, S), on any device; left as they were.
        settings: what to do; the defaults do nothing.
        generator_seed: of this batch, such as `derive_seed(seed, "augment", step)`.
        first: the place of `images` in a global batch, of which this process has a slice …
        total: … and the length of that batch (default: `images` are all of it).

    Returns:
        float32 (B, 3, S, S) in [0, 1], on the device of `images`.
    """
    assert images.dtype == torch.uint8, images.dtype
    draw = Draws(generator_seed, first + len(images) if total is None else total, first, len(images))
    if settings.flip or settings.crop_padding:
        images = flip_and_crop(images, settings, draw)
    if settings.rotate or settings.translate or settings.random_resized_crop is not None:
        images = warp(images, settings, draw)
    if settings.randaugment_layers:
        images = randaugment(images, settings, draw)
    if settings.cutout:
        images = cutout(images, settings.cutout, draw)
    return images.float().div_(255)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(images − mean) / std per channel: float (B, 3, S, S) in, the same shape, channels-last, out."""
    shape = (1, -1, 1, 1)
    centre = torch.tensor(mean, dtype=images.dtype, device=images.device).view(shape)
    scale = torch.tensor(std, dtype=images.dtype, device=images.device).view(shape)
    return (images - centre).div_(scale).contiguous(memory_format=torch.channels_last)
