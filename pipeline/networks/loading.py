"""A network from whatever a person has: a folder of ours, timm's or transformers', or a file of weights."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torchvision
from PIL import Image
from timm.data import resolve_data_config

from pipeline.data.decode import Framing
from pipeline.errors import CheckpointError
from pipeline.networks.architectures import TORCHVISION, TRANSFORMERS, WEIGHTS, pretrained_state
from pipeline.networks.folders import (
    CONFIG,
    REQUIRED,
    Description,
    built,
    described,
    load_folder,
    read_config,
    stated_names,
)
from pipeline.networks.network import Network, unknown_model
from pipeline.networks.weights import SUFFIXES, Saved, fitted, read_weights

PREPROCESSOR = "preprocessor_config.json"
WEIGHTS_FILES = (WEIGHTS, "pytorch_model.bin")  # of a folder, the first that is there


def load_network(place: Path, architecture: str | None = None, otherwise: Mapping[str, Any] | None = None) -> Network:
    """A network from a folder or a file.

    Args:
        place: a folder in timm's layout, with weights in either format; a folder of a transformers image classifier; or
            a file of weights: .safetensors, or a checkpoint (.pth, .pt, .pth.tar, .ckpt) with the weights at its top or
            under `state_dict`, `model` and the like, averaged ones first, and prefixes such as `module.`.
        architecture: timm's name, or torchvision_NAME, for files that do not say it.
        otherwise: `input_size`, `mean`, `std` and the like, of a file of weights that does not say them, for an
            architecture of which timm does not say them either.

    Returns:
        The network. Its classes are named where the files name them; what a file of weights leaves open of the
        preprocessing is as timm or torchvision has it for that architecture.

    Raises:
        CheckpointError: something is missing, cut short, edited, or does not fit.
    """
    if place.is_file():
        return _load_file(place, architecture, otherwise)
    if is_own_layout(place):
        return load_folder(place)
    if not place.is_dir():
        raise CheckpointError(
            f"{place} is missing: expected a folder with {CONFIG} and {WEIGHTS}, or a file of weights"
        )
    if not (place / CONFIG).is_file():
        files = sorted(path.name for path in place.iterdir() if path.name.endswith(SUFFIXES))
        hint = f"; name the file: {place / files[0]}" if files else ""
        raise CheckpointError(f"{place / CONFIG} is missing: expected timm's layout or transformers'{hint}")
    return _load_folder(place)


def is_own_layout(place: Path) -> bool:
    """Whether it is a folder that `load_folder` reads: with timm's config, and safetensors."""
    if not (place / CONFIG).is_file():
        return False
    config = read_config(place / CONFIG)  # with a model_type it is timm's under transformers' roof: other prefixes
    return (place / WEIGHTS).is_file() and "architecture" in config and "model_type" not in config


# --- folders ---------------------------------------------------------------------------------------------


def _load_folder(folder: Path) -> Network:
    """timm's layout with weights in torch's format, or a transformers image classifier."""
    config, where = read_config(folder / CONFIG), str(folder / CONFIG)
    if "architecture" not in config and ("architectures" in config or "model_type" in config):
        return _of_transformers(config, folder)
    weights = next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), None)
    if weights is None:
        split = next(folder.glob("*.index.json"), None)
        raise CheckpointError(
            f"{folder / WEIGHTS} is missing"
            + (
                f": the weights are in several files ({split.name}), which is not read; save them in one"
                if split
                else ""
            )
        )
    description = described(config, where)
    model = built(description, where)
    model.load_state_dict(fitted(read_weights(weights), model, weights))
    return description.network(model)


def _of_transformers(config: dict[str, Any], folder: Path) -> Network:
    """A transformers image classifier."""
    where = str(folder / CONFIG)
    if not any(str(name).endswith("ForImageClassification") for name in config.get("architectures") or ()):
        raise CheckpointError(f"{where}: {config.get('architectures')} is no image classifier")
    classes = len(config.get("id2label") or ()) or int(config.get("num_labels", 2))
    if not (folder / PREPROCESSOR).is_file():
        raise CheckpointError(f"{folder / PREPROCESSOR} is missing: it says at what size and scale images are shown")
    try:
        size, framing, mean, std = _shown(read_config(folder / PREPROCESSOR))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / PREPROCESSOR} cannot be followed: {error}") from error
    arguments = {"description": config, "num_classes": classes}
    description = Description(TRANSFORMERS, arguments, stated_names(config, where), size, mean, std, framing)
    try:
        state = pretrained_state(folder)
    except ImportError as error:
        raise CheckpointError(
            f"{folder} is a network of transformers, which is missing: pip install 'reduced-mpl[transformers]'"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} cannot be loaded by transformers: {str(error).splitlines()[0]}") from error
    model = built(description, where)
    model.load_state_dict(state)
    return description.network(model)


