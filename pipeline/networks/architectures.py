"""Architectures that timm lacks: wide residual networks, stems for small images, torchvision's and transformers' own.

Importing this module registers them in timm's registry: `wrn_<depth>_<width>`, for the families that need it
`<name>_small_stem`, `torchvision_<name>`, and `transformers_image_classifier`; so that a network saved here loads again
by timm from its folder.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import load_file
from timm.layers import DropPath
from timm.models import register_model
from torch import Tensor, nn

from pipeline.errors import RecipeError

WEIGHTS = "model.safetensors"
TORCHVISION = "torchvision_"  # then the name of one of its classifiers
TRANSFORMERS = "transformers_image_classifier"


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


# --- other libraries' networks --------------------------------------------------------------------------


class ImageClassifier(nn.Module):
    """An image classifier of transformers, which gives its logits alone, (B, C).

    Args:
        description: its config.json, in which nothing names code to run.

    Raises:
        ImportError: transformers is not installed.
    """

    def __init__(self, description: dict[str, Any], num_classes: int) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModelForImageClassification

        own = {key: value for key, value in description.items() if key not in ("auto_map", "model_type", "id2label")}
        config = AutoConfig.for_model(description["model_type"], **own | {"num_labels": num_classes})
        self.model = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


def pretrained_state(folder: Path) -> dict[str, Tensor]:
    """Weights and buffers of an `ImageClassifier`, from a folder that transformers saved; no code in it is run.

    Raises:
        ImportError: transformers is not installed.
        ValueError: weights are missing or unknown; others as `from_pretrained` raises.
    """
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model, told = AutoModelForImageClassification.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, output_loading_info=True
    )
    if wrong := [*told["missing_keys"], *told["unexpected_keys"], *told["mismatched_keys"]]:
        raise ValueError(f"{len(wrong)} tensors are missing or do not fit (such as {wrong[0]})")
    return {f"model.{name}": value for name, value in model.state_dict().items()}


def _of_torchvision(name: str, num_classes: int = 1000, **arguments: Any) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **arguments)


def _register() -> None:
    for depth in (10, 16, 22, 28, 40):
        for width in (1, 2, 4, 8, 10):
            _entrypoint(f"wrn_{depth}_{width}", partial(WideResNet, depth, width))
    for name in timm.list_models(list(SMALL_STEM_FAMILIES)):
        _entrypoint(f"{name}_small_stem", lambda name=name, **kwargs: shrink_stem(timm.create_model(name, **kwargs)))
    for name in torchvision.models.list_models(module=torchvision.models):
        _entrypoint(f"{TORCHVISION}{name}", partial(_of_torchvision, name))
    _entrypoint(TRANSFORMERS, ImageClassifier)


_register()
__all__ = [  # register_model appends every architecture to it
    "TORCHVISION",
    "TRANSFORMERS",
    "WEIGHTS",
    "ImageClassifier",
    "WideResNet",
    "pretrained_state",
    "shrink_stem",
]
