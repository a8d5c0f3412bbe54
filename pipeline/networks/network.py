"""A classifier with what is needed to use it on images; fresh ones by timm's names."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pipeline.config import ModelSettings
from pipeline.data.decode import WHOLE, Framing
from pipeline.errors import RecipeError
from pipeline.networks.architectures import SMALL_STEM_FAMILIES

OF_TIMM_ITSELF = frozenset(inspect.signature(timm.create_model).parameters) - {"model_name", "kwargs", "pretrained"} | {
    "pretrained_strict", "pretrained_filter_fn", "kwargs_filter", "feature_cfg", "hf_hub_id", "url", "file",
}  # fmt: skip
SMALL_IMAGE = 64  # pixels; up to here `stem: auto` avoids early downsampling where the family allows it


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
        framing: how it is shown images of another shape than S × S.
    """

    model: nn.Module
    architecture: str
    arguments: dict[str, Any]
    class_names: list[str]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    states_classes: bool = True
    framing: Framing = WHOLE


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


def require_arguments(arguments: Mapping[str, Any], where: str) -> None:
    """Refuse what timm's `create_model` would take for itself: files to unpickle, addresses to fetch from.

    Raises:
        RecipeError: names it.
    """
    if refused := sorted(OF_TIMM_ITSELF & arguments.keys()):
        raise RecipeError(
            f"{where}: {refused[0]} is no argument of a network, but tells timm what to load; leave it out. A network "
            "of your own is a teacher by --teacher FILE"
        )


def unknown_model(name: str) -> str:
    """That there is no such network, and which names are like it."""
    close = difflib.get_close_matches(name, timm.list_models(), n=3)
    return f"timm knows no model {name!r}" + (f"; did you mean {' or '.join(close)}?" if close else "")


def resolve(settings: ModelSettings, image_size: int) -> tuple[str, dict[str, Any]]:
    """timm's name and arguments, with the stem or the patches that `image_size` needs."""
    name = settings.name
    if not timm.is_model(name):
        raise RecipeError(unknown_model(name))
    arguments: dict[str, Any] = dict(settings.options)
    require_arguments(arguments, f"options of model {name!r}")
    if "." in name and not (settings.pretrained or arguments.get("pretrained")):
        raise RecipeError(
            f"{name!r} names published weights, and the network would begin with random ones under that name: leave "
            f"the tag away ({name.partition('.')[0]}), or ask for the weights by pretrained: true"
        )
    if settings.dropout:
        arguments["drop_rate"] = settings.dropout
    if settings.drop_path:
        arguments["drop_path_rate"] = settings.drop_path
    small = settings.stem == "small" or (
        settings.stem == "auto" and image_size <= SMALL_IMAGE and not settings.pretrained
    )
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
