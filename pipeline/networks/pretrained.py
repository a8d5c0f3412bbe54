"""Networks that begin with published weights: from a file, a package, the Hub's cache, or the Hub."""

import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import timm
from torch import Tensor

from pipeline.config import ModelSettings
from pipeline.errors import CheckpointError, RecipeError
from pipeline.networks.loading import load_network
from pipeline.networks.network import Network, build_network
from pipeline.networks.packaged import is_packaged, load_packaged
from pipeline.storage.files import fingerprint, sha256_file

PACKAGE = "packaged:"  # then the name of a network that a package brings
PATIENCE = 3  # seconds for the Hub's first answer


def pretrained_network(settings: ModelSettings, class_names: Sequence[str], image_size: int) -> Network:
    """A network with published weights and a fresh last layer, for images normalised as the weights were trained on.

    Raises:
        RecipeError: the network cannot take images of this size.
        CheckpointError: the weights are not there, or another network's.
    """
    source = _source(settings)
    mean, std = source.mean, source.std
    network = build_network(settings, class_names, image_size, mean, std)
    entry = timm.get_pretrained_cfg(settings.name)
    sized = "img_size" in network.arguments
    if entry is not None and entry.fixed_input_size and not sized and entry.input_size[-1] != image_size:
        raise RecipeError(
            f"the weights of {settings.name} are for images of {entry.input_size[-1]} pixels, not {image_size}: "
            f"--set data.image_size={entry.input_size[-1]}"
        )
    _take(network, source, settings.name)
    return network


def weights_digest(settings: ModelSettings) -> str | None:
    """Digest of the weights that the network begins with; None where it begins with random ones.

    Raises:
        CheckpointError: the weights are not there.
    """
    if not settings.pretrained:
        return None
    if settings.weights is not None and settings.weights.startswith(PACKAGE):
        state = _source(settings).model.state_dict()
        return fingerprint([[name, value.numpy().tobytes().hex()] for name, value in state.items()])
    return sha256_file(_file(settings))


def _take(network: Network, source: Network, name: str) -> None:
    """Copy all but the last layer."""
    target = network.model.state_dict()
    own: dict[str, Tensor] = source.model.state_dict()
    classifier: Any = getattr(network.model, "get_classifier", lambda: None)()
    head = {
        f"{place}.{key}"
        for place, module in network.model.named_modules()
        if module is classifier
        for key in module.state_dict()
    }
    wrong = [key for key in target if key not in head and (key not in own or own[key].shape != target[key].shape)]
    if not head or wrong:
        what = f"{wrong[0]} does not fit" if wrong else "no last layer is known"
        raise CheckpointError(
            f"the weights of {name} cannot start this network: {what}; take the size that they were trained at "
            f"(--set data.image_size={source.image_size}), or another network"
        )
    network.model.load_state_dict({key: target[key] if key in head else own[key] for key in target})


def _source(settings: ModelSettings) -> Network:
    weights = settings.weights
    if weights is None or not weights.startswith(PACKAGE):
        return load_network(_file(settings), settings.name)
    name = weights.removeprefix(PACKAGE)
    if not is_packaged(name):
        raise RecipeError(f"weights: {weights} names no network of a package; packaged:efficientnet-lite0 is one")
    source = load_packaged(name)
    if settings.name != source.architecture:
        raise RecipeError(f"weights: {weights} are those of model {source.architecture}, not {settings.name}")
    return source


def _file(settings: ModelSettings) -> Path:
    """The file of weights: the recipe's, the Hub's cache's, or the Hub's; the cache is asked first."""
    if settings.weights is not None:
        if not (path := Path(settings.weights)).is_file():
            raise CheckpointError(f"weights: {path} is missing")
        return path
    entry = timm.get_pretrained_cfg(settings.name)
    if entry is None or not entry.hf_hub_id:
        raise RecipeError(f"timm names no weights on the Hub for {settings.name!r}; give a file: weights: PATH")
    from huggingface_hub import constants, hf_hub_download, hf_hub_url

    place = {"repo_id": entry.hf_hub_id, "filename": "model.safetensors"}
    try:
        return Path(hf_hub_download(**place, local_files_only=True))
    except Exception:  # not in the cache, whatever the library calls it
        pass
    try:
        if not constants.HF_HUB_OFFLINE:
            _require_answer(hf_hub_url(**place))
        return Path(hf_hub_download(**place, etag_timeout=PATIENCE))
    except Exception as error:  # of the network, in a dozen kinds
        raise CheckpointError(
            f"the weights of {settings.name} are neither in the Hub's cache nor to be had ({type(error).__name__}): "
            f"where there is a network, run: hf download {entry.hf_hub_id} model.safetensors, and bring the file here "
            "(weights: PATH) or the cache (HF_HOME)"
        ) from error


def _require_answer(address: str) -> None:
    """Ask once: the Hub's own client asks six times, for half a minute, where there is no network.

    Raises:
        OSError: nobody answers.
    """
    try:
        urlopen(Request(address, method="HEAD"), timeout=PATIENCE).close()
    except HTTPError:
        pass  # an answer; what it means is for the client to say
    except URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # certificates are the client's matter
            raise
