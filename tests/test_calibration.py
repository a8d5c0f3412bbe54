"""The distributions over the quarters: what is written, also by a run that was killed, and what is said of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.calibration import CalibrationLog, changes, read_calibration
from pipeline.errors import RunError
from pipeline.report.experiments.calibrated import mean_changes, sentences

TEACHER = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3]])
IMAGES = [{"shard": "a", "row": row, "key": f"k{row}"} for row in range(2)]


class Drifting:
    """A calibrator that depends on the step: p^(1 + step / 4), renormalised."""

    step = 0

    def __call__(self, q: torch.Tensor) -> torch.Tensor:
        power = q ** (1 + self.step / 4)
        return power / power.sum(1, keepdim=True)


def train(path: Path, first: int, last: int) -> None:
    """As `Training.run`: told at the start and after each step."""
    network = Drifting()
    log = CalibrationLog(path, network, TEACHER, IMAGES, ["x", "y", "z"], 8)
    for step in range(first, last + 1):
        network.step = step
        log(step)


def test_quarters_are_written_and_read(tmp_path: Path) -> None:
    train(tmp_path / "a.json", 0, 8)
    found = read_calibration(tmp_path / "a.json")
    assert found.steps == [0, 2, 4, 6, 8]
    assert found.images == IMAGES
    np.testing.assert_allclose(found.teacher, TEACHER.numpy(), atol=1e-6)
    power = TEACHER.double().numpy() ** 2  # step 4
    np.testing.assert_allclose(found.calibrated[2], power / power.sum(1, keepdims=True), atol=2e-6)


@pytest.mark.parametrize(("killed", "checkpoint"), [(5, 3), (6, 5), (2, 0), (7, 6), (8, 7)])
def test_a_killed_run_leaves_the_same_file(tmp_path: Path, killed: int, checkpoint: int) -> None:
    """Killed after `killed` steps, gone on from an older checkpoint; quarters that it had seen twice stand once."""
    train(tmp_path / "whole.json", 0, 8)
    train(tmp_path / "killed.json", 0, killed)
    train(tmp_path / "killed.json", checkpoint, 8)
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_new_run_forgets_the_old_one(tmp_path: Path) -> None:
    train(tmp_path / "a.json", 0, 8)
    train(tmp_path / "a.json", 0, 1)
    assert read_calibration(tmp_path / "a.json").steps == [0]


def test_changes_by_hand(tmp_path: Path) -> None:
    """Two images: one keeps its class and flattens then sharpens, one changes its class at the end."""
    flat, sharp = [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]
    rows = [
        [sharp, [0.0, 0.9, 0.1]],
        [flat, [0.0, 0.9, 0.1]],
        [sharp, [0.0, 0.9, 0.1]],
        [sharp, [0.0, 0.9, 0.1]],
        [sharp, [0.0, 0.1, 0.9]],
    ]
    tree = {
        "format": 1, "steps": 4, "class_names": ["x", "y", "z"], "images": IMAGES, "teacher": rows[0],
        "quarters": [{"step": step, "calibrated": row} for step, row in enumerate(rows)],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(tree))
    found = changes(read_calibration(tmp_path / "a.json"))
    assert found["argmax_changed"] == [0, 0, 0, 0, 0.5]
    assert found["flattened"] == [0.5, 0, 0, 0]
    assert found["sharpened"] == [0, 0.5, 0, 0]
    assert found["entropy_change"] == pytest.approx([np.log(2) / 2, -np.log(2) / 2, 0, 0])
    one = read_calibration(tmp_path / "a.json")
    assert mean_changes([one, one]) == changes(one)
    assert "for 0%, 0%, 0%, 0%, 50% of them" in sentences([one, one])


@pytest.mark.parametrize("text", ['{"format": 2}', '{"format": 1}', "[]"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RunError, match=r"a\.json"):
        read_calibration(tmp_path / "a.json")
