"""A correction as a matrix: what becomes of the images that a teacher gives each of its answers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.report.experiments.figures import new_figure

ROWS = 24  # answers that are shown, the most frequent ones
Matrix = NDArray[np.floating]


def draw_movements(
    panels: Sequence[tuple[str, Matrix]], answers: Sequence[str], class_names: Sequence[str], path: Path
) -> None:
    """Write a PNG with a panel for each (title, matrix (n, C)), their rows named by the same n answers."""
    wide, high = 1.6 + 0.36 * len(class_names), 1.6 + 0.2 * len(answers)
    with new_figure(path, figsize=(1.8 + wide * len(panels), high), layout="constrained") as figure:
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, (title, matrix) in zip(axes, panels, strict=True):
            image = axis.imshow(matrix, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            axis.set_xticks(range(len(class_names)), class_names, rotation=60, ha="right", fontsize=8)
            axis.set_title(title, fontsize=10)
            axis.tick_params(length=0)
            for side in axis.spines.values():
                side.set_visible(False)
        axes[0].set_yticks(range(len(answers)), answers, fontsize=8)
        axes[0].set_ylabel("the teacher's first answer (images)")
        figure.colorbar(image, ax=axes.tolist(), label="mean share", fraction=0.04, pad=0.02)
