"""Networks in files: a folder in timm's layout, of config.json and model.safetensors."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config
from torch import Tensor, nn

from pipeline.classes import canonical
from pipeline.data.decode import Framing
from pipeline.errors import CheckpointError
from pipeline.networks.architectures import WEIGHTS
from pipeline.networks.network import Network, require_arguments
from pipeline.storage.files import sha256_file, whole_file, write_json

CONFIG = "config.json"
REQUIRED = ("input_size", "mean", "std")  # of the preprocessing; the rest is as timm has it
PLACEHOLDER = re.compile(r"LABEL_\d+")  # what transformers writes where nobody named the classes


def save_network(folder: Path, network: Network, state: Mapping[str, Tensor]) -> str:
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
    size, framing = network.image_size, network.framing
    write_json(
        folder / CONFIG,
        {
            "architecture": network.architecture,
            "num_classes": len(network.class_names),
            **({"label_names": network.class_names} if network.states_classes else {}),
            "model_args": {key: value for key, value in network.arguments.items() if key != "pretrained"},
            "pretrained_cfg": {
                "input_size": [3, size, size],
                "fixed_input_size": network.architecture.startswith(("vit_", "deit_")),
                "interpolation": framing.interpolation,
                "crop_pct": framing.crop_pct,
                "crop_mode": framing.crop_mode,
                "mean": list(network.mean),
                "std": list(network.std),
                "num_classes": len(network.class_names),
            },
            "weights_sha256": digest,
        },
    )
    return digest


@dataclass(frozen=True)
class Description:
    """What a network's config.json says of it.

    Attributes:
        architecture, arguments: timm's name and arguments that build it, `num_classes` among them.
        class_names: as `stated_names` finds them, C of them; None if there are none.
        image_size, mean, std, framing: as of a `Network`.
        weights_sha256: of the weights' file, where it is recorded.
    """

    architecture: str
    arguments: dict[str, Any]
    class_names: list[str] | None
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    framing: Framing
    weights_sha256: str | None = None

    def preprocessing(self) -> dict[str, Any]:
        """How images are shown to it, as JSON."""
        return {
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "crop_pct": self.framing.crop_pct,
            "interpolation": self.framing.interpolation,
            "crop_mode": self.framing.crop_mode,
        }

    def network(self, model: nn.Module) -> Network:
        """With its model; without names of its own, its classes are called "0", "1", …."""
        names = self.class_names
        return Network(
            model,
            self.architecture,
            self.arguments,
            [str(c) for c in range(self.arguments["num_classes"])] if names is None else names,
            self.image_size,
            self.mean,
            self.std,
            states_classes=names is not None,
            framing=self.framing,
        )


def read_description(folder: Path) -> Description:
    """What `folder`/config.json says.

    Raises:
        CheckpointError: it is missing, no JSON, or lacks or misstates something.
    """
    return described(read_config(folder / CONFIG), str(folder / CONFIG))


def described(config: Mapping[str, Any], where: str) -> Description:
    """A config in timm's layout; what it leaves out of the preprocessing is as timm has it.

    Raises:
        CheckpointError: it lacks or misstates something; `where` names it.
    """
    try:
        cfg = config.get("pretrained_cfg", {})
        classes = int(config.get("num_classes", cfg.get("num_classes", 0)))
        names = stated_names(config, where)
        shown = resolve_data_config(pretrained_cfg={key: cfg[key] for key in REQUIRED} | dict(cfg))
        channels, height, width = shown["input_size"]
        description = Description(
            config["architecture"],
            dict(config.get("model_args") or {}) | {"num_classes": classes, "pretrained": False},
            names,
            int(height),
            _three(shown["mean"]),
            _three(shown["std"]),
            Framing(float(shown["crop_pct"]), shown["interpolation"], shown["crop_mode"]),
            config.get("weights_sha256"),
        )
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{where} lacks or misstates {error}; see docs/formats.md") from error
    if names is not None and len(names) != classes:
        raise CheckpointError(f"{where}: {len(names)} class names for {classes} classes")
    if channels != 3 or height != width:
        raise CheckpointError(
            f"{where}: it takes images of {channels} × {height} × {width}; only 3 × S × S is possible"
        )
    return description


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue


def load_folder(folder: Path) -> Network:
    """A network from a folder in timm's layout: one saved here, or a person's own.

    Raises:
        CheckpointError: a file is missing, cut short, edited after it was written, or does not fit.
    """
    description = read_description(folder)
    where = str(folder / CONFIG)
    model = built(description, where)
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    expected = description.weights_sha256
    if expected is not None and sha256_file(path) != expected:
        raise CheckpointError(
            f"{path} is not the file that {CONFIG} describes: it was cut short or edited. Run the stage that "
            "made it again with --force, or restore the file"
        )
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} does not hold the weights of this network: {error}") from error
    return description.network(model)


def built(description: Description, where: str) -> nn.Module:
    """The network that a description is of, with random weights.

    Raises:
        CheckpointError: timm cannot build it.
    """
    if not timm.is_model(description.architecture):  # not a place to load from, such as hf-hub:…
        raise CheckpointError(f"{where}: cannot build {description.architecture!r}: timm knows no such network")
    try:
        require_arguments(description.arguments, where)
        model: nn.Module = timm.create_model(description.architecture, **description.arguments)
    except Exception as error:
        raise CheckpointError(f"{where}: cannot build {description.architecture!r}: {error}") from error
    return model


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


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: it is none.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: expected a folder with {CONFIG} and {WEIGHTS} (timm's layout)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return config
