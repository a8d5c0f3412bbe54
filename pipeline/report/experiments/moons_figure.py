"""The two moons as a figure: decision regions, accuracies of all draws, cosines of gradients."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.moons.data import make_moons
from pipeline.moons.settings import LABELS, MethodName
from pipeline.moons.study import CellResult, Row, X, Y, grid
from pipeline.report.experiments.figures import BLUE, ORANGE, PINK, SKY, new_figure, pyplot, spread

SHOWN: tuple[MethodName, ...] = ("supervised", "pseudo_labels", "mpl", "uda", "mpl_uda", "all_labels")
ROWS = ("paper", "working")  # whose regions are shown
CLUSTERS = (BLUE, ORANGE)
LINES: dict[MethodName, str] = {
    "supervised": "#000000", "pseudo_labels": PINK, "mpl": ORANGE, "uda": SKY, "mpl_uda": BLUE,
    "all_labels": "#8A8A8A",
}  # fmt: skip
TITLES = {"paper": "Paper's settings", "working": "Networks that can learn"}
SMOOTH = 5  # looks whose mean a point of a cosine's line is


def draw_moons(study: list[Row], results: dict[str, CellResult], first: int, path: Path) -> None:
    """Write the figure as PNG; the draw that is shown with its points is the first, which was so before any run."""
    shown = [row for row in study if row.name in ROWS] or study[:1]
    heights = [1.34 * len(shown) + 0.6, 3.3]
    looks = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
    with (
        pyplot().rc_context(looks),
        new_figure(path, dpi=105, colours=256, figsize=(12.4, sum(heights)), layout="constrained") as figure,
    ):
        upper, lower = figure.subfigures(2, 1, height_ratios=heights)
        _regions(upper, shown, results, first)
        _curves(lower, shown[-1], results)


def _regions(fig: Any, shown: list[Row], results: dict[str, CellResult], first: int) -> None:
    axes = fig.subplots(len(shown), len(SHOWN), squeeze=False, sharex=True, sharey=True)
    for row, line in zip(shown, axes, strict=True):
        for method, ax in zip(SHOWN, line, strict=True):
            result = results[f"{row.name}/{method}"]
            _boundaries(ax, result)
            _points(ax, row, first)
            text = f"{sum(result.successes(row.settings))} of {len(result.accuracy)}"
            box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none", "alpha": 0.9}
            ax.text(0.975, 0.94, text, transform=ax.transAxes, ha="right", va="top", weight="bold", bbox=box, zorder=6)
            ax.set(xticks=[], yticks=[], xlim=X, ylim=Y, aspect="equal")
            ax.spines[:].set_visible(False)
            if row is shown[0]:
                ax.set_title(LABELS[method], weight="bold")
        network = f"weights ±{row.settings.init:g}, lr {row.settings.lr:g}"
        line[0].set_ylabel(f"{TITLES.get(row.name, row.name)}\n{network}", fontsize=7.5)
    n = len(next(iter(results.values())).accuracy)
    fig.suptitle(
        f"Two moons, six labels. Boundaries of {n} draws, draw {first} in black with its points and labels (stars); "
        "in the corner: draws separated",
        fontsize=11, x=0.01, ha="left",
    )  # fmt: skip


def _boundaries(ax: Any, result: CellResult) -> None:
    """Colour: which class more of the draws decide for; a thin line for each draw, a thick one for the first."""
    from matplotlib.colors import LinearSegmentedColormap

    pale = LinearSegmentedColormap.from_list("", ["#B9D7EC", "#F7F7F7", "#F6CDB2"])
    x, y = grid()
    every = result.regions.astype(np.float32)  # (D, y, x)
    share = (every > 0.5).mean(axis=0)
    ax.contourf(x, y, share, levels=np.linspace(-1e-6, 1 + 1e-6, 12), cmap=pale)
    for place, p in enumerate(every):
        if p.min() < 0.5 < p.max():
            style = ("black", 1.7) if place == 0 else ("#00000055", 0.6)
            ax.contour(x, y, p, levels=[0.5], colors=[style[0]], linewidths=style[1], zorder=3 if place == 0 else 2)


def _points(ax: Any, row: Row, draw: int) -> None:
    moons = make_moons((draw,), row.settings)
    points, clusters = moons.points[0].numpy(), moons.clusters[0].numpy()
    stars, labels = (tensor.numpy() for tensor in moons.labels)
    for cluster, color in enumerate(CLUSTERS):
        ax.scatter(*points[clusters == cluster][::5].T, s=2.2, color=color, linewidths=0, zorder=1)
        mine = stars[labels == cluster].T
        ax.scatter(*mine, s=110, marker="*", color=color, edgecolors="white", linewidths=1.0, zorder=5)


def _curves(fig: Any, row: Row, results: dict[str, CellResult]) -> None:
    strip, labelled, true = fig.subplots(1, 3, width_ratios=[1.15, 1, 1])
    for place, method in enumerate(SHOWN):
        values = np.array(results[f"{row.name}/{method}"].accuracy)
        jitter = np.random.RandomState(0).uniform(-0.22, 0.22, len(values))  # so that equal dots are all seen
        strip.scatter(values, -place + jitter, s=16, color=LINES[method], alpha=0.9, linewidths=0)
        strip.plot([values.mean()] * 2, [-place - 0.33, -place + 0.33], color="black", linewidth=1.8)
    strip.axvline(100 * row.settings.success, color="0.6", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    strip.set_yticks([-place for place in range(len(SHOWN))], [LABELS[m] for m in SHOWN])
    strip.tick_params(axis="y", length=0)
    strip.set_xlabel(f"accuracy, %; dashed: separated (≥ {100 * row.settings.success:.0f})")
    strip.set_title("Every draw, and the mean (bar)", loc="left")
    panels = (
        (labelled, "cosine_labelled", "Training gradient against the six labels'"),
        (true, "cosine_true", "… and against that of all true labels"),
    )
    for ax, name, title in panels:
        _cosines(ax, row, results, name)
        ax.set_title(title, loc="left")
        ax.set_xlabel("step")
    labelled.set_ylabel(f"cosine; mean of draws, {SMOOTH} looks")
    network = f"weights ±{row.settings.init:g}, lr {row.settings.lr:g}"
    head = f"{TITLES.get(row.name, row.name)} ({network}): accuracies, and where the student's gradient points"
    fig.suptitle(head, fontsize=11, x=0.01, ha="left")


def _cosines(ax: Any, row: Row, results: dict[str, CellResult], name: str) -> None:
    ends = []
    for method in SHOWN:
        result = results[f"{row.name}/{method}"]
        mean = smooth(getattr(result, name).mean(axis=1))
        ax.plot(result.steps, mean, color=LINES[method], linewidth=1.6)
        ends.append((float(mean[-1]), method))
    ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    ax.set_ylim(-0.45, 1.08)
    last = results[f"{row.name}/{SHOWN[0]}"].steps[-1]
    ax.set_xlim(0, last)
    ax.set_xticks([0, last // 2, last], [f"{v:,}" for v in (0, last // 2, last)])
    for (_, method), place in zip(sorted(ends), spread([end for end, _ in sorted(ends)], 0.105, 1.04), strict=True):
        ax.annotate(LABELS[method], (last, place), (4, 0), textcoords="offset points", va="center", fontsize=8,
                    color=LINES[method], annotation_clip=False)  # fmt: skip


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the `SMOOTH` looks around each; fewer at the ends."""
    kernel = np.ones(min(SMOOTH, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
