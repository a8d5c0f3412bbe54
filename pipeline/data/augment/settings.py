"""Settings of the augmentation; free of torch, so that a recipe is read without it."""

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Operation = Literal[
    "identity",
    "autocontrast",
    "equalize",
    "invert",
    "posterize",
    "solarize",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)


class AugmentSettings(BaseModel):
    """What is done at random to the images of a batch; the defaults leave them as they are.

    Applied in this order: flip and padded crop; random resized crop, rotation and translation (one
    interpolation); RandAugment; cutout.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    flip: bool = False
    """Mirror every other image, left to right, at random."""
    crop_padding: Annotated[int, Field(ge=0, le=64)] = 0
    """Shift by up to so many whole pixels in either direction: pad, then crop at random."""
    random_resized_crop: Annotated[float, Field(gt=0, le=1)] | None = None
    """Smallest part of the image's area that a random crop shows (0.08 for ImageNet); null is off."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Turn by a uniform angle of at most so many degrees either way."""
    translate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Shift by a uniform part of the side, at most this, in both directions."""
    border: Literal["reflect", "zero"] = "reflect"
    """What the four shifts and turns above find outside the image. (RandAugment and cutout find grey.)"""
    randaugment_layers: Annotated[int, Field(ge=0, le=16)] = 0
    """Operations per image and step, one after another; 0 is off. The papers use 2."""
    randaugment_magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    """Strength of each operation, from 0 (none) to 10."""
    randaugment_probability: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Chance of each layer to act on an image."""
    randaugment_operations: Annotated[tuple[Operation, ...], Field(min_length=1)] = OPERATIONS
    """The operations drawn from: the RandAugment paper's fourteen, and NoisyStudent's `invert`."""
    cutout: Annotated[int, Field(ge=0)] = 0
    """Side, in pixels, of a grey square put at a random place; it may hang over the edge."""
