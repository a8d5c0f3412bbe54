"""Reliability diagrams: how often an answer is right that is given with some confidence."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.report.experiments.figures import BLUE, ORANGE, new_figure, plain

Bins = Sequence[Mapping[str, float]]  # confidence, accuracy, images


def draw_reliability(panels: Mapping[str, Bins], path: Path) -> None:
    """Write a PNG with a panel for each name; a dot's area tells how many images are in its bin."""
    with new_figure(path, figsize=(3.6 * len(panels), 3.8), layout="constrained") as figure:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for place, (panel, (name, bins)) in enumerate(zip(axes, panels.items(), strict=True)):
            plain(panel, "both")
            largest = max((row["images"] for row in bins), default=1)
            panel.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
            for row in bins:
                panel.plot([row["confidence"]] * 2, [row["confidence"], row["accuracy"]], color=ORANGE, linewidth=2)
            x, y = [row["confidence"] for row in bins], [row["accuracy"] for row in bins]
            panel.scatter(x, y, s=[15 + 90 * row["images"] / largest for row in bins], color=BLUE, zorder=3)
            panel.set(xlim=(0, 1), ylim=(0, 1), title=name, xlabel="confidence", aspect="equal")
            if not place:
                panel.set_ylabel("share that is right")
