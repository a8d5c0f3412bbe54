"""Networks as people have them: checkpoints of every kind, timm's and transformers' folders, and what is refused."""

import argparse
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pipeline.config import ModelSettings
from pipeline.data.decode import WHOLE, Framing
from pipeline.errors import CheckpointError, RecipeError
from pipeline.networks.loading import load_network
from pipeline.networks.network import resolve
from pipeline.networks.weights import read_weights

NAME, CLASSES = "test_resnet", 5
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=CLASSES).eval()


@pytest.fixture(scope="module")
def other() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model(NAME, num_classes=CLASSES).eval()


def prefixed(state: dict[str, Any], prefix: str) -> OrderedDict[str, Any]:
    return OrderedDict((prefix + name, value) for name, value in state.items())


CHECKPOINTS: dict[str, Callable[[dict[str, Any], nn.Module], Any]] = {
    "bare": lambda state, other: state,
    "DistributedDataParallel": lambda state, other: prefixed(state, "module."),
    "compiled and distributed": lambda state, other: prefixed(state, "module._orig_mod."),
    "PyTorch's ImageNet example": lambda state, other: {
        "epoch": 90, "arch": NAME, "state_dict": prefixed(state, "module."), "best_acc1": torch.tensor(70.0),
        "optimizer": {"state": {}, "param_groups": []},
    },
    "torchvision's reference": lambda state, other: {
        "model": state, "optimizer": {}, "lr_scheduler": {"last_epoch": 3}, "epoch": 3,
        "args": argparse.Namespace(model=NAME, lr=0.1),
    },
    "timm's training script": lambda state, other: {
        "epoch": 7, "arch": NAME, "state_dict": other.state_dict(), "state_dict_ema": state, "optimizer": {},
        "version": 2, "args": argparse.Namespace(model=NAME), "metric": np.float64(71.5), "amp_scaler": {},
    },
    "torchvision's averaged": lambda state, other: {
        "model": other.state_dict(), "model_ema": OrderedDict(n_averaged=torch.tensor(9), **prefixed(state, "module.")),
    },
    "Lightning": lambda state, other: {
        "pytorch-lightning_version": "2.5", "global_step": 1, "hyper_parameters": {"lr": 0.1},
        "state_dict": prefixed(state, "model.") | {"criterion.weight": torch.ones(CLASSES)},
    },
    "a tutorial's": lambda state, other: {
        "model_state_dict": state, "loss": np.float32(0.2), "class_to_idx": {"b": 1, "a": 0, "e": 4, "d": 3, "c": 2},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("suffix", [".pth", ".pth.tar"])
def test_a_checkpoint_gives_the_network_that_was_saved(
    kind: str, suffix: str, model: nn.Module, other: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / f"checkpoint{suffix}"
    torch.save(CHECKPOINTS[kind](model.state_dict(), other), path)
    states_it = read_weights(path).architecture is not None
    network = load_network(path, None if states_it else NAME)
    assert torch.equal(network.model.eval()(IMAGES), model(IMAGES))
    assert network.class_names == (list("abcde") if kind == "a tutorial's" else list("01234"))
    assert network.states_classes == (kind == "a tutorial's")


def test_weights_in_the_old_format_and_as_bare_safetensors(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    save_file(model.state_dict(), tmp_path / "named.bin")  # what a file is shows inside, not in its name
    for name in ("old.pt", "model.safetensors", "named.bin"):
        assert torch.equal(load_network(tmp_path / name, NAME).model.eval()(IMAGES), model(IMAGES))


def test_averaged_weights_of_torch(model: nn.Module, tmp_path: Path) -> None:
    torch.save(AveragedModel(model).state_dict(), tmp_path / "ema.pt")
    assert torch.equal(load_network(tmp_path / "ema.pt", NAME).model.eval()(IMAGES), model(IMAGES))


def test_what_a_training_script_says_of_its_images_is_followed(model: nn.Module, tmp_path: Path) -> None:
    told = argparse.Namespace(model=NAME, img_size=96, mean=[0.5, 0.5, 0.5], std=None, crop_pct=0.8, interpolation="")
    torch.save({"arch": NAME, "state_dict": model.state_dict(), "args": told}, tmp_path / "a.pth")
    network = load_network(tmp_path / "a.pth")
    entry = timm.get_pretrained_cfg(NAME)
    assert (network.image_size, network.mean, network.std) == (96, (0.5, 0.5, 0.5), tuple(entry.std))
    assert network.framing == Framing(0.8, entry.interpolation)


def test_torchvisions_networks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v3_small(num_classes=3).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "best.pth")
    network = load_network(tmp_path / "best.pth", "torchvision_mobilenet_v3_small")
    images = torch.rand(1, 3, 224, 224)
    assert torch.equal(network.model.eval()(images), model(images))
    assert (network.image_size, network.framing) == (224, Framing(224 / 256, "bilinear"))


@pytest.mark.parametrize("safe", [False, True, "both"])
def test_what_timm_saves_for_the_hub(safe: bool | str, model: nn.Module, tmp_path: Path) -> None:
    timm.models.save_for_hf(model, tmp_path, model_config={"label_names": list("edcba")}, safe_serialization=safe)
    network = load_network(tmp_path)
    entry = timm.get_pretrained_cfg(NAME)
    assert torch.equal(network.model.eval()(IMAGES), model(IMAGES))
    assert network.class_names == list("edcba")
    assert (network.image_size, network.framing.crop_pct) == (entry.input_size[-1], entry.crop_pct)


def test_a_network_that_timm_cannot_show_on_squares_is_refused(model: nn.Module, tmp_path: Path) -> None:
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"input_size": [1, 64, 64]}, "1 × 64 × 64"),
        ({"input_size": [3, 64, 96]}, "3 × 64 × 96"),
        ({"crop_mode": "border"}, "crop_mode"),
        ({"interpolation": "random"}, "interpolation"),
        ({"crop_pct": 1.2}, "crop_pct"),
    ):
        changed = config | {"pretrained_cfg": config["pretrained_cfg"] | change}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            load_network(tmp_path)


