"""What a calibrator makes of a few pool images over the quarters of training: figure 10 of arXiv:2003.10580v1.

The file is a pure function of the training: a run that was killed and goes on writes the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import RunError
from pipeline.storage.files import read_json, write_json

FILE = "calibration.json"
SAMPLE = 64  # images
QUARTERS = 4
CHANGE = 0.01  # nats of entropy: less counts as none


@dataclass(frozen=True)
class Calibration:
    """Distributions of n images over the quarters of a training.

    Attributes:
        images: identity of each: shard, row, key.
        class_names: in the order of the distributions.
        steps: at which the calibrator was asked: 0, ¼, ½, ¾ and all of the training.
        teacher: q_large, (n, C).
        calibrated: q_Ψ at each of the steps, (5, n, C); fewer while the training goes on.
    """

    images: list[dict[str, Any]]
    class_names: list[str]
    steps: list[int]
    teacher: NDArray[np.float64]
    calibrated: NDArray[np.float64]


class CalibrationLog:
    """Call it with the number of steps done; at the quarters it writes the file anew.

    Args:
        path: of the file.
        network: q_Ψ, (n, C) → (n, C).
        teacher: q_large of the sample, (n, C), on the network's device.
        images: identity of each of the n.
        class_names: C names.
        steps: of the whole training.
    """

    def __init__(
        self,
        path: Path,
        network: Callable[[Tensor], Tensor],
        teacher: Tensor,
        images: Sequence[dict[str, Any]],
        class_names: Sequence[str],
        steps: int,
    ) -> None:
        self.path, self.network, self.teacher, self.steps = path, network, teacher, steps
        self.images, self.class_names = list(images), list(class_names)
        self.quarters = [round(steps * quarter / QUARTERS) for quarter in range(QUARTERS + 1)]

    def __call__(self, step: int) -> None:
        """Note q_Ψ where `step` is a quarter; quarters before it are kept, later ones (of a killed run) dropped."""
        if step not in self.quarters:
            return
        with torch.no_grad():
            now = self.network(self.teacher)  # (n, C)
        earlier = []
        if step and self.path.exists():
            earlier = [entry for entry in read_json(self.path)["quarters"] if entry["step"] < step]
        entry = {"step": step, "calibrated": _rounded(now)}
        write_json(
            self.path,
            {
                "format": 1,
                "steps": self.steps,
                "class_names": self.class_names,
                "images": self.images,
                "teacher": _rounded(self.teacher),
                "quarters": [*earlier, entry],
            },
        )


def read_calibration(path: Path) -> Calibration:
    """What a training wrote.

    Raises:
        RunError: there is no such file, or it is not one of these.
    """
    content = read_json(path)
    try:
        if content["format"] != 1:
            raise RunError(f"{path} has format {content['format']}; this version reads format 1")
        return Calibration(
            content["images"],
            content["class_names"],
            [entry["step"] for entry in content["quarters"]],
            np.array(content["teacher"]),
            np.array([entry["calibrated"] for entry in content["quarters"]]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is not a calibration file: {error!r}") from error


def entropy(q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Nats, over the last axis."""
    return -np.sum(q * np.log(np.maximum(q, 1e-12)), axis=-1)


def changes(calibration: Calibration) -> dict[str, Any]:
    """How the distributions change; shares are of the n images.

    Returns:
        argmax_changed: share whose most probable class is not q_large's, at each step.
        entropy: mean, nats, at each step; teacher_entropy: of q_large.
        flattened, sharpened, entropy_change: share whose entropy rose, fell, by more than 0.01 nats, and the mean
            change, in each quarter.
    """
    h = entropy(calibration.calibrated)  # (5, n)
    difference = np.diff(h, axis=0)  # (4, n)
    changed = calibration.calibrated.argmax(-1) != calibration.teacher.argmax(-1)
    return {
        "steps": calibration.steps,
        "argmax_changed": changed.mean(1).tolist(),
        "teacher_entropy": float(entropy(calibration.teacher).mean()),
        "entropy": h.mean(1).tolist(),
        "entropy_change": difference.mean(1).tolist(),
        "flattened": (difference > CHANGE).mean(1).tolist(),
        "sharpened": (difference < -CHANGE).mean(1).tolist(),
    }


def _rounded(q: Tensor) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in q.double().cpu().tolist()]
