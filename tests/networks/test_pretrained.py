"""Networks that begin with published weights."""

from pathlib import Path
from urllib.error import URLError
from urllib.request import Request

import pytest
import timm
import torch
from safetensors.torch import save_file

from pipeline.config import ModelSettings
from pipeline.errors import CheckpointError
from pipeline.networks import pretrained
from pipeline.networks.packaged import load_packaged
from pipeline.networks.pretrained import pretrained_network, weights_digest

NAME = "mobilenetv3_small_050"


def test_a_file_gives_all_but_the_last_layer_and_its_normalisation(tmp_path: Path) -> None:
    torch.manual_seed(3)
    original = timm.create_model(NAME)
    save_file(original.state_dict(), tmp_path / "w.safetensors")
    settings = ModelSettings(name=NAME, pretrained=True, weights=str(tmp_path / "w.safetensors"))
    network = pretrained_network(settings, ["a", "b"], 32)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(
        network.model.eval().forward_features(images), original.eval().forward_features(images)
    )  # the stem is the weights', though images are small
    assert network.model(images).shape == (2, 2)
    assert network.mean == timm.get_pretrained_cfg(NAME).mean
    assert weights_digest(settings) != weights_digest(settings.model_copy(update={"pretrained": False}))


def test_the_package_is_a_start() -> None:
    settings = ModelSettings(name="tf_efficientnet_lite0", pretrained=True, weights="packaged:efficientnet-lite0")
    network, own = pretrained_network(settings, ["a", "b", "c"], 64), load_packaged("efficientnet-lite0")
    assert torch.equal(network.model.conv_stem.weight, own.model.conv_stem.weight)
    assert network.mean == own.mean


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        weights_digest(ModelSettings(name=NAME, pretrained=True, weights=str(tmp_path / "none.pth")))


def test_defaults_change_no_record() -> None:
    assert not {"pretrained", "weights"} & ModelSettings(name=NAME).model_dump().keys()
    with pytest.raises(ValueError, match="pretrained: true"):
        ModelSettings(name=NAME, weights="x")


def test_without_a_network_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unreachable(request: Request, timeout: float) -> None:
        asked.append(request.full_url)
        raise URLError("no route")

    def absent(*, local_files_only: bool = False, **place: object) -> str:
        assert local_files_only, "the client that retries must not be reached"
        raise FileNotFoundError

    monkeypatch.setattr(pretrained, "urlopen", unreachable)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", absent)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match="HF_HOME"):
        weights_digest(ModelSettings(name=NAME, pretrained=True))
    assert len(asked) == 1