# --- transformers ---------------------------------------------------------------------------------------


def of_transformers(folder: Path, kind: str) -> nn.Module:
    """A tiny image classifier of transformers in a folder as it saves one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    names = {"id2label": {0: "cat", 1: "dog", 2: "eel"}, "label2id": {"cat": 0, "dog": 1, "eel": 2}}
    if kind == "vit":
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32,
            patch_size=8, **names,
        )  # fmt: skip
        shown = {"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    elif kind == "convnext":
        config = transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], **names)
        shown = {"size": {"shortest_edge": 64}, "crop_pct": 0.875, "resample": 3, "image_mean": [0.4, 0.5, 0.6],
                 "image_std": [0.2, 0.3, 0.4]}  # fmt: skip
    else:
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], **names)
        shown = {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32},
                 "resample": 3, "do_normalize": False}  # fmt: skip
    model = transformers.AutoModelForImageClassification.from_config(config).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(shown | {"do_resize": True}))
    return model


@pytest.mark.parametrize(
    ("kind", "framing", "size", "mean"),
    [
        ("vit", Framing(1.0, "bilinear", "squash"), 32, (0.5, 0.5, 0.5)),
        ("convnext", Framing(0.875), 64, (0.4, 0.5, 0.6)),
        ("resnet", Framing(0.8), 32, (0.0, 0.0, 0.0)),
    ],
)
def test_an_image_classifier_of_transformers(kind: str, framing: Framing, size: int, mean: Any, tmp_path: Path) -> None:
    model = of_transformers(tmp_path, kind)
    network = load_network(tmp_path)
    images = torch.rand(2, 3, size, size)
    assert torch.allclose(network.model.eval()(images), model(images).logits, atol=1e-6)
    assert network.class_names == ["cat", "dog", "eel"]
    assert (network.framing, network.image_size, network.mean) == (framing, size, pytest.approx(mean))


def test_what_transformers_would_do_otherwise_is_refused(tmp_path: Path) -> None:
    of_transformers(tmp_path, "vit")
    processor = tmp_path / "preprocessor_config.json"
    for change, message in (
        ({"do_pad": True}, "pads"),
        ({"size": {"height": 32, "width": 48}}, "not square"),
        ({"do_resize": False}, "does not resize"),
        ({"crop_mode": None, "resample": 77}, "77"),
    ):
        good = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        processor.write_text(json.dumps(good | change))
        with pytest.raises(CheckpointError, match=message):
            load_network(tmp_path)
    processor.unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json is missing"):
        load_network(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["ViTModel"]}))
    with pytest.raises(CheckpointError, match="no image classifier"):
        load_network(tmp_path)


# --- what is refused ---------------------------------------------------------------------------------------


class Ran:
    """Writes a file when it is unpickled by a loader that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_nothing_in_a_checkpoint_is_run(model: nn.Module, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    torch.save({"state_dict": model.state_dict(), "extra": Ran(proof)}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"running code from the file.*weights_only=False.*weights\.pth"):
        load_network(tmp_path / "evil.pth", NAME)
    assert not proof.exists()


def test_a_whole_module_is_refused_and_the_way_out_works(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model, tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match="running code") as refused:
        load_network(tmp_path / "whole.pt", NAME)
    code = str(refused.value).split('python -c "')[1].rstrip('"')
    here = {"whole.pt": str(tmp_path / "whole.pt"), "weights.pth": str(tmp_path / "weights.pth")}
    for name, path in here.items():
        code = code.replace(f"'{name}'", repr(path))
    exec(code, {})
    assert torch.equal(load_network(tmp_path / "weights.pth", NAME).model.eval()(IMAGES), model(IMAGES))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "scripted.pt")
    with pytest.raises(CheckpointError, match=r"TorchScript.*torch\.jit\.load"):
        load_network(tmp_path / "scripted.pt", NAME)


