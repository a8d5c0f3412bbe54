"""Networks that a person brings, on the command line: a checkpoint as the teacher, judged, and asked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.networks.loading import load_network

Mpl = Callable[..., Any]


@pytest.fixture
def checkpoint(finished: Path, tmp_path: Path) -> Path:
    """The run's teacher as a training script would have saved it."""
    state = load_file(finished / "teacher/model.safetensors")
    saved = {"arch": "wrn_10_1", "epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}
    torch.save(saved, tmp_path / "teacher.pth.tar")
    return tmp_path / "teacher.pth.tar"


def scored(run: Path) -> dict[str, Any]:
    return json.loads((run / "filter/record.json").read_text())["result"]


def test_a_checkpoint_as_the_teacher_gives_the_selection_of_its_folder(
    mpl: Mpl, finished: Path, recipe: Path, checkpoint: Path, tmp_path: Path
) -> None:
    run = ("--recipe", recipe, "--run", tmp_path / "run")
    unsaid = mpl("filter", *run, "--teacher", checkpoint)
    assert unsaid.status == 1
    assert "--assume-class-order" in unsaid.err
    assert "Resume with" not in unsaid.err  # the same command cannot succeed
    done = mpl("filter", *run, "--teacher", checkpoint, "--assume-class-order")
    assert done.status == 0
    assert "wrn_10_1, 10 classes (its classes are not named), shown images of 8 pixels (crop_pct 1" in done.err
    assert "of the 50 labelled images" in done.err
    assert scored(tmp_path / "run")["fingerprint"] == scored(finished)["fingerprint"]
    assert mpl("filter", "--run", tmp_path / "run", "--k", 20).status == 0  # nothing is to be said twice
    assert mpl("precompute", "--run", tmp_path / "run").status == 0
    assert mpl("precompute", "--run", tmp_path / "run", "--check", 20).status == 0


def test_another_preprocessing_is_another_scoring(mpl: Mpl, recipe: Path, checkpoint: Path, tmp_path: Path) -> None:
    run = ("--recipe", recipe, "--run", tmp_path / "run")
    assert mpl("filter", *run, "--teacher", checkpoint, "--assume-class-order").status == 0
    folder = tmp_path / "run" / scored(tmp_path / "run")["teacher"]
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["crop_pct"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    assert mpl("filter", *run, "--k", 20).status == 1
    refused = mpl("filter", *run)
    assert "preprocessing.crop_pct" in refused.err
    before = scored(tmp_path / "run")["fingerprint"]
    assert mpl("filter", *run, "--force").status == 0
    assert scored(tmp_path / "run")["fingerprint"] != before


def test_a_dry_run_leaves_no_network(mpl: Mpl, recipe: Path, checkpoint: Path, tmp_path: Path) -> None:
    told = mpl("filter", "--recipe", recipe, "--run", tmp_path / "run", "--teacher", checkpoint, "--dry-run",
               "--assume-class-order")  # fmt: skip
    assert told.status == 0
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_judged_and_asked(
    mpl: Mpl, finished: Path, run: Path, checkpoint: Path, tmp_path: Path
) -> None:
    assert mpl("evaluate", "--run", run, "--network", checkpoint, "--assume-class-order").status == 0
    assert mpl("evaluate", "--run", run, "--network", run / "teacher").status == 0
    results = [json.loads(path.read_text()) for path in sorted((run / "evaluations").glob("*-test.json"))]
    of_file, of_folder = (
        next(r for r in results if name in r["network"]) for name in ("networks/teacher-", "run/teacher")
    )
    assert of_file["confusion"] == of_folder["confusion"]
    image = tmp_path / "a.png"
    from PIL import Image

    Image.new("RGB", (8, 8), "gray").save(image)
    asked = mpl("predict", "--run", run, "--network", checkpoint, "--output", tmp_path / "p.csv", image)
    assert asked.status == 0
    rows = (tmp_path / "p.csv").read_text().splitlines()
    with torch.no_grad():
        logits = load_network(finished / "teacher").model.eval()(torch.full((1, 3, 8, 8), (128 / 255 - 0.5) / 0.5))
    told = [float(value) for value in rows[1].split(",")[4:]]
    assert told == pytest.approx(logits.softmax(1)[0].tolist(), abs=1e-5)


def test_an_unknown_architecture_is_asked_for(mpl: Mpl, recipe: Path, checkpoint: Path, tmp_path: Path) -> None:
    torch.save(torch.load(checkpoint, weights_only=True)["state_dict"], tmp_path / "bare.pth")
    run = ("--recipe", recipe, "--run", tmp_path / "run", "--teacher", tmp_path / "bare.pth", "--assume-class-order")
    assert "--architecture NAME" in mpl("filter", *run).err
    assert "did you mean wrn_10_" in mpl("filter", *run, "--architecture", "wrn_10_l").err
    assert mpl("filter", *run, "--architecture", "wrn_10_1").status == 0