def _shown(processor: Mapping[str, Any]) -> tuple[int, Framing, tuple[float, float, float], tuple[float, float, float]]:
    """Size, framing, mean and std of an image processor of transformers.

    Raises:
        KeyError, TypeError, ValueError: it does what a framing cannot.
    """
    if processor.get("do_pad") or processor.get("rescale_offset"):
        raise ValueError("it pads, or shifts the values of pixels")
    stated = processor.get("size")
    size = {"shortest_edge": stated} if isinstance(stated, int) and processor.get("do_center_crop") else stated
    size = {"height": stated, "width": stated} if isinstance(size, int) else dict(size or {})
    method = Image.Resampling(processor.get("resample", Image.Resampling.BILINEAR)).name.lower()
    cut = processor.get("crop_size", size) if processor.get("do_center_crop") else None
    if isinstance(cut, int):
        cut = {"height": cut, "width": cut}
    if not processor.get("do_resize", True):
        raise ValueError("it does not resize, so that the size is not known")
    if "shortest_edge" in size and "crop_pct" in processor:  # ConvNeXt's: cut below 384 pixels
        side = int(size["shortest_edge"])
        framing = Framing(float(processor["crop_pct"]), method) if side < 384 else Framing(1.0, method, "squash")
    else:
        shorter = int(size["shortest_edge"] if "shortest_edge" in size else size["height"])
        squash = "shortest_edge" not in size
        if squash and size["width"] != size["height"]:
            raise ValueError(f"size {size} is not square")
        if cut is not None and "height" in cut and cut["height"] != cut["width"]:
            raise ValueError(f"crop_size {cut} is not square")
        if cut is None and not squash:
            raise ValueError("it cuts no square out")
        side = int(cut["height"]) if cut is not None and "height" in cut else shorter
        framing = Framing(side / shorter, method, "squash" if squash else "center")
    scale = 255 * (float(processor.get("rescale_factor", 1 / 255)) if processor.get("do_rescale", True) else 1.0)
    normal = processor.get("do_normalize", True)
    means, stds = (processor["image_mean"], processor["image_std"]) if normal else ([0.0] * 3, [1.0] * 3)
    mean = tuple(float(value) / scale for value in means)
    std = tuple(float(value) / scale for value in stds)
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"image_mean {means} is not of three channels")
    return side, framing, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


# --- files -----------------------------------------------------------------------------------------------


def _load_file(path: Path, architecture: str | None, otherwise: Mapping[str, Any] | None) -> Network:
    """A file of weights, of an architecture that it states or that is given."""
    saved = read_weights(path)
    name = architecture or _known(saved.architecture)
    if name is None:
        raise CheckpointError(
            f"{path} does not say which network its weights are of: --architecture NAME, as timm calls it "
            f"(torchvision's are {TORCHVISION}…)"
        )
    if not timm.is_model(name):
        raise CheckpointError(unknown_model(name))
    classes = _classes(name, saved, path)
    names = saved.class_names
    if names is not None and len(names) != classes:
        raise CheckpointError(f"{path}: {len(names)} class names for {classes} classes")
    size, framing, mean, std = _defaults(name, saved, path, otherwise)
    description = Description(name, {"num_classes": classes}, names, size, mean, std, framing)
    description = replace(description, arguments=description.arguments | _sized(name, size))
    model = built(description, str(path))
    model.load_state_dict(fitted(saved, model, path))
    return description.network(model)


def _known(name: str | None) -> str | None:
    return name if name is not None and timm.is_model(name) else None


def _sized(name: str, size: int) -> dict[str, Any]:
    """Arguments by which a network of fixed input size is built for another."""
    entry = timm.get_pretrained_cfg(name)
    fixed = entry is not None and entry.fixed_input_size
    return {"img_size": size} if fixed and entry.input_size[-1] != size else {}


def _classes(name: str, saved: Saved, path: Path) -> int:
    """How many classes the weights are for: from what differs between networks of 2 and of 3.

    Raises:
        CheckpointError: the weights have no such tensor.
    """
    two, three = (built(_of_classes(name, n), name).state_dict() for n in (2, 3))
    for key, tensor in two.items():
        axes = [axis for axis, (a, b) in enumerate(zip(tensor.shape, three[key].shape, strict=True)) if a != b]
        if axes:
            sizes = {
                value.shape[axes[0]]
                for own, value in saved.tensors.items()
                if (own == key or own.endswith(f".{key}")) and value.ndim == tensor.ndim
            }
            if len(sizes) == 1:
                return int(sizes.pop())
    raise CheckpointError(
        f"{path} holds no classifier of {name}: either the weights are of another network (--architecture NAME), or of "
        "one without its last layer"
    )


def _of_classes(name: str, classes: int) -> Description:
    zero, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return Description(name, {"num_classes": classes}, None, 1, zero, one, Framing())


def _defaults(
    name: str, saved: Saved, path: Path, otherwise: Mapping[str, Any] | None
) -> tuple[int, Framing, tuple[float, float, float], tuple[float, float, float]]:
    """Preprocessing as the training script says, else as timm or torchvision has it for the architecture."""
    if name.startswith(TORCHVISION):
        shown = torchvision.models.get_model_weights(name.removeprefix(TORCHVISION)).DEFAULT.transforms()
        side = int(shown.crop_size[0])
        config: dict[str, Any] = {
            "input_size": (3, side, side),
            "crop_pct": side / int(shown.resize_size[0]),
            "interpolation": shown.interpolation.value,
            "mean": shown.mean,
            "std": shown.std,
        }
    else:
        entry = timm.get_pretrained_cfg(name)
        config = entry.to_dict() if entry is not None else dict(otherwise or {})
    keys = ("input_size", "img_size", "mean", "std", "crop_pct", "interpolation")
    stated = {key: saved.argument(key) for key in keys}
    if lacks := [key for key in REQUIRED if not (stated[key] or config.get(key))]:
        raise CheckpointError(
            f"{path} does not say how images are shown to it ({', '.join(lacks)}), nor does timm for {name}; put it "
            f"into a folder as {WEIGHTS} beside a {CONFIG} that does (docs/formats.md)"
        )
    given = described(
        {"architecture": name, "num_classes": 2, "pretrained_cfg": resolve_data_config(stated, config)}, str(path)
    )
    return given.image_size, given.framing, given.mean, given.std
