"""Calibrated distributions over the quarters of training, as a figure: figure 10 of arXiv:2003.10580v1."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.calibration import Calibration, changes, entropy
from pipeline.report.experiments.figures import BLUE, ORANGE, new_figure, plain

SHOWN = 5  # images


def mean_changes(calibrations: Sequence[Calibration]) -> dict[str, Any]:
    """`changes`, the mean over trainings; the steps are the first's."""
    every = [changes(calibration) for calibration in calibrations]
    means = {key: np.mean([of_one[key] for of_one in every], axis=0).tolist() for key in every[0] if key != "steps"}
    return {"steps": every[0]["steps"], **means}


def sentences(calibrations: Sequence[Calibration]) -> str:
    """What the distributions do, with figures."""
    means = mean_changes(calibrations)
    images = len(calibrations[0].images)
    percent = [f"{100 * share:.0f}%" for share in means["argmax_changed"]]
    quarters = ", ".join(
        f"quarter {i + 1}: {change:+.3f} nats ({100 * flat:.0f}% flatter, {100 * sharp:.0f}% sharper)"
        for i, (change, flat, sharp) in enumerate(
            zip(means["entropy_change"], means["flattened"], means["sharpened"], strict=True)
        )
    )
    return (
        f"{images} pool images of each of {len(calibrations)} runs: the most probable class is not the large teacher's "
        f"for {', '.join(percent)} of them after 0, ¼, ½, ¾ and all of training. Mean entropy: "
        f"{means['teacher_entropy']:.3f} nats at the large teacher, "
        f"{', '.join(f'{h:.3f}' for h in means['entropy'])} calibrated. Change of entropy by {quarters}."
    )


def draw_calibrated(calibrations: Sequence[Calibration], path: Path, title: str) -> None:
    """Above, images of the first training; below, the entropy of all images of all trainings.

    The images are, of each class of the large teacher, that whose distribution moves most; the most moved classes.
    """
    first = calibrations[0]
    quarters = len(first.steps)
    shown = _most_moved(first)
    heights = (1.25 * len(shown), 3.2)
    with new_figure(path, figsize=(2.3 * quarters, sum(heights)), layout="constrained") as figure:
        upper, lower = figure.subfigures(2, 1, height_ratios=heights)
        bars = upper.subplots(len(shown), quarters, sharex=True, sharey=True, squeeze=False)
        for row, image in zip(bars, shown, strict=True):
            for quarter, panel in enumerate(row):
                _bars(panel, first.calibrated[quarter, image], first.teacher[image])
            row[0].set_ylabel(f"image {image}", fontsize=8)
        for quarter, panel in enumerate(bars[0]):
            panel.set_title(f"{100 * quarter // (quarters - 1)}% of training", fontsize=9)
        upper.suptitle(
            f"{title}\nbars: calibrated; line: the large teacher; by class. Of each class, what moves most",
            fontsize=11, x=0.01, ha="left",
        )  # fmt: skip
        _entropies(lower.subplots(), calibrations)


def _most_moved(calibration: Calibration) -> NDArray[np.int64]:
    """Of each class of the large teacher the image that moves most; the most moved of these."""
    moved = np.abs(calibration.calibrated - calibration.calibrated[0]).sum(-1).max(0)  # (n,)
    order = np.argsort(-moved, kind="stable")
    _, firsts = np.unique(calibration.teacher.argmax(1)[order], return_index=True)
    return order[np.sort(firsts)[:SHOWN]]


def _bars(panel: Any, calibrated: NDArray[np.float64], teacher: NDArray[np.float64]) -> None:
    classes = len(teacher)
    panel.bar(range(classes), calibrated, color=ORANGE, width=0.85)
    panel.step(np.arange(classes + 1) - 0.5, np.append(teacher, teacher[-1]), where="post", color=BLUE, linewidth=1)
    panel.set_ylim(0, 1)
    panel.set_yticks([0, 1])
    panel.set_xticks([0, classes - 1])
    panel.tick_params(labelsize=7)
    plain(panel, grid=None)


def _entropies(panel: Any, calibrations: Sequence[Calibration]) -> None:
    done = np.linspace(0, 100, len(calibrations[0].steps))  # percent
    every = np.concatenate([entropy(calibration.calibrated) for calibration in calibrations], axis=1)  # (5, n · runs)
    panel.plot(done, every, color="0.8", linewidth=0.5, alpha=0.5)
    panel.plot(done, every.mean(1), color=ORANGE, linewidth=2.6, marker="o", label="mean, calibrated")
    large = float(np.mean([entropy(calibration.teacher).mean() for calibration in calibrations]))
    panel.axhline(large, color=BLUE, linewidth=1.6, label="mean, the large teacher")
    panel.set_xticks(done, [f"{percent:.0f}%" for percent in done])
    panel.set_ylabel("entropy, nats")
    panel.set_xlabel("of training; a thin line is an image")
    panel.legend(frameon=False, fontsize=8, loc="upper right")
    plain(panel, grid=None)
