"""Networks: counts, stems, files."""

import json
from pathlib import Path

import pytest
import timm
import torch

from pipeline.config import ModelSettings
from pipeline.errors import CheckpointError, DataError, RecipeError
from pipeline.networks.classes import with_classes_of
from pipeline.networks.folders import save_network
from pipeline.networks.loading import load_network
from pipeline.networks.network import Network, build_network, require_classifier

NAMES = [f"class {i}" for i in range(10)]
HALF = (0.5, 0.5, 0.5)


def make(name: str, size: int = 32, **settings) -> Network:
    torch.manual_seed(0)
    return build_network(ModelSettings(name=name, **settings), NAMES, size, HALF, HALF)


def test_wrn_28_2_has_1_47_million_parameters() -> None:
    assert sum(p.numel() for p in make("wrn_28_2").model.parameters()) == 1_467_610


@pytest.mark.parametrize("size", [8, 32, 64])
def test_wrn_sizes(size: int) -> None:
    assert make("wrn_10_1", size).model(torch.randn(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize(
    "name",
    ["wrn_16_2", "resnet10t", "resnet18", "test_efficientnet", "efficientnet_b0", "vit_tiny_patch16_224"],
)
def test_saved_networks_load_here_and_by_timm(name: str, tmp_path) -> None:
    network = make(name, dropout=0.1, drop_path=0.1)
    digest = save_network(tmp_path, network, network.model.state_dict())
    loaded = load_network(tmp_path)
    by_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    images = torch.randn(2, 3, 32, 32)
    expected = network.model.eval()(images)
    assert torch.equal(loaded.model.eval()(images), expected)
    assert torch.equal(by_timm.eval()(images), expected)
    assert (loaded.class_names, loaded.image_size, loaded.mean) == (NAMES, 32, HALF)
    assert json.loads((tmp_path / "config.json").read_text())["weights_sha256"] == digest


@pytest.mark.parametrize(("name", "pixels"), [("resnet18", 4), ("efficientnet_b0", 2)])
def test_small_images_get_a_small_stem(name: str, pixels: int) -> None:
    """At 32 pixels a standard stem would leave the last layers one pixel."""
    images = torch.randn(1, 3, 32, 32)
    assert make(name).model.eval().forward_features(images).shape[-1] == pixels
    assert make(name, stem="standard").model.eval().forward_features(images).shape[-1] == 1
    assert "small_stem" not in make(name, size=224).architecture


def test_small_images_get_small_patches() -> None:
    assert make("vit_tiny_patch16_224").arguments["patch_size"] == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "resnet81"}, "did you mean"),
        ({"name": "convnext_tiny", "stem": "small"}, "no small stem is known"),
        ({"name": "resnet18", "options": {"colour": 1}}, "cannot build model"),
    ],
)
def test_unknown_networks_are_refused(settings, words) -> None:
    with pytest.raises(RecipeError, match=words):
        make(**settings)


@pytest.mark.parametrize("damage", ["cut", "edited", "missing"])
def test_damaged_weights_are_noticed(damage: str, tmp_path) -> None:
    network = make("wrn_10_1")
    save_network(tmp_path, network, network.model.state_dict())
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:1000] if damage == "cut" else data[:-5] + b"x" + data[-4:])
    with pytest.raises(CheckpointError, match="missing" if damage == "missing" else "cut short or edited"):
        load_network(tmp_path)


