"""Networks that a person brings: any that `pipeline.networks.loading` reads, as a folder in timm's layout."""

import tempfile
from pathlib import Path
from typing import Any

import click

from pipeline.networks.folders import CONFIG, read_description, save_network
from pipeline.networks.loading import is_own_layout, load_network
from pipeline.networks.packaged import is_packaged, load_packaged
from pipeline.storage.files import fingerprint, sha256_file
from pipeline.storage.runs import NETWORKS_FOLDER
from stages.options import Context

architecture_option = click.option(
    "--architecture",
    metavar="NAME",
    help="Of a file of weights that does not say it: timm's name, or torchvision_NAME.",
)


def shown_by(context: Context) -> dict[str, Any]:
    """How the recipe shows images to networks, for files that do not say how theirs is to be shown them."""
    data = context.recipe.data
    return {"input_size": [3, data.image_size, data.image_size], "mean": data.mean, "std": data.std, "crop_pct": 1.0}


def _packaged(context: Context, name: str) -> Path:
    """The folder of a network that a package brings; made once."""
    folder = _parent(context) / name
    if not (folder / CONFIG).is_file():
        network = load_packaged(name)
        save_network(folder, network, network.model.state_dict())
    return folder.resolve()


def _parent(context: Context) -> Path:
    """Where folders of networks lie that were made of files; a dry run has a place for itself."""
    if context.dry_run:
        return Path(click.get_current_context().with_resource(tempfile.TemporaryDirectory()))
    return context.run / NETWORKS_FOLDER


def network_folder(context: Context, place: Path, architecture: str | None = None) -> Path:
    """A folder in timm's layout that holds this network: the place itself, or one in the run that is made of it.

    What is made of the same file again is left as it is, so that its config.json can be corrected. A dry run makes it
    for itself alone.

    Raises:
        CheckpointError: the place holds no network.
    """
    if not place.exists() and is_packaged(str(place)):
        return _packaged(context, str(place))
    if is_own_layout(place):
        return place.resolve()
    context.run.description  # noqa: B018  (refuses a foreign directory before anything is written there)
    network = load_network(place, architecture, shown_by(context))
    files = [place] if place.is_file() else sorted(path for path in place.iterdir() if path.is_file())
    mark = fingerprint([network.architecture, *(sha256_file(path) for path in files)])[:8]
    name = f"{place.name.partition('.')[0]}-{mark}"
    folder = _parent(context) / name
    if not (folder / CONFIG).is_file():
        save_network(folder, network, network.model.state_dict())
    shown = read_description(folder)
    named = "its classes are named" if network.states_classes else "its classes are not named"
    context.console.note(
        f"{place}: {shown.architecture}, {len(network.class_names):,} classes ({named}), shown images of "
        f"{shown.image_size} pixels (crop_pct {shown.framing.crop_pct:.3g}, {shown.framing.interpolation}, "
        f"mean {', '.join(f'{v:.3g}' for v in shown.mean)}, std {', '.join(f'{v:.3g}' for v in shown.std)}). "
        f"If it was trained on others, correct {folder / CONFIG} and use {folder}"
    )
    return folder.resolve()
