"""Curves of metrics.csv over seeds: mean and standard deviation at each look. Figure 9 of arXiv:2003.10580v1."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import RunError
from pipeline.report.experiments.figures import new_figure, plain
from pipeline.storage.metrics import read_metrics


@dataclass(frozen=True)
class Curve:
    """One line of a panel.

    Attributes:
        name: for the legend.
        steps: of the looks, (L,).
        values: by seed, (S, L).
        colour, style: of matplotlib.
    """

    name: str
    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    colour: str
    style: str = "-"

    @property
    def averages(self) -> list[float]:
        """Mean over the looks, by seed."""
        return [float(value) for value in self.values.mean(1)]


def read_curve(files: Sequence[Path], column: str, name: str, colour: str, style: str = "-") -> Curve:
    """A column of several metrics.csv, one for each seed, where it has values.

    Raises:
        RunError: a file has none, or other steps than the first.
    """
    series = []
    for file in files:
        looks = {int(row["step"]): float(row[column]) for row in read_metrics(file) if row.get(column)}
        if not looks:
            raise RunError(f"{file} has no {column}; train again with evaluate_every set")
        series.append(looks)
    steps = list(series[0])
    if any(list(looks) != steps for looks in series):
        raise RunError(f"{', '.join(map(str, files))} have {column} at different steps; train them alike")
    return Curve(name, np.array(steps), np.array([list(looks.values()) for looks in series]), colour, style)


def draw_curves(panels: dict[str, list[Curve]], path: Path, title: str) -> None:
    """A panel for each title, one legend; bands are one standard deviation over seeds."""
    with new_figure(path, figsize=(5.2 * len(panels), 4.6), layout="constrained") as figure:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for panel, (heading, curves) in zip(axes, panels.items(), strict=True):
            for curve in curves:
                mean = curve.values.mean(0)
                panel.plot(
                    curve.steps, mean, color=curve.colour, linestyle=curve.style, linewidth=1.8, label=curve.name
                )
                if len(curve.values) > 1:
                    band = curve.values.std(0, ddof=1)
                    panel.fill_between(
                        curve.steps, mean - band, mean + band, color=curve.colour, alpha=0.1, linewidth=0
                    )
            panel.set_title(heading, fontsize=10, loc="left")
            panel.set_xlabel("step")
            panel.set_ylim(top=min(101.0, panel.get_ylim()[1]))
            plain(panel, grid="both")
        axes[0].set_ylabel("top-1, %")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        figure.suptitle(title, fontsize=12, x=0.01, ha="left")
