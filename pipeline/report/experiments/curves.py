"""Curves of metrics.csv over seeds: mean and standard deviation at each look. Figure 9 of arXiv:2003.10580v1."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import RunError
from pipeline.storage.files import whole_file
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
        found = [(int(row["step"]), float(row[column])) for row in read_metrics(file) if row.get(column)]
        if not found:
            raise RunError(f"{file} has no {column}; train again with evaluate_every set")
        series.append(np.array(found))
    if any(len(one) != len(series[0]) or (one[:, 0] != series[0][:, 0]).any() for one in series):
        raise RunError(f"{', '.join(map(str, files))} have {column} at different steps; train them alike")
    return Curve(name, series[0][:, 0].astype(np.int64), np.stack([one[:, 1] for one in series]), colour, style)


def draw_curves(panels: dict[str, list[Curve]], path: Path, title: str) -> None:
    """A panel for each title, one legend; bands are one standard deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.6), squeeze=False, layout="constrained")
    for ax, (heading, curves) in zip(axes[0], panels.items(), strict=True):
        for curve in curves:
            mean = curve.values.mean(0)
            ax.plot(curve.steps, mean, color=curve.colour, linestyle=curve.style, linewidth=1.8, label=curve.name)
            if len(curve.values) > 1:
                spread = curve.values.std(0, ddof=1)
                ax.fill_between(curve.steps, mean - spread, mean + spread, color=curve.colour, alpha=0.1, linewidth=0)
        ax.set_title(heading, fontsize=10, loc="left")
        ax.set_xlabel("step")
        ax.set_ylim(top=min(101.0, ax.get_ylim()[1]))
        ax.grid(color="0.92")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(length=0)
    axes[0, 0].set_ylabel("top-1, %")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    fig.suptitle(title, fontsize=12, x=0.01, ha="left")
    with whole_file(path) as temporary:
        fig.savefig(temporary, dpi=140, format="png")
    plt.close(fig)
