"""Calibrated distributions over the quarters of training, as a figure: figure 10 of arXiv:2003.10580v1."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.calibration import Calibration, changes, entropy
from pipeline.report.experiments.with_mpl import BLUE, ORANGE
from pipeline.storage.files import whole_file

SHOWN = 5  # images


def mean_changes(calibrations: Sequence[Calibration]) -> dict[str, Any]:
    """`changes`, the mean over trainings; the steps are the first's."""
    found = [changes(calibration) for calibration in calibrations]
    means = {key: np.mean([one[key] for one in found], axis=0).tolist() for key in found[0] if key != "steps"}
    return {"steps": found[0]["steps"], **means}


def sentences(calibrations: Sequence[Calibration]) -> str:
    """What the distributions do, with figures."""
    found = mean_changes(calibrations)
    images = len(calibrations[0].images)
    percent = [f"{100 * share:.0f}%" for share in found["argmax_changed"]]
    quarters = ", ".join(
        f"quarter {i + 1}: {change:+.3f} nats ({100 * flat:.0f}% flatter, {100 * sharp:.0f}% sharper)"
        for i, (change, flat, sharp) in enumerate(
            zip(found["entropy_change"], found["flattened"], found["sharpened"], strict=True)
        )
    )
    return (
        f"{images} pool images of each of {len(calibrations)} runs: the most probable class is not the large teacher's "
        f"for {', '.join(percent)} of them after 0, ¼, ½, ¾ and all of training. Mean entropy: "
        f"{found['teacher_entropy']:.3f} nats at the large teacher, "
        f"{', '.join(f'{h:.3f}' for h in found['entropy'])} calibrated. Change of entropy by {quarters}."
    )


def draw_calibrated(calibrations: Sequence[Calibration], path: Path, title: str) -> None:
    """Above, images of the first training; below, the entropy of all images of all trainings.

    The images are, of each class of the large teacher, that whose distribution moves most; the most moved classes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = calibrations[0]
    stages, _, classes = first.calibrated.shape
    moved = np.abs(first.calibrated - first.calibrated[0]).sum(-1).max(0)  # (n,)
    order = np.argsort(-moved, kind="stable")
    _, firsts = np.unique(first.teacher.argmax(1)[order], return_index=True)  # of each class, the most moved
    shown = order[np.sort(firsts)[:SHOWN]]
    fig = plt.figure(figsize=(2.3 * stages, 1.25 * len(shown) + 3.2), layout="constrained")
    halves: Any = fig.subfigures(2, 1, height_ratios=(1.25 * len(shown), 3.2))
    upper, lower = halves
    bars = upper.subplots(len(shown), stages, sharex=True, sharey=True, squeeze=False)
    for row, image in enumerate(shown):
        for column in range(stages):
            ax = bars[row, column]
            ax.bar(range(classes), first.calibrated[column, image], color=ORANGE, width=0.85)
            ax.step(np.arange(classes + 1) - 0.5, np.append(first.teacher[image], first.teacher[image, -1]),
                    where="post", color=BLUE, linewidth=1)  # fmt: skip
            ax.set_ylim(0, 1)
            ax.set_yticks([0, 1])
            ax.set_xticks([0, classes - 1])
            ax.tick_params(length=0, labelsize=7)
            ax.spines[["top", "right"]].set_visible(False)
            if row == 0:
                ax.set_title(f"{100 * column // (stages - 1)}% of training", fontsize=9)
        bars[row, 0].set_ylabel(f"image {image}", fontsize=8)
    upper.suptitle(
        f"{title}\nbars: calibrated; line: the large teacher; by class. Of each class, what moves most",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    ax = lower.subplots()
    parts = np.linspace(0, 100, stages)
    every = np.concatenate([entropy(calibration.calibrated) for calibration in calibrations], axis=1)  # (5, n · runs)
    ax.plot(parts, every, color="0.8", linewidth=0.5, alpha=0.5)
    ax.plot(parts, every.mean(1), color=ORANGE, linewidth=2.6, marker="o", label="mean, calibrated")
    large = float(np.mean([entropy(calibration.teacher).mean() for calibration in calibrations]))
    ax.axhline(large, color=BLUE, linewidth=1.6, label="mean, the large teacher")
    ax.set_xticks(parts, [f"{part:.0f}%" for part in parts])
    ax.set_ylabel("entropy, nats")
    ax.set_xlabel("of training; a thin line is an image")
    ax.legend(frameon=False, fontsize=8, loc="upper right")
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(length=0)
    with whole_file(path) as temporary:
        fig.savefig(temporary, dpi=140, format="png")
    plt.close(fig)
