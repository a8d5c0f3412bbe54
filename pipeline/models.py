"""Networks: any timm model by name, stems for small images, wide residual networks, and files of weights.

Importing this module registers, in timm's own registry, `wrn_<depth>_<width>` and, for the families that
need it, `<name>_small_stem`, so that a network saved here loads again by timm from its folder.
"""

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import DropPath
from timm.models import register_model
from torch import Tensor, nn

from pipeline.classes import canonical
from pipeline.config import ModelSettings
from pipeline.errors import CheckpointError, RecipeError
from pipeline.storage.files import sha256_file, whole_file, write_json

SMALL_IMAGE = 64  # pixels; up to here `stem: auto` avoids early downsampling where the family allows it
WEIGHTS, CONFIG = "model.safetensors", "config.json"
PLACEHOLDER = re.compile(r"LABEL_\d+")  # what transformers writes where nobody named the classes


# --- wide residual networks ----------------------------------------------------------------------------


class PreActivationBlock(nn.Module):
    """BN–LeakyReLU–conv twice, with an identity or 1×1 shortcut (Zagoruyko & Komodakis, arXiv:1605.07146)."""

    def __init__(self, channels_in: int, channels: int, stride: int, drop_path: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.act = nn.LeakyReLU(0.1)
        same = channels_in == channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(channels_in, channels, 1, stride, bias=False)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(x))
        residual = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(self.act(self.bn2(out)))
        return residual + self.drop_path(out)


class WideResNet(nn.Module):
    """Pre-activation WRN-depth-width for images of 8 to 64 pixels, with timm's constructor arguments.

    Args:
        depth: 6n + 4 layers, n blocks in each of three groups.
        width: factor on the 16, 32, 64 channels of the groups.
        drop_rate: dropout before the prediction layer (the paper's place for it).
        drop_path_rate: stochastic depth, growing linearly with depth.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"`depth` (={depth}) must be 6n + 4: 10, 16, 22, 28, …")
        blocks = (depth - 4) // 6
        self.num_classes, self.num_features, self.drop_rate = num_classes, 64 * width, drop_rate
        self.conv = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        rates = torch.linspace(0, drop_path_rate, 3 * blocks, device="cpu").tolist()
        layers: list[nn.Module] = []
        channels_in = 16
        for group in range(3):
            for block in range(blocks):
                stride = 2 if group and not block else 1
                channels = (16, 32, 64)[group] * width
                layers.append(PreActivationBlock(channels_in, channels, stride, rates[len(layers)]))
                channels_in = channels
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(channels_in)
        self.act = nn.LeakyReLU(0.1)
        self.fc = nn.Linear(channels_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu", a=0.1)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.blocks(self.conv(x))))  # (B, 64·width, H/4, W/4)
        x = x.mean(dim=(2, 3))
        return self.fc(nn.functional.dropout(x, self.drop_rate, self.training))  # (B, C)


# --- stems for small images -----------------------------------------------------------------------------

SMALL_STEM_FAMILIES = (
    "resnet*", "resnext*", "wide_resnet*", "seresnet*", "efficientnet_*", "tf_efficientnet*", "mobilenetv*",
)  # fmt: skip


def shrink_stem(model: nn.Module) -> nn.Module:
    """Remove the early downsampling that 32-pixel images cannot afford, in place.

    ResNets: a 3×3 convolution of stride 1 and no max pooling, as in the CIFAR variants of He et al.
    (arXiv:1512.03385). EfficientNets and MobileNets: stride 1 in the first convolution.

    Raises:
        RecipeError: the family has neither `conv1` and `maxpool` nor `conv_stem`.
    """
    if hasattr(model, "maxpool") and isinstance(conv1 := getattr(model, "conv1", None), nn.Module):
        first = next(m for m in conv1.modules() if isinstance(m, nn.Conv2d))  # deep stems are sequential
        if first is conv1:
            model.conv1 = nn.Conv2d(first.in_channels, first.out_channels, 3, 1, 1, bias=False)
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        else:
            first.stride = (1, 1)
        model.maxpool = nn.Identity()
    elif isinstance(stem := getattr(model, "conv_stem", None), nn.Conv2d):
        stem.stride = (1, 1)
    else:
        raise RecipeError(
            f"no small stem is known for {type(model).__name__}; use stem: standard, a network of the families "
            f"{', '.join(SMALL_STEM_FAMILIES)}, a wrn_28_2, or a ViT (which gets small patches)"
        )
    return model


def _entrypoint(name: str, build: Callable[..., nn.Module]) -> None:
    """Register `build(**kwargs)` with timm under `name`, loadable from a local folder."""

    def create(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
        for unused in ("pretrained_cfg_overlay", "cache_dir", "pretrained_model_args"):
            kwargs.pop(unused, None)
        source = pretrained_cfg.to_dict() if hasattr(pretrained_cfg, "to_dict") else dict(pretrained_cfg or {})
        model = build(**kwargs)
        if pretrained:
            if "file" not in source:
                raise ValueError(f"there are no published weights for {name}")
            model.load_state_dict(load_file(Path(source["file"]) / WEIGHTS))
        return model

    create.__name__ = name
    create.__module__ = __name__
    register_model(create)


def _register() -> None:
    for depth in (10, 16, 22, 28, 40):
        for width in (1, 2, 4, 8, 10):
            _entrypoint(f"wrn_{depth}_{width}", partial(WideResNet, depth, width))
    for name in timm.list_models(list(SMALL_STEM_FAMILIES)):
        _entrypoint(f"{name}_small_stem", lambda name=name, **kwargs: shrink_stem(timm.create_model(name, **kwargs)))


_register()
__all__ = [  # register_model appends every architecture to it
    "Network",
    "WideResNet",
    "build_network",
    "load_network",
    "require_classifier",
    "resolve",
    "save_network",
    "set_batch_norm_momentum",
    "shrink_stem",
    "stated_names",
]


# --- making, saving and loading -------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A classifier with all that is needed to use it on images.

    Attributes:
        model: images (B, 3, S, S), normalised → logits (B, C).
        architecture, arguments: timm's name and arguments that build it.
        class_names: C names, in the order of the logits.
        image_size: S, pixels.
        mean, std: of the normalisation, per channel, for images in [0, 1].
        states_classes: whether the names are its own; else they are numbers.
    """

    model: nn.Module
    architecture: str
    arguments: dict[str, Any]
    class_names: list[str]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    states_classes: bool = True