def test_a_config_that_does_not_fit_is_refused(tmp_path) -> None:
    network = make("wrn_10_1")
    save_network(tmp_path, network, network.model.state_dict())
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in (
        ({"architecture": "wrn_16_1"}, "does not hold the weights"),
        ({"architecture": "nothing"}, "cannot build"),
        ({"label_names": ["a"]}, "1 class names for 10 classes"),
        ({"pretrained_cfg": {}}, "lacks or misstates"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=words):
            load_network(tmp_path)


# --- classes by name --------------------------------------------------------------------------------------


def network_of(folder: Path, **config: object) -> Path:
    """A network of three classes on disk, with this in its config.json instead of `label_names`."""
    torch.manual_seed(0)
    network = build_network(ModelSettings(name="wrn_10_1"), ["a", "b", "c"], 8, (0.5,) * 3, (0.5,) * 3)
    save_network(folder, network, network.model.state_dict())
    saved = json.loads((folder / "config.json").read_text())
    del saved["label_names"]
    saved["pretrained_cfg"].update(config.pop("pretrained_cfg", {}))
    (folder / "config.json").write_text(json.dumps(saved | config))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {"label_names": ["red", "green", "blue"]},
        {"pretrained_cfg": {"label_names": ["red", "green", "blue"]}},
        {"id2label": {"0": "red", "1": "green", "2": "blue"}},
        {"pretrained_cfg": {"label_names": {"2": "blue", "1": "green", "0": "red"}}},
        {"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, "label_names": ["red", "green", "blue"]},
    ],
)
def test_outputs_are_put_in_the_data_sets_order_by_name(tmp_path: Path, config: dict) -> None:
    network = load_network(network_of(tmp_path, **config))
    assert (network.class_names, network.states_classes) == (["red", "green", "blue"], True)
    images = torch.randn(4, 3, 8, 8)
    network.model.eval()
    ours = with_classes_of(network, ("blue", "green", "red"), "it")
    assert ours.class_names == ["blue", "green", "red"]
    assert torch.equal(ours.model(images), network.model(images)[:, [2, 1, 0]])
    assert with_classes_of(network, ("red", "green", "blue "), "it").model is network.model
    with pytest.raises(
        DataError, match=r"it has other classes than the data set: 3 against 3; it lacks grey; .* lacks blue"
    ):
        with_classes_of(network, ("red", "green", "grey"), "it")
    with pytest.raises(DataError, match="3 against 2"):
        with_classes_of(network, ("red", "green"), "it")


@pytest.mark.parametrize("config", [{}, {"id2label": {str(i): f"LABEL_{i}" for i in range(3)}}])
def test_a_network_that_names_no_classes_is_asked_about(tmp_path: Path, config: dict) -> None:
    network = load_network(network_of(tmp_path, **config))
    assert not network.states_classes
    with pytest.raises(DataError, match=r"does not say which classes its 3 outputs are.*--assume-class-order"):
        with_classes_of(network, ("x", "y", "z"), "it")
    assert with_classes_of(network, ("x", "y", "z"), "it", assume_order=True).class_names == ["x", "y", "z"]
    with pytest.raises(DataError, match="it has 3 classes, the data set 4"):
        with_classes_of(network, tuple("wxyz"), "it", assume_order=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"label_names": ["a", "a", "b"]}, "two classes have one name"),
        ({"label_names": ["a", "b", "c"], "id2label": {"0": "b", "1": "a", "2": "c"}}, "states its classes twice"),
        ({"label_names": ["a", "b"]}, "2 class names for 3 classes"),
    ],
)
def test_classes_that_cannot_be_right(tmp_path: Path, config: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_network(network_of(tmp_path, **config))


@pytest.mark.parametrize(
    ("name", "options", "size", "words"),
    [
        ("resnet18", {"features_only": True}, 32, "is no classifier: it gives list"),
        ("resnet18", {"in_chans": 1}, 32, "cannot take images of 3 × 32 × 32"),
        ("vgg11", {}, 16, "cannot take images of 3 × 16 × 16"),
        ("resnet18.a1_in1k", {}, 32, "names published weights, and the network would begin with random ones"),
    ],
)
def test_what_is_no_classifier_is_refused_before_training(name: str, options: dict, size: int, words: str) -> None:
    settings = ModelSettings(name=name, options=options)
    with pytest.raises(RecipeError, match=words):
        require_classifier(build_network(settings, ["a", "b"], size, (0.5,) * 3, (0.5,) * 3), name)


def test_a_network_that_shares_a_tensor_is_saved_and_loads(tmp_path: Path) -> None:
    network = build_network(ModelSettings(name="wrn_10_1"), ["a", "b"], 8, (0.5,) * 3, (0.5,) * 3)
    require_classifier(network, "wrn_10_1")
    network.model.bn.bias = network.model.bn.weight
    save_network(tmp_path, network, network.model.state_dict())
    loaded = load_network(tmp_path).model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in network.model.state_dict().items())