@pytest.mark.parametrize(
    ("held", "architecture", "message"),
    [
        ("{}", NAME, "no weights under any of"),
        ("[1, 2]", NAME, "holds a list"),
        ("state", None, "does not say which network"),
        ("state", "no_such_net", "timm knows no model 'no_such_net'"),
        ("state", "test_vit", "no classifier of test_vit"),
        ("state", "resnet10t", "weights of another network"),
        ("headless", NAME, "without its last layer"),
        ("two", NAME, "holds 2 networks of this kind, under 'student.', 'teacher.'"),
        ("names", NAME, "2 class names for 5 classes"),
    ],
)
def test_what_does_not_fit_is_named(
    held: str, architecture: str | None, message: str, model: nn.Module, tmp_path: Path
) -> None:
    state = model.state_dict()
    kinds: dict[str, Any] = {
        "{}": {},
        "[1, 2]": [1, 2],
        "state": state,
        "headless": {name: value for name, value in state.items() if not name.startswith("fc.")},
        "two": {**prefixed(state, "student."), **prefixed(state, "teacher.")},
        "names": {"state_dict": state, "classes": ["a", "b"]},
    }
    torch.save(kinds[held], tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=message):
        load_network(tmp_path / "c.pth", architecture)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_a_file_cut_short_is_one_sentence(kind: str, share: float, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    if kind == "torch":
        torch.save(model.state_dict(), path)
    else:
        save_file(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"cut short|no file of weights") as refused:
        load_network(path, NAME)
    assert "\n" not in str(refused.value)


def test_a_folder_without_a_config_names_the_file(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "best.pth")
    with pytest.raises(CheckpointError, match=r"name the file: .*best\.pth"):
        load_network(tmp_path)
    assert Framing() == WHOLE


# --- what a config may not ask for ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument",
    ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained_strict"],
)
def test_arguments_that_make_timm_load_something_are_refused(argument: str, model: nn.Module, tmp_path: Path) -> None:
    """In a network's config.json, and in a recipe."""
    proof = tmp_path / "ran"
    torch.save(Ran(proof), tmp_path / "evil.pth")
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    value = str(tmp_path / "evil.pth") if argument != "pretrained_cfg" else {"file": str(tmp_path / "evil.pth")}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": {argument: value}}))
    with pytest.raises(CheckpointError, match=argument):
        load_network(tmp_path)
    with pytest.raises(RecipeError, match=f"{argument} is no argument of a network"):
        resolve(ModelSettings(name=NAME, options={argument: value}), 32)
    assert not proof.exists()


@pytest.mark.parametrize("place", ["hf-hub:someone/network", "local-dir:/tmp/x", "timm/resnet18", "os.system"])
def test_an_architecture_is_a_name_and_no_place(place: str, model: nn.Module, tmp_path: Path) -> None:
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": place}))
    with pytest.raises(CheckpointError, match="timm knows no such network"):
        load_network(tmp_path)


def test_timms_network_under_transformers_roof(model: nn.Module, tmp_path: Path) -> None:
    timm.models.save_for_hf(model, tmp_path, model_config={"label_names": list("abcde")}, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "timm_wrapper"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(
        {f"timm_model.{name}": value for name, value in model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    network = load_network(tmp_path)
    assert torch.equal(network.model.eval()(IMAGES), model(IMAGES))
    assert network.class_names == list("abcde")


def test_a_config_of_transformers_runs_no_code_of_its_folder(tmp_path: Path) -> None:
    of_transformers(tmp_path, "vit")
    (tmp_path / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    config = json.loads((tmp_path / "config.json").read_text())
    auto = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    load_network(tmp_path)  # of a kind that transformers knows by itself
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": auto, "model_type": "unheard_of"}))
    with pytest.raises(CheckpointError):
        load_network(tmp_path)
    assert not (tmp_path / "ran").exists()