def build_network(
    settings: ModelSettings,
    class_names: Sequence[str],
    image_size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Network:
    """A fresh network, initialised from torch's default generator.

    Raises:
        RecipeError: timm knows no such name, or the family rejects an argument.
    """
    name, arguments = resolve(settings, image_size)
    arguments |= {"num_classes": len(class_names)}
    try:
        model = timm.create_model(name, **arguments)
    except (TypeError, RuntimeError, ValueError, AssertionError) as error:
        raise RecipeError(f"cannot build model {settings.name!r} with {arguments}: {error}") from error
    if settings.batch_norm_momentum is not None:
        set_batch_norm_momentum(model, settings.batch_norm_momentum)
    return Network(model, name, arguments, list(class_names), image_size, mean, std)


@torch.no_grad()
def require_classifier(network: Network, name: str) -> None:
    """Refuse, before any training, what gives no logits for images of its size.

    Raises:
        RecipeError: says what it gives instead.
    """
    size, classes = network.image_size, len(network.class_names)
    training = network.model.training
    try:
        logits = network.model.eval()(torch.zeros(2, 3, size, size))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise RecipeError(
            f"model {name!r} cannot take images of 3 × {size} × {size}: {str(error).splitlines()[0]}. Choose another "
            "--set data.image_size=, or a network made for such images (with three channels)"
        ) from error
    finally:
        network.model.train(training)
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise RecipeError(f"model {name!r} is no classifier: it gives {found} instead of logits (2, {classes})")


def to_device(network: Network, device: torch.device) -> Network:
    """Move the weights, channels last: on CPUs convolutions are several times faster so."""
    network.model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def set_batch_norm_momentum(model: nn.Module, momentum: float) -> None:
    """Weight of the new batch in the running statistics (torch's sense; TensorFlow's decay is 1 − this)."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum


def resolve(settings: ModelSettings, image_size: int) -> tuple[str, dict[str, Any]]:
    """timm's name and arguments, with the stem or the patches that `image_size` needs."""
    name = settings.name
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise RecipeError(f"timm knows no model {name!r}" + (f"; did you mean {' or '.join(close)}?" if close else ""))
    arguments: dict[str, Any] = dict(settings.options)
    if "." in name and not arguments.get("pretrained"):
        raise RecipeError(
            f"{name!r} names published weights, and the network would begin with random ones under that name: leave "
            f"the tag away ({name.partition('.')[0]}), or ask for the weights by options: {{pretrained: true}}"
        )
    if settings.dropout:
        arguments["drop_rate"] = settings.dropout
    if settings.drop_path:
        arguments["drop_path_rate"] = settings.drop_path
    small = settings.stem == "small" or (settings.stem == "auto" and image_size <= SMALL_IMAGE)
    if name.startswith(("vit_", "deit_")):
        arguments.setdefault("img_size", image_size)
        if small:
            arguments.setdefault("patch_size", max(2, image_size // 8))
    elif small and timm.is_model(f"{name}_small_stem"):
        name = f"{name}_small_stem"
    elif settings.stem == "small" and not name.startswith("wrn_"):
        raise RecipeError(
            f"no small stem is known for {name!r}; use stem: standard, a network of the families "
            f"{', '.join(SMALL_STEM_FAMILIES)}, a wrn_28_2, or a ViT (which gets small patches)"
        )
    return name, arguments


def save_network(folder: Path, network: Network, state: dict[str, Tensor]) -> str:
    """Write `folder`/model.safetensors and config.json, in timm's layout; returns the weights' SHA-256."""
    tensors, seen = {}, set[int]()
    for name, tensor in state.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        tensors[name] = own.clone() if place in seen else own  # safetensors keeps no memory that two names share
        seen.add(place)
    with whole_file(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    digest = sha256_file(folder / WEIGHTS)
    size = network.image_size
    write_json(
        folder / CONFIG,
        {
            "architecture": network.architecture,
            "num_classes": len(network.class_names),
            "label_names": network.class_names,
            "model_args": network.arguments,
            "pretrained_cfg": {
                "input_size": [3, size, size],
                "fixed_input_size": network.architecture.startswith(("vit_", "deit_")),
                "interpolation": "bicubic",
                "crop_pct": 1.0,
                "mean": list(network.mean),
                "std": list(network.std),
                "num_classes": len(network.class_names),
            },
            "weights_sha256": digest,
        },
    )
    return digest


def load_network(folder: Path) -> Network:
    """A network from a folder in timm's layout: one saved here, or a person's own.

    The class list is what `stated_names` finds; a config without one gets the names "0", "1", ….

    Raises:
        CheckpointError: a file is missing, cut short, edited after it was written, or does not fit.
    """
    config = _read_config(folder / CONFIG)
    try:
        cfg = config.get("pretrained_cfg", {})
        classes = int(config.get("num_classes", cfg.get("num_classes", 0)))
        stated = stated_names(config, str(folder / CONFIG))
        names = [str(c) for c in range(classes)] if stated is None else stated
        arguments = dict(config.get("model_args", {})) | {"num_classes": classes}
        size = int(cfg["input_size"][-1])
        mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
        architecture = config["architecture"]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{folder / CONFIG} lacks or misstates {error}; see docs/formats.md") from error
    if len(names) != classes:
        raise CheckpointError(f"{folder / CONFIG}: {len(names)} class names for {classes} classes")
    try:
        model = timm.create_model(architecture, **arguments)
    except Exception as error:
        raise CheckpointError(f"{folder / CONFIG}: cannot build {architecture!r}: {error}") from error
    _load_weights(model, folder, config.get("weights_sha256"))
    return Network(model, architecture, arguments, names, size, mean, std, states_classes=stated is not None)


def stated_names(config: Mapping[str, Any], where: str) -> list[str] | None:
    """The class names in a network's config, in the order of its outputs; None if it has none.

    timm's `save_for_hf` writes `label_names` into `pretrained_cfg`, older versions beside it; transformers writes
    `id2label`, and `LABEL_0` … for names that nobody gave.

    Raises:
        CheckpointError: two places state different names, or two classes have one name.
    """
    found = []
    for section in (config, config.get("pretrained_cfg") or {}):
        for key in ("label_names", "id2label"):
            if stated := section.get(key):
                by_number = isinstance(stated, Mapping)
                names = [stated[key] for key in sorted(stated, key=int)] if by_number else stated
                found.append([str(name) for name in names])
    found = [names for names in found if not all(PLACEHOLDER.fullmatch(name) for name in names)]
    if any(names != found[0] for names in found):
        raise CheckpointError(f"{where} states its classes twice, and differently: {found[0][:5]}… and {found[1][:5]}…")
    if found and len({*map(canonical, found[0])}) < len(found[0]):
        raise CheckpointError(f"{where}: two classes have one name; name each of them")
    return found[0] if found else None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: expected a folder with {CONFIG} and {WEIGHTS} (timm's layout)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return config


def _load_weights(model: nn.Module, folder: Path, expected_sha256: str | None) -> None:
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if expected_sha256 is not None and sha256_file(path) != expected_sha256:
        raise CheckpointError(
            f"{path} is not the file that {CONFIG} describes: it was cut short or edited. Run the stage that "
            "made it again with --force, or restore the file"
        )
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} does not hold the weights of this network: {error}") from error
